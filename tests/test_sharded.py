"""What of the sharded strategy is refused, and what other sharding is refused for it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from rlhf_lightning import SFT
from rlhf_lightning.errors import UserError
from rlhf_lightning.modules.trainer import check_trainer
from rlhf_lightning.ops.groups import Group
from rlhf_lightning.runtime.memory import Job, Shape, estimate
from rlhf_lightning.runtime.strategies import ShardedStrategy
from tests.helpers.cli import rlhf
from tests.helpers.lightning import quiet_lightning
from tests.helpers.models import tiny_config
from tests.modules import bandit


def stub(strategy: Any) -> Any:
    """Return what of a Trainer is checked."""
    return SimpleNamespace(strategy=strategy, precision="32-true", callbacks=[], datamodule=None)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_other_sharding_names_the_alternative(kind: Any) -> None:
    strategy = kind.__new__(kind)  # its constructor needs a GPU or a package
    with pytest.raises(UserError, match=r"strategy=(fsdp|deepspeed) is not supported: strategy=fsdp2 ") as caught:
        check_trainer(stub(strategy), bandit.build())
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_the_command_names_it_as_well(name: str, tmp_path: Path) -> None:
    done = rlhf(tmp_path, "stage=sft", f"strategy={name}", code=None)
    assert done.returncode != 0
    assert (
        "strategy=fsdp2 shards weights, gradients and optimizer states in place of FSDP1 and DeepSpeed" in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_gathering_is_for_stages_that_sample_in_this_process() -> None:
    strategy, module = ShardedStrategy(gather_sampling=True), bandit.build()
    check_trainer(stub(strategy), module)
    module.engine = SimpleNamespace()  # type: ignore[assignment] # it samples elsewhere
    with pytest.raises(UserError, match=r"strategy\.gather_sampling=true is for stages that sample in this process"):
        check_trainer(stub(strategy), module)


@pytest.mark.parametrize(("ranks", "size", "fine"), [(4, 2, True), (2, 2, False), (1, 1, True)])
def test_gathering_needs_weights_that_are_gathered(
    ranks: int, size: int, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = ShardedStrategy(tensor_parallel_size=size, gather_sampling=True)
    monkeypatch.setattr(ShardedStrategy, "world_size", ranks)
    if fine:
        strategy.set_world_ranks()
        return
    with pytest.raises(UserError, match=r"tensor_parallel_size=2 on 2 devices nothing is gathered"):
        strategy.set_world_ranks()


@pytest.mark.slow
@quiet_lightning
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16-true", 1e-6), ("bf16-mixed", 2e-2)])
def test_precisions_are_those_of_one_device(precision: Any, tolerance: float, one_rank: None) -> None:
    """PyTorch decides a sharded weight's precision at the first pass, Lightning converts the module before training.

    In mixed precision the weights of norms are gathered in bfloat16 as well.
    """

    def trained(strategy: Any) -> dict[str, Any]:
        module = SFT(lambda: LlamaForCausalLM(tiny_config()), partial(torch.optim.SGD, lr=0.5))
        rows = [[Group([3, 4, 5 + i], [[6, 7, 8 + i, 2]], index=i) for i in range(4)] for _ in range(2)]
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", devices=1, precision=precision, strategy=strategy, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer.fit(module, DataLoader(rows, batch_size=None))  # type: ignore[arg-type]
        return {name: getattr(w, "full_tensor", lambda w=w: w)() for name, w in module.state_dict().items()}

    expected, found = trained("auto"), trained(ShardedStrategy())
    torch.manual_seed(0)
    start = LlamaForCausalLM(tiny_config()).state_dict()
    change, gap = (
        torch.cat([(expected[name] - other[name.removeprefix(prefix)]).flatten().double() for name in expected]).norm()
        for other, prefix in ((start, "policy.lm."), (found, ""))
    )
    assert gap < tolerance * change


def test_gathered_weights_are_in_the_plan() -> None:
    """In the precision that they are gathered in."""
    shape = Shape(1000, 0, hidden=8, intermediate=16, layers=2, key_values=8, vocabulary=10)
    job = Job(weight_bytes=4, activation_bytes=2, tokens=1, loss_tokens=1, shards=4)
    assert estimate(shape, job)["gathered weights"] == 0
    assert estimate(shape, replace(job, gathered=True))["gathered weights"] == 2 * 1000
