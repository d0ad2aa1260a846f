"""Checks of a policy: what it answers, and that its log-probabilities and gradients are what they should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, track
from torch import Tensor

from rlhf_lightning.data.base import RowData
from rlhf_lightning.data.checks import Check, Note
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.answers import Answers, answer, start
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.models.adapters import adapter_off, add_lora
from rlhf_lightning.models.completion import CompletionModel, choose_layout, response_logprobs
from rlhf_lightning.modules.invariants import apart, is_exact
from rlhf_lightning.ops.groups import Group, Layout, pack

BAR: dict[str, Any] = {"transient": True, "disable": not Console().is_terminal}


class ModelChecks:
    """A model on the first training rows; on answers of its own where the rows are prompts.

    Args:
        load: returns the model as a stage would load it.
        lora: arguments of :func:`add_lora`, or None.
        data: a set-up data module.
        count: training rows that the model reads.
        engine: generates the answers.
        max_new_tokens, temperature, seed: of generation.
        device: where to compute.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        lora: dict[str, Any] | None,
        data: RowData,
        count: int,
        engine: Engine,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.load_model, self.lora, self.data, self.engine = load, lora, data, engine
        self.max_new_tokens, self.temperature, self.seed, self.device = max_new_tokens, temperature, seed, device
        self.lm: Any = self.load()
        if lora is not None:
            self.lm = add_lora(self.lm, **lora)
        self.policy = CompletionModel(self.lm)
        self.exact = is_exact(self.lm)
        self.layout: Layout
        self.layout, self.why_padded = choose_layout(self.lm)
        self.groups = [data.group("train", row) for row in range(count)]
        self.answers: Answers | None = None
        self.eval_cache: dict[float, list[Tensor]] = {}

    def load(self) -> Any:
        """Return the model on the device."""
        return self.load_model().to(self.device)

    @property
    def vocabulary(self) -> int:
        """Number of token ids in the model's vocabulary."""
        return self.lm.get_input_embeddings().num_embeddings

    def checks(self) -> Iterator[Check]:
        """Yield the checks; the first one samples, and where rows are prompts the others read what it sampled."""
        yield "the model can end its responses", self.sample
        yield "a row does not depend on its neighbours", self.neighbours
        if self.data.kind != "demonstrations":  # SFT has neither, and may well use dropout
            yield "pi / pi_old starts at 1", self.ratio
            yield "KL(policy, reference) starts at 0", self.reference
        yield "the gradient does not depend on how a step is split", self.gradient

    def logprobs(self, policy: Any = None, temperature: float = 1.0) -> list[Tensor]:
        """Return the log-probabilities of the tokens in the loss mask of each group, read in batches."""
        with Progress(*Progress.get_default_columns(), **BAR) as bar:
            task = bar.add_task("  reading rows", total=len(self.groups))
            responses = response_logprobs(
                policy or self.policy, self.groups, self.layout, self.device, temperature, 4096,
                lambda count: bar.advance(task, count),
            )  # fmt: skip
        return [torch.cat(tokens) for tokens in responses]

    def agree(self, logprobs: Sequence[Tensor], expected: Sequence[Tensor], advice: str) -> str:
        """Return how close two computations are, or raise a UserError with the row where they are not."""
        gaps = [apart(a, b, self.exact) for a, b in zip(logprobs, expected, strict=True)]
        worst, broken = max(gaps)
        if broken:
            place = self.data.where("train", [self.groups[gaps.index((worst, broken))].index])
            raise UserError(f"log-probabilities differ by {worst:.2g}, most in {place}: {advice}")
        return f"{len(gaps)} rows, log-probabilities agree to {worst:.1g}"

    def sample(self) -> str:
        """Answers of the model end with EOS, and where the data ends the model could end."""
        template, longest = self.data.template, self.max_new_tokens
        prompts = self.groups[:16]
        start(self.engine, self.lm, template)
        with Progress(*Progress.get_default_columns(), **BAR) as bar:
            task = bar.add_task("  generating", total=len(prompts))
            self.answers = answers = answer(
                self.engine, template, prompts, max_new_tokens=longest, temperature=self.temperature,
                seed_parts=(self.seed, "audit"), progress=lambda count: bar.advance(task, count),
            )  # fmt: skip
        self.engine.close()
        if self.data.kind == "prompts":
            self.groups = answers.groups(prompts)
        for group, logprobs in zip(self.groups, self.eval_logprobs(), strict=True):
            if not torch.isfinite(logprobs).all():
                raise UserError(f"a log-probability is not finite in {self.data.where('train', [group.index])}")
        text = f"{sum(answers.finished)} of {len(prompts)} responses end with EOS within {longest} tokens"
        return text if any(answers.finished) else Note(f"{text}: in PPO every one would get ppo.missing_eos_penalty")

    def neighbours(self) -> str:
        """Rows read in batches, packed where the model can, give what each response gives alone and unpadded."""
        self.lm.eval()
        expected = []
        for group in track(self.groups, "  reading rows one by one", **BAR):
            masks = group.loss_mask or [None] * len(group.responses)
            alone = [Group(group.prompt, [y], [m] if m else None) for y, m in zip(group.responses, masks, strict=True)]
            with torch.no_grad():
                parts = [self.policy(pack([one], layout="padded").to(self.device)).logprobs for one in alone]
            expected.append(torch.cat(parts).float().cpu())
        agreement = self.agree(self.eval_logprobs(), expected, "this model cannot be trained in batches")
        return (
            f"{agreement}; rows are padded: {self.why_padded}" if self.why_padded else f"{agreement}, packed or alone"
        )

    def ratio(self) -> str:
        """The model in training is the one that samples."""
        temperature = self.temperature
        old = self.eval_logprobs(temperature)
        self.lm.train()
        new = self.logprobs(temperature=temperature)
        return self.agree(new, old, "switch off dropout (model.load.dropout, adapter.dropout)")

    def reference(self) -> str:
        """The policy is its reference: the same folder once more, or the model with its adapter off."""
        logprobs = self.eval_logprobs()
        self.lm.eval()
        with adapter_off(self.lm):
            again = None if self.lora is not None else CompletionModel(self.load()).eval()
            expected = self.logprobs(again)
        return self.agree(logprobs, expected, "the policy is not the model it starts from")

    def eval_logprobs(self, temperature: float = 1.0) -> list[Tensor]:
        """Return the log-probabilities of the model as it samples, computed once."""
        if temperature not in self.eval_cache:
            self.lm.eval()
            self.eval_cache[temperature] = self.logprobs(temperature=temperature)
        return self.eval_cache[temperature]

    def gradient(self) -> str:
        """One batch of rows and the rows one by one give the same gradient, for every weight that is trained."""
        self.lm.eval()
        groups = self.groups[:4]
        total = sum(group.loss_tokens for group in groups)
        trained = [(name, p) for name, p in self.lm.named_parameters() if p.requires_grad]
        both: list[list[Tensor]] = []
        for split in ([groups], [[group] for group in groups]):
            self.lm.zero_grad()
            for part in split:
                batch = pack(part, layout=self.layout).to(self.device)
                (-self.policy(batch).logprobs.sum() / total).backward()
            for name, weight in trained:
                if weight.grad is None or not torch.isfinite(weight.grad).all():
                    state = "missing" if weight.grad is None else "not finite"
                    raise UserError(f"the gradient of {name} is {state}")
            both.append([weight.grad.float().clone() for _, weight in trained if weight.grad is not None])
        self.lm.zero_grad()
        norm = torch.nn.utils.get_total_norm(both[0]).item()
        gap = torch.nn.utils.get_total_norm([a - b for a, b in zip(*both, strict=True)]).item() / max(norm, 1e-12)
        if gap > (1e-3 if self.exact else 5e-2):
            raise UserError(f"one batch of {len(groups)} rows and the rows one by one differ by {gap:.2g} of the norm")
        return f"norm {norm:.3g} over {len(trained)} weights, the two ways differ by {gap:.1g} of it"
