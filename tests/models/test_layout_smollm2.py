"""On SmolLM2-135M and real preferences, packed groups give the loss and the gradients of plain forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.data import records
from rlhf_lightning.data.sources import read_source
from rlhf_lightning.data.template import Template
from rlhf_lightning.models.adapters import add_lora
from rlhf_lightning.models.completion import CompletionModel, choose_layout
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.ops.groups import Group, pack

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")]


def real_groups(tokenizer: Any, file: Path) -> dict[int, list[Group]]:
    """Groups with K = 1, 2, 4 and 9 of short rows; K > 2 borrows the responses of other rows."""
    template, pairs = Template(tokenizer), []
    for _, row in islice(read_source(str(file), "train").rows(), 400):
        pair = records.preference(row)
        group = Group(template.prompt(pair.prompt), [template.response(text)[:48] for text in pair.responses])
        if group.tokens <= 160:
            pairs.append(group)
    others = [y for group in pairs[2:9] for y in group.responses]
    return {k: [Group(g.prompt, [*g.responses, *others][:k]) for g in pairs[:2]] for k in (1, 2, 4, 9)}


def plain(lm: Any, groups: Sequence[Group]) -> Tensor:
    """The log-probability of every response token, one unpadded forward pass a response."""
    found = []
    for group in groups:
        for y in group.responses:
            logits = lm(input_ids=torch.tensor([[*group.prompt, *y]])).logits[0, len(group.prompt) - 1 : -1]
            found.append(logits.log_softmax(-1)[range(len(y)), torch.tensor(y)])
    return torch.cat(found)


def gradients(lm: Any, loss: Tensor) -> dict[str, Tensor]:
    lm.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("lora", "ks"),
    # test_layout.py has every K in float64, on tiny models
    [(False, (2,)), (True, (2,)), (False, (1, 4, 9))],
    ids=["full", "lora", "every K"],
)
def test_loss_and_gradients(smollm2: str, shared_data: Path, lora: bool, ks: tuple[int, ...]) -> None:
    lm: Any = load_causal_lm(smollm2).eval()
    if lora:
        torch.manual_seed(0)
        lm = add_lora(lm, r=4, alpha=8)
        for name, p in lm.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
    assert choose_layout(lm) == ("packed", None)
    made = real_groups(load_tokenizer(smollm2), shared_data / "hh_rlhf" / "train.jsonl.gz")
    for k in ks:
        groups = made[k]
        wanted = -plain(lm, groups).mean()
        expected = gradients(lm, wanted)
        batch = pack(groups, 4096)
        assert batch.input_ids.shape[0] == 1  # all groups in one row
        loss = -CompletionModel(lm)(batch).logprobs.mean()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5), k
        found = gradients(lm, loss)
        assert found.keys() == expected.keys()
        apart = {name: (found[name] - g).norm() / g.norm() for name, g in expected.items()}
        worst = max(apart, key=lambda name: apart[name])
        whole = sum(((found[name] - g) ** 2).sum() for name, g in expected.items()) ** 0.5
        size = sum((g**2).sum() for g in expected.values()) ** 0.5
        print(f"K={k} the whole gradient {whole / size:.1e}, worst {apart[worst]:.1e} {worst}")
        assert whole < 1e-4 * size, k
        # a norm's weight sums terms that nearly cancel: its own rounding is larger, in the plain passes as well
        assert apart[worst] < 1e-3, (k, worst)
