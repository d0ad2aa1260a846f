"""Checks of a policy: what it samples, and that its log-probabilities and gradients are what they should be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, track
from torch import Tensor

from rlhf_lightning.data.checks import Check, Note
from rlhf_lightning.data.planning import token_budget
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.policy import device
from rlhf_lightning.generation.local import Sampler, Samples
from rlhf_lightning.models.adapters import adapter_off, add_lora
from rlhf_lightning.models.completion import CompletionModel, choose_layout
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.modules.invariants import apart, is_exact
from rlhf_lightning.ops.groups import Group, Layout, pack

BAR: dict[str, Any] = {"transient": True, "disable": not Console().is_terminal}


class ModelChecks:
    """The model of `folder` on the first `count` training rows; on answers of its own where the rows are prompts."""

    def __init__(self, settings: dict[str, Any], folder: str, data: Any, count: int) -> None:
        self.settings, self.folder, self.data = settings, folder, data
        self.options, self.device = settings["audit"], device(settings)
        self.lm: Any = self.load()
        if settings["adapter"] is not None:
            self.lm = add_lora(self.lm, **settings["adapter"])
        self.policy = CompletionModel(self.lm)
        self.exact = is_exact(self.lm)
        self.layout: Layout
        self.layout, self.why_padded = choose_layout(self.lm)
        self.groups = [data.rows["train"][row] for row in range(count)]
        self.drawn: Samples | None = None
        self.known: dict[float, list[Tensor]] = {}

    def load(self) -> Any:
        """Return the model as a stage would load it."""
        return load_causal_lm(self.folder, **self.settings["model"]["load"]).to(self.device)  # type: ignore[arg-type]

    @property
    def vocabulary(self) -> int:
        """Number of ids the model knows."""
        return self.lm.get_input_embeddings().num_embeddings

    def checks(self) -> Iterator[Check]:
        """Yield the checks; the first one samples, and where rows are prompts the others read what it sampled."""
        yield "the model can end its answers", self.sample
        yield "a row does not depend on its neighbours", self.neighbours
        if self.data.kind != "demonstrations":  # SFT has neither, and may well use dropout
            yield "pi / pi_old starts at 1", self.ratio
            yield "KL(policy, reference) starts at 0", self.reference
        yield "the gradient does not depend on how a step is split", self.gradient

    def logprobs(self, policy: Any = None, temperature: float = 1.0) -> list[Tensor]:
        """Return the log-probabilities of the counted tokens of each group, read in batches."""
        found: dict[int, Tensor] = {}
        for chosen in track(token_budget([g.tokens for g in self.groups], 4096), "  reading rows", **BAR):
            batch = pack([self.groups[i] for i in chosen], layout=self.layout).to(self.device)
            with torch.no_grad():
                flat = (policy or self.policy)(batch, temperature).logprobs.float().cpu()
            found |= zip(chosen, flat.split([self.groups[i].counted_tokens for i in chosen]), strict=True)
        return [found[i] for i in range(len(self.groups))]

    def agree(self, found: Sequence[Tensor], expected: Sequence[Tensor], advice: str) -> str:
        """Return how close two computations are, or raise a UserError with the row where they are not."""
        gaps = [apart(a, b, self.exact) for a, b in zip(found, expected, strict=True)]
        worst, broken = max(gaps)
        if broken:
            place = self.data.where("train", [self.groups[gaps.index((worst, broken))].index])
            raise UserError(f"log-probabilities differ by {worst:.2g}, most in {place}: {advice}")
        return f"{len(gaps)} rows, log-probabilities agree to {worst:.1g}"

    def sample(self) -> str:
        """Answers of the model end by themselves, and where the data ends the model could end."""
        template, longest = self.data.template, self.options["max_new_tokens"]
        prompts = [list(group.prompt) for group in self.groups[:16]]
        sampler = Sampler(self.lm, template.eos_ids, longest, self.options["temperature"])
        with Progress(*Progress.get_default_columns(), **BAR) as bar:
            task = bar.add_task("  sampling", total=len(prompts))
            self.drawn = drawn = sampler(
                prompts, 1, (self.settings["seed"], "audit"), progress=lambda done: bar.advance(task, done)
            )
        if self.data.kind == "prompts":
            self.groups = [
                Group(p, [y], index=i) for i, (p, y) in enumerate(zip(prompts, drawn.responses, strict=True))
            ]
        for group, found in zip(self.groups, self.sampling(), strict=True):
            if not torch.isfinite(found).all():
                raise UserError(f"a token has no probability in {self.data.where('train', [group.index])}")
        text = f"{sum(drawn.finished)} of {len(prompts)} sampled answers end within {longest} tokens"
        return text if any(drawn.finished) else Note(f"{text}: in PPO every one would get ppo.missing_eos_penalty")

    def neighbours(self) -> str:
        """Rows read in batches, packed where the model can, give what each response gives alone and unpadded."""
        self.lm.eval()
        expected = []
        for group in track(self.groups, "  reading rows one by one", **BAR):
            flags = group.counted or [None] * len(group.responses)
            alone = [Group(group.prompt, [y], [c] if c else None) for y, c in zip(group.responses, flags, strict=True)]
            with torch.no_grad():
                parts = [self.policy(pack([one], layout="padded").to(self.device)).logprobs for one in alone]
            expected.append(torch.cat(parts).float().cpu())
        seen = self.agree(self.sampling(), expected, "this model cannot be trained in batches")
        return f"{seen}; rows are padded: {self.why_padded}" if self.why_padded else f"{seen}, packed or alone"

    def ratio(self) -> str:
        """The model in training is the one that samples."""
        temperature = self.options["temperature"]
        old = self.sampling(temperature)
        self.lm.train()
        found = self.logprobs(temperature=temperature)
        return self.agree(found, old, "switch off dropout (model.load.dropout, adapter.dropout)")

    def reference(self) -> str:
        """The policy is its reference: the same folder once more, or the model with its adapter off."""
        found = self.sampling()
        self.lm.eval()
        with adapter_off(self.lm):
            again = None if self.settings["adapter"] is not None else CompletionModel(self.load()).eval()
            expected = self.logprobs(again)
        return self.agree(found, expected, "the policy is not the model it starts from")

    def sampling(self, temperature: float = 1.0) -> list[Tensor]:
        """Return the log-probabilities of the model as it samples, computed once."""
        if temperature not in self.known:
            self.lm.eval()
            self.known[temperature] = self.logprobs(temperature=temperature)
        return self.known[temperature]

    def gradient(self) -> str:
        """One batch of rows and the rows one by one give the same gradient, for every weight that is trained."""
        self.lm.eval()
        groups = self.groups[:4]
        total = sum(group.counted_tokens for group in groups)
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
