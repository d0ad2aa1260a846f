"""Generation by a vLLM server: token ids in and out over HTTP, and weights by a LoRA adapter or a folder it reads.

Written against the documentation and source of vLLM 0.29 to 0.32.
"""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
import shutil
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from rlhf_lightning.distributed import gather_objects, is_first_rank, on_first_rank
from rlhf_lightning.errors import UserError, check_number, nearest
from rlhf_lightning.files import atomic_folder
from rlhf_lightning.generation.engine import Engine, Generations
from rlhf_lightning.generation.server import Server, ServerError, concurrently
from rlhf_lightning.generation.staleness import Probe, fingerprint
from rlhf_lightning.models.adapters import Adapter, merge_lora
from rlhf_lightning.models.completion import unwrap, vocabulary_size
from rlhf_lightning.models.peft import PeftModel
from rlhf_lightning.models.sharding import has_parts, whole_state
from rlhf_lightning.ops.seeding import derive_seed

log = logging.getLogger(__name__)
WEIGHTS = ("lora", "folder", "served")
MISSING = (404, 405, 501)
"""Statuses of a path that a server does not have."""
Response = tuple[list[int], bool, list[float]]
"""Tokens, whether they end with EOS, and the server's log-probabilities."""


class VLLMEngine(Engine):
    """Samples responses from a vLLM server, which gets the model's weights before every rollout.

    Args:
        base_url: of the server, up to `/v1`; its key, where one is needed, is read from OPENAI_API_KEY.
        model: its name there; None takes the first.
        weights: "lora" loads the policy's LoRA adapter, "folder" the whole weights; "served" changes nothing: the
            server has them already.
        folder: where weights are written; the server reads them under the same path.
        top_k, top_p: restrict the distribution (0 and 1.0 leave it whole). PPO needs it whole.
        concurrency: requests at a time, of each rank.
        timeout: seconds for an answer.
        retries: of a request that failed in a way that may pass.
        tolerance: nats by which log-probabilities may differ from the model's, on average over a probe.
        sleep: let the server free its memory between rollouts, where it shares the device with the training.
    """

    def __init__(
        self,
        base_url: str | None = None,
        model: str | None = None,
        *,
        weights: str = "folder",
        folder: str | Path = "vllm",
        top_k: int = 0,
        top_p: float = 1.0,
        concurrency: int = 64,
        timeout: float = 600,
        retries: int = 8,
        tolerance: float = 0.1,
        sleep: bool = False,
    ) -> None:
        if not base_url:
            raise UserError("sampler.base_url=<URL up to /v1> is needed: sampler=vllm asks a server")
        if weights not in WEIGHTS:
            raise UserError(f"sampler.weights={weights} is not one of {', '.join(WEIGHTS)}.{nearest(weights, WEIGHTS)}")
        check_number("sampler.top_k", top_k, "[0, inf)", whole=True)
        check_number("sampler.top_p", top_p, "(0, 1]")
        check_number("sampler.concurrency", concurrency, "[1, 1024]", whole=True)
        check_number("sampler.tolerance", tolerance, "(0, inf)")
        self.name, self.weights, self.folder = model, weights, Path(folder).expanduser().absolute()
        self.top_k, self.top_p, self.concurrency = top_k, top_p, concurrency
        self.tolerance, self.sleeps = tolerance, sleep
        self._connect = partial(Server, base_url, timeout=timeout, retries=retries, key="sampler")
        self._connect().close()  # a wrong URL is refused now; a connection is no part of a copy for another process
        self.server: Any = None
        self.lm: Any = None
        self.sent: str | None = None  # the adapter or folder that the server has from this engine
        self.asleep = False

    # ---- weights ---------------------------------------------------------------------------------------------------

    def start(self, lm: nn.Module, eos_ids: Iterable[int]) -> None:
        """Take a Hugging Face causal LM, or a peft model around one, and the tokens that end a response.

        Raises:
            UserError: the server is not there or has another model, or `weights` cannot be taken of this one.
        """
        has_adapter = isinstance(lm, PeftModel)
        if self.weights == "lora" and not has_adapter:
            raise UserError(
                "sampler.weights=lora sends the LoRA adapter, and the model has none: sampler.weights=folder"
            )
        if has_adapter and has_parts(lm):
            raise UserError("sampler=vllm cannot take LoRA weights of a sharded model: strategy=ddp or sampler=local")
        self.close()
        self.server = self._connect()
        listed = self.server.get("/models").get("data")
        found = listed if isinstance(listed, list) else []
        names = [str(model["id"]) for model in found if isinstance(model, Mapping) and "id" in model]
        if self.name is not None and self.name not in names:
            others = f"{', '.join(names[:10])}.{nearest(self.name, names)}"
            raise UserError(f"sampler.model={self.name} is not at {self.server.url}: it has {others}")
        if not names:
            raise UserError(f"sampler.base_url={self.server.url} lists no model")
        self.lm, self.eos, self.base = lm, frozenset(eos_ids), self.name or names[0]
        self.vocabulary = vocabulary_size(lm)
        context = getattr(unwrap(lm).config.get_text_config(), "max_position_embeddings", None)
        self.context = math.inf if context is None else context
        self.probe = Probe(lm, self.tolerance)
        self.mark, self.sent = "", None
        self.asleep = self.sleeps  # another engine of this run may have let it sleep
        self.versioned = self.weights == "folder"  # until the server says that it knows no versions

    def sync(self) -> None:
        """Bring the model's weights to the server where they have changed, and compare what it has with the model.

        Raises:
            UserError: the server did not take them, or has others.
        """
        if self.asleep:
            on_first_rank(partial(self.server.post, "//wake_up"))
            self.asleep = False
        marks = gather_objects(fingerprint(self.lm))
        mark = hashlib.sha256("".join(sorted(set(marks))).encode()).hexdigest()[:16]
        if mark == self.mark and self._problem() is None:
            return
        if self.weights != "served":
            state = whole_state(self.lm) if has_parts(self.lm) else None
            self.sent = on_first_rank(partial(self._send, mark, state))
        self.mark = mark
        if problem := self._problem():
            hint = "; sampler.weights=served sends none" if self.weights == "served" else ""
            raise UserError(f"{self.server.url} has other weights than the model: {problem}{hint}")

    def _send(self, mark: str, state: dict[str, Any] | None) -> str:
        """Write the weights, let the server load them, and return their name."""
        self._forget(retry=True)
        name = f"rlhf-{mark}-{secrets.token_hex(4)}"  # another run may send the same weights
        path = self.folder / name
        self._remove = weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)  # also when a run fails
        with atomic_folder(path) as temporary:
            if self.weights == "lora":
                Adapter(self.lm).save_pretrained(temporary)
            elif state is not None:
                unwrap(self.lm).save_pretrained(temporary, state_dict=state)
            else:
                merge_lora(self.lm).save_pretrained(temporary)
        self.sent = name
        try:
            if self.weights == "lora":
                self.server.post("/load_lora_adapter", lora_name=name, lora_path=str(path))
                return name
            self.server.post("//collective_rpc", method="reload_weights", kwargs={"weights_path": str(path)})
            self.server.post("//reset_prefix_cache")
        except ServerError as error:
            raise UserError(f"{error}; {self._needs()}" if error.status in MISSING else str(error)) from error
        try:
            self.server.post("//update_weight_version", new_version=mark)
        except ServerError as error:
            if error.status not in MISSING:
                raise
            self.versioned = False
        return name

    def _needs(self) -> str:
        """Return how a server is started that takes weights."""
        if self.weights == "lora":
            return "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
        return "start it with VLLM_SERVER_DEV_MODE=1"

    def _forget(self, retry: bool = False) -> None:
        """Unload the adapter that was sent before, and remove its folder."""
        if self.sent is None:
            return
        if self.weights == "lora":
            try:
                self.server.post("/unload_lora_adapter", retry=retry, lora_name=self.sent)
            except ServerError as error:  # a server that began again has none
                log.debug("%s was not unloaded: %s", self.sent, error)
        self._remove()
        self.sent = None

    def _problem(self) -> str | None:
        """Return why the server's weights are not the model's, the same on all ranks; None where they may be."""
        try:
            problem = self._other_mark() or self._other_logprobs()
        except UserError as error:
            problem = str(error)
        return next(filter(None, gather_objects(problem)), None)

    def _other_mark(self) -> str | None:
        """Return what the server calls its weights where that is not what was sent."""
        if self.weights == "lora":
            names = self.server.models()
            return None if self.sent in names else f"the adapter {self.sent} is not there"
        if not self.versioned:
            return None
        try:
            version = self.server.get("//weight_info").get("weight_version")
        except ServerError as error:
            if error.status not in MISSING:
                raise
            return None
        return None if version == self.mark else f"their version is {str(version)[:40]}, not {self.mark}"

    def _other_logprobs(self) -> str | None:
        # no EOS, so that the response has the same length every time, and no truncation
        asked = self._ask(self.probe.prompt, 1, self.probe.length, 1.0, 0, eos=frozenset(), top_k=0, top_p=1.0)
        ((tokens, _, logprobs),) = asked
        return self.probe.problem(tokens, logprobs)

    def sleep(self) -> None:
        """Let the server free its memory once all ranks are done with it, where it was asked to."""
        if self.sleeps and not self.asleep:
            on_first_rank(partial(self.server.post, "//sleep?level=1"))
            self.asleep = True

    def close(self) -> None:
        """Take back what was sent, and end the connection."""
        if self.server is not None:
            if is_first_rank():
                self._forget()
            self.server.close()
        self.server, self.lm, self.sent = None, None, None

    # ---- responses -------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int = 1,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed_parts: Sequence[int | str] = (0,),
        ids: Sequence[int] | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Generations:
        """Return `num_generations` responses to each prompt, see :meth:`Engine.generate`.

        The seed of response k to a prompt is one of `seed_parts` and the prompt's id, plus k.

        Raises:
            UserError: the server gave no answer, or one that cannot be right.
        """
        ids = list(range(len(prompts))) if ids is None else ids
        answers: list[Any] = [None] * len(prompts)

        def ask(place: int) -> list[Response]:
            seed = derive_seed(*seed_parts, ids[place]) % 2**31
            return self._ask(prompts[place], num_generations, max_new_tokens, temperature, seed)

        for place, found in concurrently(ask, range(len(prompts)), self.concurrency):
            if isinstance(found, Exception):
                raise found
            answers[place] = found
            if progress:
                progress(1)
        rows: list[Response] = [row for answer in answers for row in answer]
        return Generations([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])

    def _ask(
        self,
        prompt: Sequence[int],
        n: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        eos: frozenset[int] | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> list[Response]:
        """Return n responses to one prompt."""
        eos = self.eos if eos is None else eos
        limit = int(max(min(max_new_tokens, self.context - len(prompt)), 1))
        asked = n if temperature else 1  # the most likely response is the same each time, and vLLM refuses to repeat it
        answer = self.server.complete(
            model=self.sent if self.weights == "lora" else self.base,
            prompt=list(prompt),
            n=asked,
            max_tokens=limit,
            temperature=temperature,
            seed=seed,
            top_k=self.top_k if top_k is None else top_k,
            top_p=self.top_p if top_p is None else top_p,
            # the rest of what a server may take from the model's generation config
            min_p=0.0,
            repetition_penalty=1.0,
            ignore_eos=True,
            stop_token_ids=sorted(eos),
            return_token_ids=True,
            logprobs=0,
            skip_special_tokens=False,
        )
        choices = sorted(answer["choices"], key=lambda choice: _number(choice, "index"))
        if [_number(choice, "index") for choice in choices] != list(range(asked)):
            raise self._lied(f"{len(choices)} responses where {asked} were asked for")
        found = [self._checked(choice, prompt, limit, eos) for choice in choices]
        return found if temperature else found * n

    def _checked(self, choice: Any, prompt: Sequence[int], limit: int, eos: frozenset[int]) -> Response:
        """Return one response.

        Raises:
            UserError: it cannot be a response to this prompt.
        """
        tokens, read = choice.get("token_ids"), choice.get("prompt_token_ids")
        if not isinstance(tokens, list) or not isinstance(read, list):
            raise self._lied("text without token ids: sampler=vllm needs a vLLM that knows return_token_ids")
        if read != list(prompt):
            raise self._lied(f"a response to another prompt: it read {len(read)} tokens, {len(prompt)} were sent")
        if not all(type(token) is int and 0 <= token < self.vocabulary for token in tokens):
            raise self._lied(f"a token that is none of the model's {self.vocabulary}")
        if not 1 <= len(tokens) <= limit:
            raise self._lied(f"a response of {len(tokens)} tokens where 1 to {limit} were asked for")
        if any(token in eos for token in tokens[:-1]):
            raise self._lied("a response that goes on after EOS")
        ended, reason = tokens[-1] in eos, choice.get("finish_reason")
        if not ended and len(tokens) < limit and reason != "length":
            raise self._lied(f"a response of {len(tokens)} tokens without EOS (finish_reason={str(reason)[:20]})")
        logprobs = choice.get("logprobs")
        values = logprobs.get("token_logprobs") if isinstance(logprobs, Mapping) else None
        if not isinstance(values, list) or len(values) != len(tokens):
            raise self._lied(f"not one log-probability for each of {len(tokens)} sampled tokens")
        if not all(isinstance(value, int | float) and math.isfinite(value) and value <= 1e-3 for value in values):
            raise self._lied("a log-probability that is none")
        return tokens, ended, [float(value) for value in values]

    def _lied(self, what: str) -> UserError:
        return UserError(f"{self.server.url} cannot be used: it returned {what}")


def _number(choice: Any, name: str) -> int:
    """Return an integer of an object, -1 where there is none."""
    value = choice.get(name) if isinstance(choice, Mapping) else None
    return value if type(value) is int else -1
