"""What docs/lightning.md says about Lightning's Trainer and callbacks holds, for the command and in a notebook."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    SpikeDetection,
)
from lightning.pytorch.tuner.tuning import Tuner

from rlhf_lightning import PPO, SFT, DemonstrationData, PromptData
from rlhf_lightning.callbacks.checkpoints import AtomicCheckpointIO, RandomState, StepCheckpoint, read_checkpoint
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.modules.schedules import schedule
from tests.helpers.cli import SMALL, rlhf
from tests.helpers.compose import composed
from tests.helpers.lightning import quiet_lightning
from tests.modules.offline import demonstrations, sgd, start

PAGE = Path(__file__).parents[1] / "docs" / "lightning.md"
FLAGS = re.findall(r"^\| `([^`]*)` \| (works|refused: )(.*) \|$", PAGE.read_text(), re.M)
ROWS = "".join(json.dumps({"prompt": f"Say {i}.", "response": f"It is {i}."}) + "\n" for i in range(16))
RUN = [
    "stage=sft", "data.train=rows.jsonl", "data.val=rows.jsonl", "data.val_rows=4", "data.batch_size=4", *SMALL,
    "callbacks.samples=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lightning")
    (folder / "rows.jsonl").write_text(ROWS)
    return folder


def test_the_page_and_the_configuration_name_every_argument_of_the_trainer() -> None:
    arguments = set(inspect.signature(Trainer).parameters)
    listed = {name for example, _, _ in FLAGS for name in re.findall(r"^\+?(?:trainer\.)?(\w+)", example)}
    assert listed == arguments
    groups = {"callbacks", "logger", "plugins", "strategy"}
    assert set(composed("stage=sft").trainer) == (arguments - groups) | {"_target_"}


def arguments_of(*examples: str) -> list[str]:
    """Return the command line of a short run with the examples of the page."""
    words = [word for example in examples for word in shlex.split(example)]
    limited = any(word.startswith(("max_steps", "trainer.max_steps")) for word in words)
    return [*RUN, *([] if limited else ["max_steps=2"]), *words]


def refused_or_working() -> list[Any]:
    """Return the rows of the page; one that works alone is run at night, and all of them together below."""
    rows = []
    for example, kind, says in FLAGS:
        marks = [pytest.mark.nightly] if kind == "works" else []
        rows.append(pytest.param(example, kind, says, id=example, marks=marks))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(("example", "kind", "says"), refused_or_working())
def test_every_argument_works_or_is_refused_in_one_line(place: Path, example: str, kind: str, says: str) -> None:
    name = f"name={abs(hash(example))}"
    done = rlhf(place, *arguments_of(example), name, code=0 if kind == "works" else 2)
    if kind != "works":
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1


ALONE = ("trainer.fast_dev_run", "trainer.overfit_batches", "trainer.accumulate", "trainer.gradient_clip_algorithm")


@pytest.mark.slow
def test_arguments_work_together(place: Path) -> None:
    works = [example for example, kind, _ in FLAGS if kind == "works"]
    rlhf(place, *arguments_of(*(example for example in works if not example.startswith(ALONE))), "name=together")
    for example in (example for example in works if example.startswith(ALONE[:3])):
        rlhf(place, *arguments_of(example), f"name={example.partition('=')[0]}")


# ---- in a notebook ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return start(tmp_path_factory.mktemp("start"))


def data(folder: str, cache: Path, rows: int = 16, **options: Any) -> DemonstrationData:
    held = demonstrations(4) if options.pop("val", True) else None
    return DemonstrationData(
        load_tokenizer(folder), demonstrations(rows), held, batch_size=4, cache_dir=cache, **options
    )


def sft(folder: str, **options: Any) -> SFT:
    return SFT(partial(load_causal_lm, folder), **{"optimizer": sgd(), **options})


class Rows(Callback):
    """Keeps the rows of every microbatch, by epoch."""

    def __init__(self) -> None:
        self.read: dict[int, list[list[int]]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.read.setdefault(trainer.current_epoch, []).append(sorted(batch.index.tolist()))


def fit(module: Any, loader: Any, **options: Any) -> tuple[Trainer, dict[int, list[list[int]]]]:
    rows = Rows()
    plain: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    trainer = Trainer(**plain | options | {"callbacks": [rows, *options.get("callbacks", [])]})
    trainer.fit(module, loader)
    return trainer, rows.read


@pytest.mark.slow
@quiet_lightning
def test_accumulation_in_a_notebook_splits_the_rows_of_a_step(folder: str, tmp_path: Path) -> None:
    _, whole = fit(sft(folder), data(folder, tmp_path), max_epochs=1)
    trainer, split = fit(sft(folder), data(folder, tmp_path), max_epochs=1, accumulate_grad_batches=2)
    assert trainer.global_step == 4
    assert [sorted(a + b) for a, b in zip(split[0][::2], split[0][1::2], strict=True)] == whole[0]


@pytest.mark.slow
@quiet_lightning
def test_reloaded_loaders_go_on_with_the_next_order(folder: str, tmp_path: Path) -> None:
    _, plain = fit(sft(folder), data(folder, tmp_path), max_epochs=3)
    _, reloaded = fit(sft(folder), data(folder, tmp_path), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert reloaded == plain
    assert plain[0] != plain[1]


@pytest.mark.slow
@quiet_lightning
@pytest.mark.filterwarnings("ignore:.*overfit_batches.*")
def test_overfit_batches_reads_the_same_rows_in_every_epoch(folder: str, tmp_path: Path) -> None:
    _, rows = fit(sft(folder), data(folder, tmp_path), max_epochs=3, overfit_batches=2, limit_val_batches=1)
    assert rows == {epoch: [[0, 1, 2, 3], [4, 5, 6, 7]] for epoch in range(3)}


class Seen:
    """A schedule that keeps the number of updates that it was planned for."""

    def __init__(self) -> None:
        self.total: Any = "none"

    def __call__(self, optimizer: Any, total: int | None) -> Any:
        self.total = total
        return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "updates"),
    [
        ({"limit_train_batches": 2, "max_epochs": 3}, 6),
        ({"limit_train_batches": 0.5, "max_epochs": 3}, 6),
        ({"limit_train_batches": 3, "accumulate_grad_batches": 2, "max_epochs": 2}, 4),
        ({"overfit_batches": 1, "max_epochs": 5}, 5),
        ({"fast_dev_run": 2}, 2),
        ({"max_epochs": 2, "max_steps": 5}, 5),
    ],
    ids=str,
)
@quiet_lightning
@pytest.mark.filterwarnings("ignore:.*overfit_batches.*")
def test_the_schedule_plans_for_what_will_run(folder: str, tmp_path: Path, options: Any, updates: int) -> None:
    seen = Seen()
    trainer, _ = fit(sft(folder, schedule=seen), data(folder, tmp_path, val=False), **options)
    assert trainer.global_step == updates == seen.total


@pytest.mark.slow
@quiet_lightning
def test_a_run_that_only_time_ends_has_no_planned_length(folder: str, tmp_path: Path) -> None:
    options: Any = {"max_time": {"seconds": 1}, "max_epochs": -1}
    constant = partial(schedule, shape="constant")
    trainer, _ = fit(sft(folder, schedule=constant), data(folder, tmp_path), **options)
    assert trainer.global_step > 4
    with pytest.raises(UserError, match="needs the number of updates of the run"):
        fit(sft(folder, schedule=schedule), data(folder, tmp_path), **options)


@quiet_lightning
def test_loaders_of_the_data_modules_are_not_given_another_sampler(folder: str, tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    module = data(folder, tmp_path)
    module.setup()
    for loader in (module.train_dataloader(), module.val_dataloader()):
        assert not isinstance(loader, DataLoader)
        assert not hasattr(loader, "sampler")


REFUSED = {
    "scheduler": ({"callbacks": [GradientAccumulationScheduler({0: 1, 2: 2})]}, "use trainer.accumulate_grad_batches"),
    "batch size": ({"callbacks": [lightning_callbacks.BatchSizeFinder()]}, "would change data.batch_size"),
    "pruning": ({"callbacks": [lightning_callbacks.ModelPruning("l1_unstructured")]}, "prune the exported model"),
}


@pytest.mark.parametrize("case", REFUSED)
@quiet_lightning
def test_what_would_give_another_result_is_refused(folder: str, tmp_path: Path, case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        fit(sft(folder), data(folder, tmp_path), max_steps=1, **options)


@quiet_lightning
def test_ppo_refuses_callbacks_of_automatic_optimization(folder: str, tmp_path: Path) -> None:
    module = PPO(partial(load_causal_lm, folder), sgd(), reward=lambda prompts, responses, *_: [0.0] * len(responses))
    prompts = PromptData(load_tokenizer(folder), demonstrations(4), batch_size=4, cache_dir=tmp_path)
    with pytest.raises(UserError, match="SpikeDetection needs automatic optimization, and PPO makes its own steps"):
        fit(module, prompts, max_steps=1, callbacks=[SpikeDetection()])


@pytest.mark.slow
@quiet_lightning
def test_test_predict_and_checkpoints_of_a_module(folder: str, tmp_path: Path) -> None:
    module, rows = sft(folder), data(folder, tmp_path)
    trainer, _ = fit(module, rows, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(UserError, match=r"Trainer\.validate reads val"):
        trainer.test(module, rows)
    with pytest.raises(UserError, match=r"Trainer\.predict: SFT trains a model"):
        trainer.predict(module, rows)
    held = rows.val_dataloader()
    (validated,) = trainer.validate(module, held, verbose=False)
    (tested,) = trainer.test(module, held, verbose=False)
    assert tested == {"test/loss": validated["val/loss"]}
    with pytest.raises(UserError, match="which a checkpoint does not hold"):
        SFT.load_from_checkpoint(tmp_path / "end.ckpt")
    loaded = SFT.load_from_checkpoint(tmp_path / "end.ckpt", load=module.load, optimizer=sgd())
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))


@pytest.mark.slow
@quiet_lightning
@pytest.mark.filterwarnings("ignore:.*lr_find.*|.*Checkpoint directory.*")
def test_lr_find_sets_the_rate_of_the_next_fit(folder: str, tmp_path: Path) -> None:
    module = sft(folder, optimizer=partial(torch.optim.AdamW, lr=1.0))
    trainer = Trainer(
        accelerator="cpu", max_epochs=20, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    found = Tuner(trainer).lr_find(module, datamodule=data(folder, tmp_path, val=False), num_training=40)
    assert found is not None
    assert module.lr == found.suggestion() != 1.0
    trainer.fit(module, data(folder, tmp_path, val=False))
    assert trainer.optimizers[0].param_groups[0]["lr"] == module.lr


NIGHTLY = (("batch", 1), ("validation", 6))


class Killed(Exception):
    """Stands for a killed process."""


class Kill(Callback):
    """Dies when a batch or a validation begins after `step` updates."""

    def __init__(self, hook: str, step: int) -> None:
        self.hook, self.step = hook, step

    def die(self, hook: str, trainer: Trainer) -> None:
        if self.hook == hook and trainer.global_step >= self.step:
            raise Killed

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        self.die("batch", trainer)

    def on_validation_start(self, trainer: Trainer, *arguments: Any) -> None:
        self.die("validation", trainer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "step"),
    [("batch", 4), ("validation", 4), *(pytest.param(*more, marks=pytest.mark.nightly) for more in NIGHTLY)],
)
@quiet_lightning
@pytest.mark.filterwarnings("ignore:.*WeightAveraging.*|.*Checkpoint directory.*")
def test_a_resumed_run_has_the_same_average_best_and_patience(
    folder: str, tmp_path: Path, hook: str, step: int
) -> None:
    def run(name: str, *extra: Callback, resume: bool = False) -> Any:
        seed_everything(3, verbose=False)
        stopping = EarlyStopping("val/loss", patience=2, min_delta=0.05, check_on_train_epoch_end=False)
        best = ModelCheckpoint(tmp_path / name, "best", monitor="val/loss", save_on_train_epoch_end=False)
        module = SFT(partial(load_causal_lm, folder, dropout=0.1), partial(torch.optim.AdamW, lr=2e-2))
        callbacks = [StepCheckpoint(tmp_path / name, 1), RandomState(), stopping, EMAWeightAveraging(decay=0.8), best]
        trainer = Trainer(
            accelerator="cpu", max_steps=24, max_epochs=-1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[*callbacks, *extra], plugins=[AtomicCheckpointIO()],
            val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        )  # fmt: skip
        checkpoint = str(tmp_path / name / "last.ckpt") if resume else None
        try:
            trainer.fit(module, data(folder, tmp_path), ckpt_path=checkpoint)
        except Killed:
            assert extra
        return trainer.global_step, stopping.wait_count, best.best_model_score, [p.data for p in module.parameters()]

    whole = run("whole")
    run("parts", Kill(hook, step))
    resumed = run("parts", resume=True)
    assert resumed[:3] == whole[:3]
    assert all(torch.equal(a, b) for a, b in zip(resumed[3], whole[3], strict=True))


# ---- from the command ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_best_checkpoint_is_exported_with_its_metrics(place: Path) -> None:
    """The largest loss counts as best here, so that it is not that of the last weights."""
    worst = [
        "callbacks=[best,lr_monitor]",
        "callbacks.best.mode=max",
        "export=best",
        "optimizer.lr=0.01",
        "max_steps=3",
    ]
    rlhf(place, *RUN, *worst, "val_every_n_steps=1", "name=best", "logger=csv")
    (run,) = (place / "outputs" / "sft" / "best").glob("*")
    (kept,) = (run / "checkpoints").glob("best-*.ckpt")
    last = read_checkpoint(run / "checkpoints" / "last.ckpt")
    state = next(s for name, s in last["callbacks"].items() if name.startswith("ModelCheckpoint"))
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["val/loss"] == pytest.approx(state["best_model_score"].item(), rel=1e-5)
    from transformers import AutoModelForCausalLM

    weights = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    trained = {k.removeprefix("policy.lm."): v for k, v in read_checkpoint(kept)["state_dict"].items()}
    assert all(torch.equal(weights[name], value) for name, value in trained.items() if name in weights)
    assert read_checkpoint(kept)["global_step"] == 1


OPTIONS = ["logger=null", "callbacks=null", "~schedule", "logger=many", "callbacks=ema"]
AT_NIGHT = [
    "~logger", "logger=none", "schedule=null", "logger=csv", "callbacks=early_stopping", "callbacks=lr_monitor",
    "schedule=wsd", "optimizer=adam", "optimizer=sgd", "optimizer=rmsprop", "optimizer._target_=torch.optim.NAdam",
    "+callbacks.x._target_=lightning.pytorch.callbacks.RichProgressBar",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice", [*OPTIONS, *(pytest.param(choice, marks=pytest.mark.nightly) for choice in AT_NIGHT)]
)
def test_every_option_trains(place: Path, choice: str) -> None:
    run = [word for word in RUN if not (choice == "callbacks=null" and word.startswith("callbacks."))]
    done = rlhf(place, *run, choice, "max_steps=2", f"name=option{abs(hash(choice))}")
    without = ("logger=null", "~logger", "logger=none", "logger=csv")
    assert ("tensorboard --logdir" in done.stdout) == (choice not in without)


@pytest.mark.slow
def test_the_last_samples_are_of_the_averaged_weights(place: Path) -> None:
    """An average that stays at the weights of the first update: what was sampled then is sampled again at the end."""
    run = [word for word in RUN if not word.startswith("callbacks.samples")]
    run += [
        "callbacks=ema",
        "callbacks.samples.max_new_tokens=8",
        "max_steps=2",
        "optimizer.lr=0.1",
        "callbacks.samples.every_n_steps=1",
    ]
    for decay, same in ((1.0, True), (0.0, False)):
        rlhf(place, *run, f"callbacks.ema.decay={decay}", f"name=decay{same}")
        _, first, last = sorted(place.glob(f"outputs/sft/decay{same}/*/samples/*.jsonl"))
        assert (first.read_text() == last.read_text()) is same


@pytest.mark.slow
def test_a_callback_of_the_working_directory_is_found_once_allowed(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "mine.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n\n\nclass Say(Callback):\n"
        "    def on_train_start(self, *_):\n        print('hello from mine')\n"
    )
    mine = ["+callbacks.say._target_=mine.Say", "max_steps=1"]
    assert "is not an allowed target" in rlhf(tmp_path, *RUN, *mine, code=2).stderr
    assert "hello from mine" in rlhf(tmp_path, *RUN, *mine, "allow_targets=[mine.Say]").stdout
