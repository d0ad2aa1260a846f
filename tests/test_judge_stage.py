"""`stage=judge` and `reward_from=judge:<judge>` as commands, with a server on loopback and a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.runtime.composition import judge_of_command
from rlhf_lightning.runtime.pipeline import content_digests, stage_values
from tests.helpers.cli import SMALL, environment, fork_server, newest, rlhf
from tests.helpers.openai_server import Sent, completion, openai_server
from tests.judges.models import shown

KEY = "sk-do-not-print-me-anywhere"
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]


def preferences(n: int) -> list[dict[str, Any]]:
    """Return pairs in which the response with "good" is chosen."""
    return [
        {
            "id": str(i),
            "prompt": f"Question {i}, {WORDS[i % 6]}?",
            "chosen": f"good {WORDS[i % 5]}",
            "rejected": f"bad {WORDS[i % 4]}",
        }
        for i in range(n)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prefers_good(body: Any, number: int) -> Any:
    text = body["messages"][0]["content"]
    if len(shown(text)) == 1:
        return completion("5" if "good" in shown(text)[0] else "2")
    return completion("A" if "good" in shown(text)[0] else "B")


def run(tmp_path: Path, url: str, *more: str, **options: Any) -> Any:
    return rlhf(tmp_path, "stage=judge", "judge=server", "judge.model=m", f"judge.base_url={url}", "judge.retries=0",
                "data.train=pairs.jsonl", *more, **options)  # fmt: skip


@pytest.mark.slow
@patch.dict(os.environ, OPENAI_API_KEY=KEY)
def test_labels_train_and_the_key_is_nowhere(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", preferences(12))
    with openai_server(prefers_good) as server:
        done = run(tmp_path, server.url, "judge.soft_labels=true", "judge.calibrate=temperature",
                   "judge.price_per_million={input: 1.0, output: 2.0}", "judge.constitution=[Be good.]", "logger=csv")  # fmt: skip
        assert server.seen[0][1] == f"Bearer {KEY}"
    folder = newest(tmp_path, "judge")
    labels, metrics = read(folder / "labels.jsonl"), json.loads((folder / "metrics.json").read_text())
    assert [label["id"] for label in labels] == [str(i) for i in range(12)]
    assert all(label["ranking"][[("good" in r) for r in label["responses"]].index(True)] == 0 for label in labels)
    assert {label["annotator"] for label in labels} == {"m"}
    assert {label["principle"] for label in labels} == {"principle-1"}
    assert (metrics["accuracy"], metrics["flips"], metrics["judged"], metrics["failed"]) == (1.0, 0.0, 12, 0)
    assert metrics["cost"] == pytest.approx(24 * (10 * 1.0 + 1 * 2.0) / 1e6)
    assert "agrees with the labels of the rows" in done.stdout
    rlhf(tmp_path, "stage=agreement", f"data.train={folder / 'labels.jsonl'}", "agreement.bootstrap=10")
    rlhf(tmp_path, "stage=aggregate", f"data.train={folder / 'labels.jsonl'}")
    rlhf(tmp_path, "stage=reward", f"data.train={folder / 'labels.jsonl'}", "max_steps=1", *SMALL)
    rlhf(tmp_path, "stage=dpo", f"data.train={folder / 'preferences.jsonl'}", "max_steps=1", *SMALL)
    everything = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"base_url" in everything
    assert KEY.encode() not in everything + done.stdout.encode() + done.stderr.encode()


@pytest.mark.slow
def test_failures_are_recorded_and_the_rest_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", preferences(8))

    def answer(body: Any, number: int) -> Any:
        text = body["messages"][0]["content"]
        if "gamma?" in text:
            return completion("I'm sorry, I cannot.")
        return Sent(b"oops", 500) if "delta?" in text else prefers_good(body, number)

    with openai_server(answer) as server:
        done = run(tmp_path, server.url)
        folder = newest(tmp_path, "judge")
        failed = run(tmp_path, server.url, "judge.on_failure=error", "name=strict", "judge.cache=null", code=2)
    assert [label["id"] for label in read(folder / "labels.jsonl")] == ["0", "1", "4", "5", "6", "7"]
    failures = {row["id"]: row for row in read(folder / "failures.jsonl")}
    assert failures["2"]["failure"] == "refusal"
    assert failures["2"]["answers"][0]["text"] == "I'm sorry, I cannot."
    assert "answered 500" in failures["3"]["failure"]
    assert "4 of 16 questions got no verdict; failures.jsonl says why" in done.stdout
    assert "gave no verdict on" in failed.stderr
    assert failed.stderr.count("\n") <= 2


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    """SIGTERM ends with 143 and keeps what was judged; resume=auto judges the rest, and asks nothing twice."""
    write(tmp_path / "pairs.jsonl", preferences(20))

    def slowly(body: Any, number: int) -> Any:
        time.sleep(0.05)
        return prefers_good(body, number)

    with openai_server(slowly) as server:
        arguments = ["stage=judge", "judge=server", "judge.model=m", f"judge.base_url={server.url}", "judge.concurrency=1",
                     "judge.method=generate", "data.train=pairs.jsonl", "judge.cache=null"]  # fmt: skip
        out = (tmp_path / "out").open("w")
        started = fork_server().start(arguments, tmp_path, environment(tmp_path), out, out)
        while (
            not (parts := [*(tmp_path / "outputs").rglob("labels.part.jsonl")]) or parts[0].read_text().count("\n") < 3
        ):
            time.sleep(0.01)
        started.send_signal(signal.SIGTERM)
        assert started.wait() == 143
        out.close()
        kept = len(read(parts[0]))
        assert 3 <= kept < 20
        with parts[0].open("a") as file:
            file.write('{"id": "19", "torn')
        before = len(server.seen)
        rlhf(tmp_path, *arguments, "resume=auto")
        assert len(server.seen) - before == 2 * (20 - kept)
    folder = newest(tmp_path, "judge")
    assert folder == parts[0].parent
    assert len(read(folder / "labels.jsonl")) == 20
    assert not parts[0].exists()
    assert "interrupted; add resume=auto" in (tmp_path / "out").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no judge is chosen: judge= one of local, server, world, many"),
        (["judge=sever"], "judge=sever is not one of: local, many, server, world. Did you mean 'server'?"),
        (["judge=server", "judge.base_url=http://127.0.0.1:9/v1"], "judge.model: a value is needed"),
        (
            ["judge=server", "judge.model=m", "judge.base_url=http://127.0.0.1:9/v1", "judge.retries=0"],
            "127.0.0.1:9/v1 cannot be used",
        ),
        (["judge=server", "judge.model=m", "judge.base_url=ftp://x"], "judge.base_url=ftp://x is not a URL"),
        (["judge=local", "judge.model=./nothing"], "there is no model folder"),
        (["judge=world", "judge.mode=pairs"], "judge.mode=pairs is not one of pairwise"),
        (["judge=world", "judge.calibrate=platt"], "judge.calibrate=platt is not one of none, temperature"),
        (["judge=world"], "is no row of the built-in world"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    write(tmp_path / "pairs.jsonl", preferences(2))
    done = rlhf(tmp_path, "stage=judge", "data.train=pairs.jsonl", *arguments, code=2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny(
        tmp_path_factory.mktemp("judge") / "model", ["A B good bad 1 2 3 4 5"], vocab_size=300, hidden_size=16, layers=1,
        heads=2, max_length=512,
    )  # fmt: skip


@pytest.mark.slow
def test_a_stage_of_a_pipeline_depends_on_the_weights_of_its_judge(tmp_path: Path, judge_folder: str) -> None:
    copy = shutil.copytree(judge_folder, tmp_path / "copy")
    same = content_digests({"judge.model": judge_folder})
    assert content_digests({"judge.members.a.model": str(copy)}) == same != content_digests({})
    (copy / "model.safetensors").write_bytes(b"other weights")
    (copy / "manifest.json").unlink(missing_ok=True)
    assert content_digests({"judge.model": str(copy)}) != same


@pytest.mark.slow
def test_a_local_judge_as_a_reward(tmp_path: Path, judge_folder: str) -> None:
    """The command chooses the settings by itself; another model of the judge is another run."""
    write(tmp_path / "pairs.jsonl", preferences(4))
    rlhf(tmp_path, "stage=sft", "data.train=pairs.jsonl", "max_steps=1", *SMALL)
    start = newest(tmp_path, "sft") / "model"
    candidates = ["stage=candidates", f"init_from={start}", "data.train=pairs.jsonl", "candidates.max_new_tokens=4",
                  "reward_from=judge:local", f"judge.model={judge_folder}"]  # fmt: skip
    rlhf(tmp_path, *candidates)
    rows = read(newest(tmp_path, "candidates") / "candidates.jsonl")
    assert all(1 <= value <= 5 for row in rows for value in row["scores"])
    assert "already done" in rlhf(tmp_path, *candidates, "resume=auto", "judge.batch_tokens=512").stdout
    assert "already done" not in rlhf(tmp_path, *candidates, "resume=auto", "judge.rubric=how short it is").stdout
    ppo = ["stage=grpo", f"init_from={start}", "data=prompts/jsonl", "data.train=pairs.jsonl", "max_steps=1", "data.batch_size=2",
           "grpo.num_generations=2", "grpo.max_new_tokens=4", f"judge.model={judge_folder}"]  # fmt: skip
    rlhf(tmp_path, *ppo, "reward_from=judge:local")
    manifest = json.loads((newest(tmp_path, "grpo") / "model" / "manifest.json").read_text())
    assert [parent["role"] for parent in manifest["parents"]] == ["init", "judge"]
    rlhf(tmp_path, *ppo, "reward_from=[judge:local,tests.helpers.rewards:nothing]", code=2)
    failed = rlhf(tmp_path, *ppo, "reward_from=judge:locale", code=2)
    assert (
        "judge:locale is no judge: local, many, server, world. Did you mean 'local'? A reward of yours" in failed.stderr
    )


@pytest.mark.slow
def test_the_world_s_judge_scores_in_evaluate_and_pipelines(tmp_path: Path) -> None:
    rlhf(tmp_path, "stage=sft", "data=world", "max_steps=1", "data.train_rows=16", "data.val_rows=8", *SMALL)
    start = newest(tmp_path, "sft") / "model"
    rlhf(tmp_path, "stage=evaluate", f"init_from={start}", "data=world", "evaluate.rows=4", "reward_from=judge:world",
         "gold_from=world", "evaluate.max_new_tokens=4")  # fmt: skip
    metrics = json.loads((newest(tmp_path, "evaluate") / "metrics.json").read_text())
    assert any("reward" in name for name in metrics)


def test_the_reward_on_the_command_line_chooses_the_judge() -> None:
    assert judge_of_command(["stage=ppo", "reward_from=judge:server", "judge.model=m"]) == ["judge=server"]
    assert judge_of_command(["stage=evaluate", "gold_from=[world,judge:local]"]) == ["judge=local"]
    assert judge_of_command(["reward_from={a: judge:local, b: world}"]) == ["judge=local"]
    assert judge_of_command(["reward_from=judge:many", "+judge@judge.members.third=world"]) == ["judge=many"]
    assert judge_of_command(["reward_from=judge:server", "judge=server"]) == []
    assert judge_of_command(["stage=ppo", "reward_from=world"]) == []


@pytest.mark.slow
def test_the_reward_of_a_file_chooses_the_judge(tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    experiment = tmp_path / "conf" / "experiment" / "mine.yaml"
    experiment.write_text("# @package _global_\nreward_from: judge:world\n")
    show = ["stage=ppo", "experiment=mine", "--config-dir=conf", "--cfg", "job", "--package", "judge"]
    assert "kind: world" in rlhf(tmp_path, *show).stdout
    assert "another judge than judge=local" in rlhf(tmp_path, "judge=local", "judge.model=m", *show, code=2).stderr
    experiment.write_text("# @package _global_\nreward_from: [judge:world, judge:local]\n")
    assert "name several judges, local, world" in rlhf(tmp_path, *show, code=2).stderr


def test_a_pipeline_may_not_say_where_the_key_is_sent() -> None:
    for key in ("judge.base_url", "judge.members.a.base_url", "label.base_url"):
        with pytest.raises(UserError, match=f"{key} is taken from the command line only"):
            stage_values({"set": {key: "http://evil/v1"}}, {})


@pytest.mark.slow
def test_no_file_says_where_the_key_is_sent(tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    for settings in ("judge:\n  base_url: http://evil\n", "judge:\n  members:\n    a: {base_url: http://evil}\n"):
        (tmp_path / "conf" / "experiment" / "bad.yaml").write_text(f"# @package _global_\n{settings}")
        done = rlhf(tmp_path, "--config-dir=conf", "stage=judge", "judge=server", "judge.model=m", "experiment=bad",
                    "data.train=pairs.jsonl", code=2)  # fmt: skip
        assert "base_url is taken from the command line only" in done.stderr
