"""The command as a person uses it: what it prints, how it ends, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from rlhf_lightning.__main__ import normalize
from rlhf_lightning.runtime.explain import explain
from rlhf_lightning.runtime.run_folder import reserve
from tests.helpers.cli import SMALL, newest, rlhf

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cli")]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny data set and an SFT model trained on it for two updates."""
    folder = tmp_path_factory.mktemp("cli")
    rows = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"No, {i + 1}!"} for i in range(16)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rlhf(folder, "stage=sft", "data=preferences/jsonl", "data.train=pairs.jsonl", "max_steps=2", "name=start", *SMALL)
    return folder


@pytest.fixture(scope="module")
def sft(pairs: Path) -> str:
    return str(newest(pairs, "sft") / "model")


def test_every_stage_runs_and_leaves_its_folder(pairs: Path, sft: str) -> None:
    data = ["data.train=pairs.jsonl", "data.val=pairs.jsonl", "data.batch_size=8", "max_steps=2"]
    rlhf(pairs, "stage=reward", f"init_from={sft}", *data)
    reward = str(newest(pairs, "reward") / "model")
    rlhf(
        pairs,
        "stage=dpo",
        f"init_from={sft}",
        *data,
        "dpo.beta=0.2",
        "adapter=lora",
        "trainer.accumulate_grad_batches=2",
    )
    rlhf(pairs, "stage=dpo", f"init_from={sft}", *data, "dpo.reference=cached", "name=cached")
    for stage in ("ppo", "rloo", "grpo"):
        options = [f"{stage}.max_new_tokens=4", "data.ptx=pairs.jsonl", f"{stage}.ptx_coef=0.1"]
        rlhf(pairs, f"stage={stage}", f"init_from={sft}", f"reward_from={reward}", *data, *options)
    options = [f"reward_from={reward}", "online_dpo.max_new_tokens=4", "adapter=lora"]
    rlhf(pairs, "stage=online_dpo", f"init_from={sft}", *data, *options)
    losses = (newest(pairs, "ppo") / "metrics.json").read_text()
    assert json.loads(losses)["optim/critic_lr"] < 1e-5  # critic=auto: the reward model has the same tokenizer
    rlhf(
        pairs, "stage=evaluate", f"init_from={sft}", f"reward_from={reward}", "data.train=pairs.jsonl",
        "evaluate.max_new_tokens=4",
    )  # fmt: skip
    for stage in ("reward", "dpo", "ppo", "rloo", "grpo", "online_dpo"):
        run = newest(pairs, stage)
        manifest = json.loads((run / "model" / "manifest.json").read_text())
        metrics = json.loads((run / "metrics.json").read_text())
        assert manifest["stage"] == stage
        assert manifest["parents"][0]["folder"] == sft
        assert len(manifest["parents"][0]["weights"]) == 64
        assert metrics["perf/rows_per_s"] > 0
        assert metrics["perf/peak_memory_gb"] > 0
        assert metrics["monitor"] in metrics
        assert metrics["global_step"] == (2 if stage not in ("ppo",) else 4)
        assert list((run / "tensorboard").glob("events*"))
    done = rlhf(pairs, "stage=audit", f"init_from={sft}", f"reward_from={reward}", "data.train=pairs.jsonl")
    assert "FAIL" not in done.stdout
    assert "ok    every row can be read: 16 train rows" in done.stdout
    done = rlhf(pairs, "stage=audit", f"init_from={sft}", *data, "data=prompts/jsonl", "model.load.dropout=0.5", code=2)
    assert "FAIL  pi / pi_old starts at 1: " in done.stdout
    assert "FAIL  held-out rows are not training rows: 16 of 16" in done.stdout
    assert done.stderr == "rlhf: 2 of 10 checks failed: see the lines marked FAIL\n"
    metrics = json.loads((newest(pairs, "evaluate") / "metrics.json").read_text())
    assert {"reward", "kl", "length", "reward_low", "perf/rows_per_s"} <= metrics.keys()
    assert metrics["kl"] == 0.0  # the model against itself


def test_exports_open_with_plain_transformers(pairs: Path, sft: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    rlhf(pairs, "stage=reward", f"init_from={sft}", "data.train=pairs.jsonl", "max_steps=1", "name=opened")
    AutoModelForCausalLM.from_pretrained(sft)
    model = AutoModelForSequenceClassification.from_pretrained(newest(pairs, "reward") / "model")
    assert model.config.num_labels == 1
    assert model.config.reward_std > 0
    assert AutoTokenizer.from_pretrained(sft).chat_template


@pytest.mark.parametrize("template", ["chatml", "human_assistant"])
def test_a_base_model_exports_the_template_it_learned(pairs: Path, sft: str, template: str) -> None:
    """Its reward is that of `apply_chat_template`, and what ends a turn is EOS wherever programs look for it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rlhf_lightning.data.template import Template
    from rlhf_lightning.rewards.folder import FolderReward

    data = ["data.train=pairs.jsonl", f"data.template={template}", "max_steps=1", f"name={template}"]
    rlhf(pairs, "stage=reward", f"init_from={sft}", *data)
    folder = str(next((pairs / "outputs" / "reward" / template).iterdir()) / "model")
    tokenizer, reward = AutoTokenizer.from_pretrained(folder), FolderReward(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    learned = Template(AutoTokenizer.from_pretrained(sft), template)
    assert tokenizer.chat_template == learned.exported
    assert [tokenizer.eos_token_id] == learned.ends == [model.config.eos_token_id]
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "two words"}]
    for history in ([], talk):
        turns = [*history, {"role": "user", "content": "say red"}]
        ids = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": "a red"}], return_tensors="pt", return_dict=True
        )
        raw = model(**ids).logits.item()
        found = reward(["say red"], ["a red"], [{"messages": turns}]).item()
        assert found == pytest.approx((raw - model.config.reward_mean) / model.config.reward_std, abs=1e-5)


def test_resume_auto_continues_and_recognizes_what_is_done(pairs: Path, sft: str) -> None:
    command = [
        "stage=dpo",
        f"init_from={sft}",
        "data.train=pairs.jsonl",
        "data.batch_size=4",
        "name=resumed",
        "resume=auto",
    ]
    rlhf(pairs, *command, "max_steps=3")
    again = rlhf(pairs, *command, "max_steps=3")
    assert "already done" in again.stdout
    assert len(list((pairs / "outputs" / "dpo" / "resumed").iterdir())) == 1
    folder = next((pairs / "outputs" / "dpo" / "resumed").iterdir())
    other = rlhf(pairs, *command, "max_steps=4", f"hydra.run.dir={folder}", code=2)
    assert "another configuration" in other.stderr
    held = rlhf(pairs, *command[:-1], "max_steps=3", f"hydra.run.dir={folder}", code=2)
    assert "add resume=auto" in held.stderr


def test_resume_auto_sees_another_reward_function(pairs: Path, sft: str) -> None:
    command = [
        "stage=ppo", f"init_from={sft}", "data.train=pairs.jsonl", "reward_from=rater:rate", "max_steps=1", "name=judged",
        "ppo.max_new_tokens=4", "resume=auto",
    ]  # fmt: skip
    (pairs / "rater.py").write_text("def rate(prompts, *rest):\n    return [0.0] * len(prompts)\n")
    rlhf(pairs, *command)
    assert "already done" in rlhf(pairs, *command).stdout
    (pairs / "rater.py").write_text("def rate(prompts, *rest):\n    return [1.0] * len(prompts)\n")
    assert "already done" not in rlhf(pairs, *command).stdout


def test_resume_auto_sees_other_data_and_removes_nothing_of_the_users(pairs: Path, sft: str, tmp_path: Path) -> None:
    rows = (pairs / "pairs.jsonl").read_text().splitlines(keepends=True)
    (pairs / "grows.jsonl").write_text("".join(rows[:8]))
    command = ["stage=dpo", f"init_from={sft}", "data.train=grows.jsonl", "max_steps=1", "resume=auto"]
    old, new = tmp_path / "runs" / "old", tmp_path / "runs" / "new"
    rlhf(pairs, *command, f"hydra.run.dir={old}", "callbacks.checkpoint.every_n_steps=0")
    new.mkdir()
    (new / "notes.txt").write_text("mine")
    assert f"already done: {old}" in rlhf(pairs, *command, f"hydra.run.dir={new}").stdout.replace("\n", "")
    assert [path.name for path in new.iterdir()] == ["notes.txt"]
    (pairs / "grows.jsonl").write_text("".join(rows))
    assert "already done" not in rlhf(pairs, *command, f"hydra.run.dir={new}").stdout
    other = rlhf(pairs, "stage=sft", f"init_from={sft}", "data.train=grows.jsonl", f"resume={old}", code=2)
    assert "there is no checkpoint" in other.stderr


def test_a_manifest_names_every_parent(pairs: Path, sft: str) -> None:
    (pairs / "length_reward.py").write_text("def length(p, responses, m):\n    return [len(r) for r in responses]\n")
    rlhf(pairs, "stage=reward", f"init_from={sft}", "data.train=pairs.jsonl", "max_steps=1", "name=parent")
    reward = str(next((pairs / "outputs" / "reward" / "parent").iterdir()) / "model")
    rlhf(
        pairs, "stage=ppo", f"model={sft}", f"reward_from=[{reward},length_reward:length]", "data.train=pairs.jsonl",
        "ppo.max_new_tokens=2", "max_steps=1", "name=child",
    )  # fmt: skip
    manifest = next((pairs / "outputs" / "ppo" / "child").iterdir()) / "model" / "manifest.json"
    parents = json.loads(manifest.read_text())["parents"]
    assert [(parent["role"], parent["folder"]) for parent in parents] == [("init", sft), ("reward", reward)]
    assert all(len(parent["weights"]) == 64 for parent in parents)


MISTAKES = {
    "nothing": ([], "usage: rlhf stage="),
    "stage": (["stage=dop"], "Did you mean 'dpo'"),
    "key": (["stage=dpo", "data.train=x", "dpo.bta=1"], "no key dpo.bta. Did you mean 'beta'"),
    "required": (["stage=sft"], "data.train: a value is needed"),
    "experiment": (["experiment=sft_word"], "Did you mean 'sft_world'"),
    "file": (["stage=sft", "data.train=pars.jsonl"], "Did you mean 'pairs.jsonl'"),
    "empty": (["stage=sft", "data.train=empty.jsonl"], "it is empty"),
    "row": (["stage=sft", "data.train=bad.jsonl"], "bad.jsonl, row 2: response is empty"),
    "type": (["stage=sft", "data.train=pairs.jsonl", "max_steps=many"], "max_steps='many' is not a number"),
    "choice": (["stage=dpo", "data.train=pairs.jsonl", "dpo.loss=sigmid"], "Did you mean 'sigmoid'"),
    "model": (["stage=sft", "data.train=pairs.jsonl", "init_from=./nowhere"], "no model folder ./nowhere"),
    "not a model": (["stage=sft", "data.train=pairs.jsonl", "init_from=outputs"], "not a model folder: it has no config.json"),
    "hub": (["stage=sft", "data.train=pairs.jsonl", "model=nobody/nothing"], "neither a local folder nor available from the hub"),
    "target": (["stage=sft", "data.train=pairs.jsonl", "optimizer._target_=torch.load"], "not an allowed target"),
    "reward": (["stage=ppo", "data.train=pairs.jsonl", "init_from={sft}"], "reward_from is needed"),
    "function": (["stage=ppo", "data.train=pairs.jsonl", "init_from={sft}", "reward_from=json:dump_s"], "json has no dump_s"),
    "adapter": (["stage=dpo", "data.train=pairs.jsonl", "dpo.reference=adapter_off"], "needs a LoRA adapter"),
    "context": (["stage=sft", "data.train=pairs.jsonl", "data.max_length=3"], "leaves no room within data.max_length=3"),
    "nan": (["stage=sft", "data.train=pairs.jsonl", "optimizer.lr=1e30", "max_steps=9", "max_epochs=9"], "optimizer.lr"),
    "surrogate": (["stage=sft", "data.train=odd.jsonl"], "odd.jsonl, row 1: response contains a lone surrogate"),
    "parquet": (["stage=sft", "data.train=broken.parquet"], "broken.parquet: cannot be read"),
    "json": (["stage=sft", "data.train=five.json"], "five.json, row 1: the file holds int, not a list of rows"),
    "longer than the model reads": (["stage=sft", "data.train=long.jsonl", "init_from={sft}"], "long.jsonl, row 1: the prompt leaves no room within data.max_length=512"),
    "no steps": (["stage=sft", "data.train=pairs.jsonl", "max_steps=0"], "max_steps=0 must not be 0"),
    "rate": (["stage=sft", "data.train=pairs.jsonl", "optimizer.lr=-1"], "optimizer: Invalid learning rate: -1"),
    "heads": (["stage=sft", "data.train=pairs.jsonl", "model.build.heads=3"], "is not a multiple of 2 x model.build.heads=3"),
    "mix": (["stage=ppo", "data.train=pairs.jsonl", "init_from={sft}", "reward_from=json:dumps", "ppo.ptx_coef=1"], "ppo.ptx_coef needs demonstrations: data.ptx=<file>"),
    "mix file": (["stage=ppo", "data.train=pairs.jsonl", "init_from={sft}", "reward_from=json:dumps", "data.ptx=none.jsonl"], "data.ptx: there is no file none.jsonl"),
    "reward code": (["stage=ppo", "data.train=pairs.jsonl", "init_from={sft}", "reward_from=json:dumps"], "the reward failed at"),
    "reward run folder": (["stage=ppo", "data.train=pairs.jsonl", "init_from={sft}", "reward_from={run}"], "Did you mean"),
    "other stage": (["stage=sft", "dpo.beta=1"], "there is no key dpo.beta: nothing here has dpo.*. It belongs to stage=dpo"),
    "other group": (["stage=sft", "adapter.r=4"], "choose adapter= one of lora"),
    "new key": (["stage=evaluate", "evaluate.models.a=x"], "add it with +evaluate.models.a=<value>"),
    "place": (["stage=sft", "on_bad_row=skip"], "Did you mean 'data.on_bad_row'?"),
    "root": (["pipeline=hh", "model=smollm2"], "data_root: a value is needed"),
    "half": (["stage=sft", "data.train=pairs.jsonl", "trainer.precision=16-mixed"], "use bf16-mixed"),
    "critic": (["stage=ppo", "data.train=pairs.jsonl", "init_from={sft}", "reward_from=json:dumps", "ppo.critic=rewards"], "Did you mean 'reward'?"),
    "top_p": (["stage=grpo", "data.train=pairs.jsonl", "init_from={sft}", "reward_from=json:dumps", "sampler.top_p=0.9"], "sampler.top_p=0.9: the log-probabilities in KL and ratio are those of the whole distribution"),
    "ratio": (["stage=rloo", "data.train=pairs.jsonl", "init_from={sft}", "reward_from=json:dumps", "rloo.clip_low=1.5"], "rloo.clip_low=1.5 is not a finite number in [0, 1)"),
    "kl target": (["stage=ppo", "data.train=pairs.jsonl", "init_from={sft}", "reward_from=json:dumps", "ppo.kl_target=.inf"], "ppo.kl_target=.inf is not a finite number in (0, inf)"),
    "no tokens": (["stage=evaluate", "data.train=pairs.jsonl", "init_from={sft}", "evaluate.max_new_tokens=0"], "evaluate.max_new_tokens=0 is not a whole number in [1, inf)"),
    "clip": (["stage=ppo", "data.train=pairs.jsonl", "init_from={sft}", "reward_from=json:dumps", "trainer.gradient_clip_val=1"],
             "max_grad_norm"),
    "no groups": (["stage=ppo", "data.train=pairs.jsonl", "init_from={sft}", "reward_from=json:dumps", "reward_groups=worst"], "reward_from=json:dumps has no groups"),
    "weights": (["stage=ppo", "data.train=pairs.jsonl", "init_from={sft}", "reward_from={a:json:dumps,bc:json:dumps}", "reward_groups={bd:1}"], "reward_groups.bd: the reward has the groups a, bc. Did you mean 'bc'?"),
    "group of the world": (["stage=ppo", "data.train=pairs.jsonl", "init_from={sft}", "reward_from=world:cautius"], "Did you mean 'cautious'?"),
    "groups of rows": (["stage=reward", "data.train=pairs.jsonl", "reward.groups=auto"], "reward.groups=auto: no row of pairs.jsonl has a column group"),
    "auto": (["stage=reward", "data.train=pairs.jsonl", "reward.groups=aut"], "reward.groups=aut is not null, auto or a list of names. Did you mean 'auto'?"),
    "names": (["stage=reward", "data.train=pairs.jsonl", "reward.groups=[worst,a]"], "none of mean, worst, low, high"),
    "not of the world": (["stage=simulate", "data.train=pairs.jsonl"], "pairs.jsonl, row 1 has no list of responses to compare"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_readable_line(name: str, pairs: Path, sft: str) -> None:
    arguments, expected = MISTAKES[name]
    (pairs / "empty.jsonl").write_text("")
    (pairs / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": " "}\n')
    (pairs / "odd.jsonl").write_text('{"prompt": "a", "response": "\\ud800"}\n')
    (pairs / "broken.parquet").write_bytes(b"PAR1 not really")
    (pairs / "five.json").write_text("5")
    (pairs / "long.jsonl").write_text(json.dumps({"prompt": "many words " * 600, "response": "b"}) + "\n")
    small = SMALL if name not in ("nothing", "stage", "hub", "experiment", "heads", "root") else []
    places = {"{sft}": sft, "{run}": str(Path(sft).parent)}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    done = rlhf(pairs, *arguments, *(small if arguments else []), code=2)
    assert expected in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) <= 6, done.stderr


def test_a_fork_of_the_tests_is_a_process_of_its_own(pairs: Path) -> None:
    """What most tests run, a fork of a process that has imported everything, beside the command as users start it."""
    command = ["stage=sft", "data=preferences/jsonl", "data.val=pairs.jsonl", "max_steps=2", *SMALL]
    forks = {"fork": True, "interpreter": False}
    for wrong, code in (([], 0), (["max_steps=many"], 2)):
        done = [
            rlhf(pairs, *command, "data.train=pairs.jsonl", f"name={name}", *wrong, code=code, fork=fork)
            for name, fork in forks.items()
        ]
        assert done[0].stderr == done[1].stderr
        assert [len(text.stdout.splitlines()) for text in done] == [len(done[0].stdout.splitlines())] * 2
    runs = [min((pairs / "outputs" / "sft" / name).iterdir()) for name in forks]
    files = [{str(path.relative_to(run)) for path in run.rglob("*") if "events" not in path.name} for run in runs]
    assert files[0] == files[1]
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]


def test_model_names_are_short_for_the_hub_option() -> None:
    once = normalize(["stage=sft", "model=./a b", "data.train=x"])
    assert once == ["stage=sft", "model=hub", "model.name='./a b'", "data.train=x"]
    assert normalize(once) == once
    assert normalize(["model=smollm2"]) == ["model=smollm2"]


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("init_from=./lr=1e-4/m", "./lr=1e-4/m"),
        ("init_from=./Ünïcode/m", "./Ünïcode/m"),
        ("init_from=a (b) {d} & # 'g'", "a (b) {d} & # 'g'"),
        ("model=./x=1/it's", "./x=1/it's"),
        ("+data.columns.prompt=Frage=ü", "Frage=ü"),
        ("name=plain", "plain"),
        ("max_steps=3", 3),
        ("data.train=[a,b]", ["a", "b"]),
    ],
)
def test_values_that_hydra_does_not_read_are_quoted(given: str, value: object) -> None:
    once = normalize([given])
    assert normalize(once) == once
    assert OverridesParser.create().parse_override(once[-1]).value() == value


def test_a_sweep_over_such_values_has_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, swept = normalize(["-m", "init_from=./lr=1/m,./lr=2/m,./m"])
    assert swept == "init_from='./lr=1/m','./lr=2/m',./m"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    assert normalize(["init_from=a,b"]) == ["init_from='a,b'"]  # a folder of this name
    assert normalize(["init_from=a,c"]) == ["init_from=a,c"]
    assert normalize(["logger=null", "debug=null"]) == ["~logger"]


def test_a_list_that_cannot_be_read_is_shown_quoted() -> None:
    with pytest.raises(OverrideParseException) as raised:
        OverridesParser.create().parse_overrides(["data.train=[a=1,b]"])
    assert "\"data.train=['a=1','b']\"" in explain(raised.value, [])


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    settings = {"run_id": "now", "hydra": {"run": {"dir": f"{tmp_path}/sft/${{run_id}}"}}}
    names = [reserve(OmegaConf.create(settings)) for _ in range(3)]
    assert names == ["now", "now_2", "now_3"]
    assert {place.name for place in (tmp_path / "sft").iterdir()} == set(names)
    fixed = OmegaConf.create({"run_id": "now", "hydra": {"run": {"dir": f"{tmp_path}/sft/now"}}})
    reserve(fixed)  # the user's folder, which `claim` judges


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [(["--help"], "experiment: "), (["stage=dpo", "--cfg", "job", "--resolve"], "sft_coef: 0.0"), ([], "usage: rlhf ")],
)
def test_what_only_shows_something_imports_nothing_heavy(arguments: list[str], shown: str, tmp_path: Path) -> None:
    heavy = {"torch", "transformers", "lightning", "numpy", "pandas", "pyarrow", "datasets", "tensorboard"}
    code = (
        "import atexit, sys; from rlhf_lightning.__main__ import main\n"
        f"atexit.register(lambda: print('imported', sorted({heavy} & set(sys.modules))))\n"
        f"sys.argv = {['rlhf', *arguments]}; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True)
    assert shown in done.stdout + done.stderr
    assert done.stdout.endswith("imported []\n"), done.stdout[-500:]
