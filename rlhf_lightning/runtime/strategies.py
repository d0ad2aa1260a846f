"""The strategy of FSDP2 and tensor parallelism."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rlhf_lightning.callbacks.checkpoints import read_checkpoint
from rlhf_lightning.errors import UserError
from rlhf_lightning.files import readable_os_errors
from rlhf_lightning.models.shards import (
    SHARDS,
    SUFFIX,
    fill,
    index,
    put_tensors,
    read_shards,
    shard_folder,
    take_tensors,
    write_shard,
)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices, or with `tensor_parallel_size` above 1 every layer split over that many.

    Weights, gradients, optimizer states and frozen models are sharded. Every rank writes its part of a checkpoint, see
    :mod:`rlhf_lightning.models.shards`; a run can continue on another number of devices and under another strategy.

    Args:
        tensor_parallel_size: devices that share every layer and read the same rows; it divides the number of devices.
        gather_sampling: keep the whole weights on every device while it samples: a gather per layer and rollout
            instead of one per layer and token.
        Others: see Lightning's ModelParallelStrategy.
    """

    def __init__(self, tensor_parallel_size: int = 1, gather_sampling: bool = False, **kwargs: Any) -> None:
        super().__init__("auto", tensor_parallel_size, save_distributed_checkpoint=False, **kwargs)
        self.tensor_parallel_size, self.gather_sampling = tensor_parallel_size, gather_sampling

    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        groups, rest = divmod(self.world_size, self.tensor_parallel_size)
        if rest:
            raise UserError(
                f"strategy.tensor_parallel_size={self.tensor_parallel_size} does not divide {self.world_size} devices"
            )
        if self.gather_sampling and groups == 1 < self.tensor_parallel_size:
            raise UserError(
                f"strategy.gather_sampling=true: with tensor_parallel_size={self.tensor_parallel_size} on "
                f"{self.world_size} devices nothing is gathered"
            )
        self._data_parallel_size = groups

    # ---- writing ---------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights, of sharded ones this rank's part."""
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer, of sharded tensors this rank's part."""
        return optimizer.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write this rank's part into a new folder; then the first rank writes the file that names it.

        The file is replaced at once, so a run that is killed meanwhile has the older checkpoint.
        """
        path = Path(self.broadcast(filepath))
        tensors = take_tensors(checkpoint, DTensor)
        if tensors:
            folder = path.parent / self.broadcast(f"{path.name}.{secrets.token_hex(4)}{SUFFIX}")
            self._write(folder, {name: tensor for name, tensor in tensors.items() if self._writes(tensor)})
            checkpoint[SHARDS] = {"folder": folder.name, "tensors": index(tensors)}
        if self.is_global_zero:
            if tensors and len(list(folder.iterdir())) < self.world_size:
                raise UserError(f"not every rank wrote into {folder}; it must be on a disk that all machines share")
            self.checkpoint_io.save_checkpoint(checkpoint, path)

    def _writes(self, tensor: DTensor) -> bool:
        """Return whether this rank is the first that holds its part: some are split along one axis of the mesh only."""
        others = set(self.device_mesh.mesh_dim_names or ()) - set(tensor.device_mesh.mesh_dim_names or ())
        return not any(self.device_mesh[name].get_local_rank() for name in others)

    def _write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        with readable_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{self.global_rank:05d}.safetensors"
            write_shard(file, tensors)
            for place in (file, folder):
                handle = os.open(place, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
        self.barrier()

    # ---- reading ---------------------------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Give every rank its part of a checkpoint that any strategy wrote, and return the rest of it."""
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = read_checkpoint(path)
        assert self.lightning_module is not None
        # only the weights are validated
        optimizers = self.optimizers if self.lightning_module.trainer.state.fn == TrainerFn.FITTING else []
        folder = shard_folder(path, checkpoint)
        if folder is None:
            self._load_whole(checkpoint, optimizers)
        else:
            self._load_shards(folder, checkpoint, optimizers)
        return checkpoint

    def _load_shards(self, folder: Path, checkpoint: dict[str, Any], optimizers: list[Optimizer]) -> None:
        """Read this rank's part of a checkpoint's shards, which another strategy may have cut in another way."""
        assert self.model is not None
        for optimizer, saved in zip(optimizers, checkpoint["optimizer_states"] if optimizers else [], strict=True):
            if saved["state"]:
                get_optimizer_state_dict(self.model, optimizer)  # makes the tensors of its state, to read into
        live = take_tensors(
            {
                "state_dict": get_model_state_dict(self.model),
                "optimizer_states": [optimizer.state_dict() for optimizer in optimizers],
            }
        )
        entries = checkpoint.pop(SHARDS)["tensors"]
        shapes = {name: tuple(entry[0]) for name, entry in entries.items()}
        whole = take_tensors(checkpoint)
        shapes |= {name: tuple(tensor.shape) for name, tensor in whole.items()}
        # of an optimizer the parameters that have a state: one that had no gradient has none
        live = {name: tensor for name, tensor in live.items() if name in shapes or name.startswith("model.")}
        for name in sorted(live.keys() | {name for name in shapes if optimizers or name.startswith("model.")}):
            if name not in live or shapes.get(name) != tuple(live[name].shape):
                raise UserError(f"the checkpoint's shards in {folder} are not those of this model: {name}")
        for name in live.keys() & whole.keys():
            fill(live[name], whole[name])
        read_shards(folder, {entries[name][2]: tensor for name, tensor in live.items() if name not in whole})
        put_tensors(checkpoint, live)
        for optimizer, saved in zip(optimizers, checkpoint["optimizer_states"] if optimizers else [], strict=True):
            pairs = zip(saved["param_groups"], optimizer.param_groups, strict=True)
            groups = [group | kernels(now) for group, now in pairs]
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})

    def _load_whole(self, checkpoint: dict[str, Any], optimizers: list[Optimizer]) -> None:
        """Give every rank its part of a checkpoint in one file.

        Lightning takes the numbers of an optimizer's state for places among the model's parameters; they are places
        among the optimizer's groups, which are the same under every strategy.
        """
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, saved in zip(optimizers, checkpoint["optimizer_states"] if optimizers else [], strict=True):
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            places = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            renamed = dict(zip(numbers, places, strict=True))
            if saved["state"]:
                named = {
                    "state": {renamed[number]: state for number, state in saved["state"].items()},
                    "param_groups": [
                        group | kernels(now) | {"params": [renamed[number] for number in group["params"]]}
                        for group, now in zip(saved["param_groups"], optimizer.param_groups, strict=True)
                    ],
                }
                set_optimizer_state_dict(self.model, optimizer, named, options=options)


def kernels(group: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an optimizer's group that belong to the strategy, not to the run."""
    return {name: group[name] for name in ("fused", "foreach") if name in group}
