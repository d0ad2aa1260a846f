"""`stage=audit`: a healthy model passes every check, and each kind of damage fails the check that is meant for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning import DemonstrationData, PreferenceData, PromptData
from rlhf_lightning.data.template import JOINED, SPELLED, Template
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.audit import report
from rlhf_lightning.evaluation.audit.model import ModelChecks
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.models.tiny import build_tiny
from tests.modules.offline import WORDS, demonstrations, preferences, start

LOAD = {"dtype": "float32", "attn_implementation": "sdpa", "dropout": 0.0, "gradient_checkpointing": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return start(tmp_path_factory.mktemp("audit"))


def audit(tmp_path: Path, folder: str, make: Callable[..., Any], **changes: Any) -> dict[str, tuple[str, str]]:
    """Run the audit and return check -> (verdict, detail), whether it failed or not."""
    load = LOAD | changes.get("load", {})
    data, options = make(load_tokenizer(folder)), {"rows": 12, "max_new_tokens": 8} | changes.get("audit", {})

    def model(count: int) -> ModelChecks:
        return ModelChecks(
            partial(load_causal_lm, folder, **load), changes.get("adapter"), data, count, LocalEngine(),
            max_new_tokens=options["max_new_tokens"], temperature=0.7,
        )  # fmt: skip

    message = None
    try:
        report.audit(tmp_path, data, options["rows"], model, lambda: changes.get("reward_from"))
    except UserError as error:
        message = str(error)
    found = {row["check"]: (row["verdict"], row["detail"]) for row in json.loads((tmp_path / "audit.json").read_text())}
    count = sum(verdict == "FAIL" for verdict, _ in found.values())
    assert message == (f"{count} of {len(found)} checks failed: see the lines marked FAIL" if count else None)
    return found


def pairs(tmp_path: Path, rows: list[dict[str, str]] | None = None, val: Any = None, **more: Any) -> Callable[..., Any]:
    return lambda tokenizer: PreferenceData(
        tokenizer, rows or preferences(15), val, **{"max_length": 64, "cache_dir": tmp_path / "cache"} | more
    )


def prompts(tmp_path: Path) -> Callable[..., Any]:
    return lambda tokenizer: PromptData(tokenizer, demonstrations(), max_length=64, cache_dir=tmp_path / "cache")


def failures(found: dict[str, tuple[str, str]]) -> set[str]:
    return {check for check, (verdict, _) in found.items() if verdict == "FAIL"}


def letters(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
    return [float(sum(map(ord, response)) % 7) for response in responses]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, {"r": 2, "alpha": 4}])
def test_a_healthy_run_passes(tmp_path: Path, folder: str, adapter: dict[str, int] | None) -> None:
    held = [{**row, "prompt": row["prompt"].replace("name", "say")} for row in preferences(6)]
    found = audit(tmp_path, folder, pairs(tmp_path, val=held), adapter=adapter, reward_from=letters)
    assert not failures(found), found
    assert len(found) == 18
    assert found["tokens are those of the chat template"] == ("ok", "12 conversations")
    assert found["train: responses end with EOS"] == ("ok", "30 of 30 responses end with EOS")
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"monitor": "failed", "failed": 0, "checks": 18}


@pytest.mark.slow
def test_prompts_are_audited_by_the_answers_to_them(tmp_path: Path, folder: str) -> None:
    seen: list[str] = []

    def reward(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        seen.extend(prompts)
        assert all(isinstance(extra["finished"], bool) for extra in metadata)
        return letters(prompts, responses, metadata)

    found = audit(tmp_path, folder, prompts(tmp_path), reward_from=reward)
    assert not failures(found), found
    assert seen[:12] == [row["prompt"] for row in demonstrations(12)]


@pytest.mark.slow
def test_demonstrations_may_be_learned_with_dropout(tmp_path: Path, folder: str) -> None:
    def make(tokenizer: Any) -> Any:
        return DemonstrationData(tokenizer, demonstrations(), max_length=64, cache_dir=tmp_path)

    found = audit(tmp_path, folder, make, load={"dropout": 0.3})
    assert not failures(found), found
    assert "pi / pi_old starts at 1" not in found


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dropout_moves_the_ratio(tmp_path: Path, folder: str) -> None:
    found = audit(tmp_path, folder, pairs(tmp_path), load={"dropout": 0.3})
    assert failures(found) == {"pi / pi_old starts at 1"}
    assert "switch off dropout" in found["pi / pi_old starts at 1"][1]
    assert ", row " in found["pi / pi_old starts at 1"][1]


def test_a_bad_row_ends_the_audit_with_its_place(tmp_path: Path, folder: str) -> None:
    rows = preferences(4)
    rows[2]["rejected"] = rows[2]["chosen"]
    found = audit(tmp_path, folder, pairs(tmp_path, rows))
    assert list(found) == ["every row can be read"]
    assert "row 3: chosen and rejected are identical" in found["every row can be read"][1]


@pytest.mark.slow
def test_answers_that_are_all_cut_never_teach_to_stop(tmp_path: Path, folder: str) -> None:
    prompt = len(pairs(tmp_path)(load_tokenizer(folder)).template.prompt([{"role": "user", "content": "name ruby"}]))
    rows = [
        {"prompt": "name ruby", "chosen": f"{a} red gold", "rejected": f"{b} red gold"}
        for a, b in zip(WORDS[:8], WORDS[8:], strict=True)
    ]
    found = audit(tmp_path, folder, pairs(tmp_path, rows, max_length=prompt + 2))
    assert failures(found) == {"train: responses end with EOS"}
    assert "none of 16 responses ends with EOS" in found["train: responses end with EOS"][1]


@pytest.mark.slow
def test_held_out_rows_that_are_learned_are_named(tmp_path: Path, folder: str) -> None:
    rows = preferences(15)
    found = audit(tmp_path, folder, pairs(tmp_path, rows, [{**rows[3], "chosen": "gold gold"}, rows[4]]))
    assert failures(found) == {"held-out rows are not training rows"}
    assert found["held-out rows are not training rows"][1].endswith(
        "1 of 2 held-out rows are training rows, the first is data.val, row 2"
    )


def test_the_tokenizer_of_another_model(tmp_path: Path, folder: str) -> None:
    texts = [f"{a} {b}" for a in WORDS for b in WORDS] * 3
    other = load_tokenizer(build_tiny(tmp_path / "other", texts, vocab_size=420, hidden_size=32, layers=1, heads=2))
    found = audit(tmp_path, folder, lambda tokenizer: pairs(tmp_path)(other))
    assert list(found)[-1] == "train: token ids fit the model"  # the model cannot even read them
    assert "the tokenizer is not this model's" in found["train: token ids fit the model"][1]


@pytest.mark.slow
def test_rows_that_see_each_other(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that mixes the rows of a batch, as a normalization over the batch would."""
    honest = ModelChecks.load

    def load(self: ModelChecks) -> Any:
        model = honest(self)
        model.get_input_embeddings().register_forward_hook(lambda _, __, out: out + 0.05 * out.mean((0, 1)))
        return model

    monkeypatch.setattr(ModelChecks, "load", load)
    found = failures(audit(tmp_path, folder, pairs(tmp_path)))
    assert "a row does not depend on its neighbours" in found
    assert "the gradient does not depend on how a step is split" in found


@pytest.mark.slow
def test_a_reference_that_is_another_model(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, loaded = ModelChecks.load, []

    def load(self: ModelChecks) -> Any:
        model = honest(self)
        loaded.append(model)
        if len(loaded) == 2:
            with torch.no_grad():
                model.model.norm.weight.mul_(1.1)
        return model

    monkeypatch.setattr(ModelChecks, "load", load)
    assert failures(audit(tmp_path, folder, pairs(tmp_path))) == {"KL(policy, reference) starts at 0"}


@pytest.mark.slow
def test_a_weight_without_a_gradient(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ModelChecks.load

    def load(self: ModelChecks) -> Any:
        model = honest(self)
        model.forgotten = torch.nn.Parameter(torch.zeros(2))
        return model

    monkeypatch.setattr(ModelChecks, "load", load)
    found = audit(tmp_path, folder, pairs(tmp_path))
    assert found["the gradient does not depend on how a step is split"] == (
        "FAIL",
        "the gradient of forgotten is missing",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "check", "detail"),
    [
        (lambda p, r, m: [1.0] * len(r), "rewards are numbers that differ", "all 24 rewards are 1: there is nothing"),
        (
            lambda p, r, m: [float("nan")] * len(r),
            "rewards are numbers that differ",
            "the reward is nan for the response",
        ),
        (lambda p, r, m: list(range(len(r))), "the same text gets the same reward", "the reward of"),
    ],
    ids=["constant", "nan", "by place"],
)
def test_rewards_nothing_can_be_learned_from(tmp_path: Path, folder: str, reward: Any, check: str, detail: str) -> None:
    found = audit(tmp_path, folder, pairs(tmp_path), reward_from=reward)
    assert check in failures(found)
    assert found[check][1].startswith(detail)


@pytest.mark.slow
def test_notes_are_no_failures(tmp_path: Path, folder: str) -> None:
    """A label that length gives away, a reward that is the length, and rows that were left out."""
    rows = [{"prompt": f"name {w}", "chosen": f"{w} red blue", "rejected": w} for w in WORDS]
    found = audit(
        tmp_path,
        folder,
        pairs(tmp_path, [*rows, {"prompt": "x"}], on_bad_row="skip"),
        reward_from=lambda p, r, m: [float(len(x)) for x in r],
    )
    assert not failures(found)
    notes = {check: detail for check, (verdict, detail) in found.items() if verdict == "note"}
    assert notes["every row can be read"] == "16 train rows; 1 bad ones are left out (data.on_bad_row=skip)"
    assert notes["length does not tell which is chosen"].startswith(
        "the best response is longer than the worst in 100%"
    )
    assert "correlation with length 1.00" in notes["rewards are numbers that differ"]


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_said_of_length_is_so(tmp_path: Path, folder: str, sign: int) -> None:
    """11 of 16 best responses are longer and 2 as long: 12 of 16, of which Wilson's interval is [0.505, 0.898]."""
    sizes = [(2, 1)] * 11 + [(1, 1)] * 2 + [(1, 2)] * 3
    rows = [
        {"prompt": f"name {w}", "chosen": "!" * a, "rejected": "?" * b}  # a token each
        for w, (a, b) in zip(WORDS, sizes, strict=True)
    ]
    found = audit(tmp_path, folder, pairs(tmp_path, rows), reward_from=lambda p, r, m: [sign * len(x) for x in r])
    assert found["length does not tell which is chosen"] == (
        "ok",
        "the best response is longer than the worst in 75% [51%, 90%]",
    )
    assert found["rewards are numbers that differ"][1].endswith(f"correlation with length {sign}.00")


@pytest.mark.slow
def test_rows_that_differ_from_the_chat_template_fail(tmp_path: Path, folder: str) -> None:
    """With this template "say" in front of the answer is joined with the prompt's last word where a space follows."""
    check = "tokens are those of the chat template"

    def written(end: str, rows: list[dict[str, str]]) -> tuple[str, str]:
        def make(tokenizer: Any) -> Any:
            tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}" + end
            return PreferenceData(tokenizer, rows, max_length=64, cache_dir=tmp_path / "cache")

        return audit(tmp_path, folder, make)[check]

    assert written("", preferences(3)) == (
        "FAIL",
        f"3 of 3 rows of data.train: {JOINED}; the first is data.train, row 1",
    )
    spelled = [{"prompt": "name ruby", "chosen": "a<|eos|>", "rejected": "b"}, *preferences(2)]
    found = audit(tmp_path, folder, pairs(tmp_path, spelled))[check]
    assert found == ("note", f"1 of 3 rows of data.train: {SPELLED}; the first is data.train, row 1")


@pytest.mark.slow
def test_the_audit_computes_the_tokens_itself(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Template.completions

    def other(self: Template, *arguments: Any) -> Any:
        prompt, answers, differs = honest(self, *arguments)
        return prompt, [[5, *answer[1:]] for answer in answers], differs

    monkeypatch.setattr(Template, "completions", other)
    found = audit(tmp_path, folder, pairs(tmp_path))
    assert found["tokens are those of the chat template"] == (
        "FAIL",
        "row 1: the tokens are not those of apply_chat_template",
    )
