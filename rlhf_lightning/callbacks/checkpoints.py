"""Checkpoints that are written atomically, load without running code, and include every random state."""

from __future__ import annotations

import logging
import random
import traceback
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import TorchCheckpointIO

from rlhf_lightning.callbacks.stop import Stop
from rlhf_lightning.errors import UserError
from rlhf_lightning.files import atomic_path, regular
from rlhf_lightning.models.shards import SHARDS, read_whole, remove_shards

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary name in the same folder, syncs, renames; loads tensors and primitives only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # through a Python file, whose OSError tells a full disk from other failures
        with atomic_path(path) as temporary, temporary.open("wb") as opened:
            torch.save(checkpoint, opened)
        remove_shards(Path(path), keep=checkpoint.get(SHARDS, {}).get("folder"))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_whole(path, read_checkpoint(path, map_location))

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        remove_shards(Path(path))


def read_checkpoint(path: str | Path, map_location: Any = None, mmap: bool = False) -> dict[str, Any]:
    """Return the content of a checkpoint's file: tensors and primitives, nothing in it is executed.

    Raises:
        UserError: it is damaged, or compressed: a small file may then hold more than the memory.
    """
    try:
        with zipfile.ZipFile(regular(path)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, which torch does not do")
        return torch.load(path, map_location=map_location or "cpu", weights_only=True, mmap=mmap)
    except UserError:
        raise
    except (EOFError, RuntimeError, OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"the checkpoint {path} cannot be read: {reason}") from error
    except Exception as error:  # pickle raises its own type when a file wants to run code
        raise UserError(
            f"the checkpoint {path} is damaged or contains more than tensors and primitives; it is not loaded"
        ) from error


def resumed_step(path: str | Path) -> int:
    """Return the number of updates after which a checkpoint of a run was written.

    Raises:
        UserError: it cannot be read, or is none of a run.
    """
    return _run_checkpoint(path)["global_step"]


def kept_microbatches(path: str | Path) -> int | None:
    """Return the microbatches per step of the run that wrote a checkpoint, None where it does not say."""
    states = _run_checkpoint(path)["callbacks"]
    return next((s["microbatches"] for s in states.values() if isinstance(s, dict) and "microbatches" in s), None)


def _run_checkpoint(path: str | Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path, mmap=True)
    kinds = {"state_dict": dict, "global_step": int, "loops": dict, "callbacks": dict, "optimizer_states": list}
    for key, kind in kinds.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
            raise UserError(f"{path} is not a checkpoint of a run: it has no {key}")
    return checkpoint


def is_restoring(error: BaseException) -> bool:
    """Return whether an error was raised while Lightning gave a checkpoint's content to the objects of a run."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(
        frame.filename.endswith("checkpoint_connector.py") and frame.name.lstrip("_").startswith(("restore", "resume"))
        for frame in frames
    )


class RandomState(Callback):
    """Saves the random states of Python, NumPy and torch of every rank, so that dropout continues where it was.

    They are restored when the first batch starts: data loaders and sanity checks draw before that.
    """

    def __init__(self) -> None:
        self.restored: dict[str, Any] | None = None
        self.ranks = "1 device"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        kind = type(trainer.strategy).__name__.removesuffix("Strategy")
        self.ranks = f"{trainer.world_size} x {kind}"

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all ranks; Lightning asks every rank at the same time."""
        states: list[Any] = [random_state()]
        if torch.distributed.is_initialized():
            states *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, states[0])
        return {"ranks": self.ranks, "states": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.restored is None:
            return
        saved, self.restored = self.restored, None
        if saved.get("ranks") != self.ranks and trainer.is_global_zero:
            log.warning(
                "%s continues a run of %s: the same rows and samples, but sums in another order, so the result is "
                "not bit-exact",
                self.ranks,
                saved.get("ranks"),
            )
        together = getattr(trainer.strategy, "tensor_parallel_size", 1)  # these ranks share dropout masks
        first = trainer.global_rank - trainer.global_rank % together
        try:
            restore_random_state(saved["states"][first % len(saved["states"])])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(f"the checkpoint's random states are not those of a run: {error}") from error


def random_state() -> dict[str, Any]:
    """Return the states of this process's generators as tensors and primitives."""
    kind, keys, place, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), place, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the generators to what :func:`random_state` returned."""
    random.setstate(state["python"])
    kind, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


class StepCheckpoint(Callback):
    """Saves `last.ckpt` every `every_n_steps` optimizer updates, between two batches, and when training ends.

    So a run that is killed while it validates for the last time or writes its model need not train again, and has its
    metrics. Lightning's ModelCheckpoint tests `global_step % n` once per batch, which PPO's several updates per batch
    can miss.

    Args:
        folder: where `last.ckpt` goes.
        every_n_steps: updates between two checkpoints; 0 saves only when training is stopped early.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 50) -> None:
        self.path = Path(folder) / "last.ckpt"
        self.every_n_steps, self.saved_at, self.step_before = every_n_steps, 0, 0
        self.metrics: dict[str, float] = {}  # what had been logged when the checkpoint was saved
        self.microbatches = 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come after the other callbacks, whose states of the same update belong into the checkpoint."""
        self.microbatches = trainer.accumulate_grad_batches
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [c for c in callbacks if c is not self] + [self]  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "microbatches": self.microbatches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.metrics = state_dict["metrics"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step_before:
            return  # inside an accumulation window, whose gradients a checkpoint does not hold
        updates, callbacks = trainer.global_step - self.saved_at, trainer.callbacks  # type: ignore[attr-defined]
        # not one that another callback ends, which would train on when it is resumed
        interrupted = trainer.should_stop and any(isinstance(c, Stop) and c.received is not None for c in callbacks)
        if updates and (interrupted or (self.every_n_steps and updates >= self.every_n_steps)):
            self.save(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_at = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not one that was stopped before max_steps, which would train on when it is resumed
        if self.every_n_steps and not trainer.should_stop and trainer.global_step != self.saved_at:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint now."""
        self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        trainer.save_checkpoint(self.path)
        self.saved_at = trainer.global_step
