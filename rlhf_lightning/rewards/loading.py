"""Rewards: any callable `(prompts, responses, metadata) -> one number a response`."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.data.planning import token_budget
from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.models.completion import ScalarModel, choose_layout
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.models.loading import load_scalar_model, load_tokenizer, resolve_model
from rlhf_lightning.ops.groups import Group, Layout, pack

Reward = Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]]], Any]
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class FolderReward:
    """Scores text with a trained reward model, through its own tokenizer and template.

    Responses to the same conversation are scored as one completion group, so its prompt is computed once.
    """

    def __init__(self, folder: str, dtype: str = "float32", batch_tokens: int = 16_384, device: str = "cpu") -> None:
        model = load_scalar_model(folder, dtype=dtype, trained=True)
        tokenizer = load_tokenizer(folder)
        self.template = Template(tokenizer, "auto" if tokenizer.chat_template else "plain")
        self.layout: Layout = choose_layout(model)[0]
        self.model = Frozen(ScalarModel(model)).to(device)
        self.batch_tokens = batch_tokens
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9

    def to(self, device: torch.device | str) -> FolderReward:
        """Move the model and return self."""
        self.model.to(device)
        return self

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (text, extra) in enumerate(zip(prompts, metadata, strict=True)):
            content = extra.get("messages") or [{"role": "user", "content": text}]
            groups.setdefault(tuple(self.template.prompt(content)), []).append(i)
        packed = []
        for prompt, members in groups.items():
            room = max(self.context - len(prompt), 1)
            packed.append(Group(prompt, [self.template.response(responses[i])[:room] for i in members]))
        scores = torch.zeros(len(responses))
        members = list(groups.values())
        device = next(self.model.model.parameters()).device
        for chosen in token_budget([g.tokens for g in packed], self.batch_tokens):
            batch = pack([packed[i] for i in chosen], layout=self.layout).to(device)
            scores[[m for i in chosen for m in members[i]]] = self.model(batch).cpu()
        return scores


def exact_answer(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
    """Return 1 where the last number of a response equals the last number of the row's `answer`, else 0.

    Raises:
        UserError: a row without a number in its column `answer`.
    """
    scores = []
    for prompt, response, extra in zip(prompts, responses, metadata, strict=True):
        expected = _last_number(str(extra.get("answer", "")))
        if expected is None:
            raise UserError(f"exact_answer needs a number in the column answer of every row; {prompt[:80]!r} has none")
        scores.append(float(_last_number(response) == expected))
    return scores


def _last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


class MeanReward:
    """The mean of several rewards, an ensemble."""

    def __init__(self, members: Sequence[Reward]) -> None:
        self.members = members

    def to(self, device: torch.device | str) -> MeanReward:
        """Move the members that are models and return self."""
        for member in self.members:
            if isinstance(member, FolderReward):
                member.to(device)
        return self

    def __call__(self, *args: Any) -> Tensor:
        return torch.stack([torch.as_tensor(member(*args)).float() for member in self.members]).mean(0)


def load_reward(spec: Any, dtype: str = "float32") -> Reward:
    """Return the reward that `spec` names.

    Args:
        spec: a callable; "world" for the built-in world's gold reward; `module:function`, looked up from the working
            directory too; the folder of a reward model; or a list of these, whose mean is taken.

    Raises:
        UserError: when the module, the function or the folder is not there.
    """
    if callable(spec):
        return spec
    if isinstance(spec, list | tuple):
        return MeanReward([load_reward(member, dtype) for member in spec])
    spec = str(spec)
    if spec == "world":
        from rlhf_lightning.world import gold_reward

        return gold_reward
    if Path(spec).is_dir():
        return FolderReward(resolve_model(spec, "."), dtype)
    module, _, name = spec.partition(":")
    if not (module and name) or "/" in module:
        raise UserError(f"reward_from={spec!r} is neither a reward model folder, 'module:function', nor 'world'")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UserError(f"reward_from={spec}: the module {module} cannot be imported ({error})") from error
    except AttributeError:
        names = [n for n in vars(sys.modules[module]) if not n.startswith("_")]
        raise UserError(f"reward_from={spec}: {module} has no {name}.{nearest(name, names)}") from None
    if not callable(found):
        raise UserError(f"reward_from={spec}: {name} is {type(found).__name__}, not a function")
    return found


def score(
    reward: Reward, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> Tensor:
    """Return the rewards (S,) as float32, or stop with the response that got none."""
    try:
        returned = reward(prompts, responses, metadata)
    except UserError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"the reward failed at {place.filename}:{place.lineno}: {type(error).__name__}: {error}"
        ) from error
    try:
        values = torch.as_tensor(returned).detach().float().cpu()
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the reward returned no numbers for {len(responses)} responses: {error}") from error
    if values.shape != (len(responses),):
        raise UserError(
            f"the reward returned shape {tuple(values.shape)} for {len(responses)} responses; one number each is needed"
        )
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).nonzero()[0])
        raise UserError(
            f"the reward is {values[bad].item()} for the response {responses[bad][:200]!r} to {prompts[bad][:200]!r}"
        )
    return values
