"""A test double of a vLLM server: its HTTP calls on loopback, answered by the engine in this process. It is no vLLM.

It has the calls of vLLM 0.29 to 0.32 that `generation/vllm.py` makes, as documented: completions with token ids, LoRA
adapters at run time, `reload_weights` from a folder, weight versions, sleep.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file

from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.models.adapters import quiet_peft
from tests.helpers.openai_server import FakeServer, Sent, serve

PATHS = (
    "/v1/models", "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/collective_rpc",
    "/reset_prefix_cache", "/update_weight_version", "/weight_info", "/sleep?level=1", "/wake_up",
)  # fmt: skip


@dataclass
class Double:
    """A server with a model and, by name, copies of it with an adapter.

    `stale` accepts weights and keeps the old ones. `missing` are paths it does not have. `change(path, body, answer)`
    returns what is sent instead of a right answer; it also sees what is not answered rightly.
    """

    lm: Any
    stale: bool = False
    missing: tuple[str, ...] = ()
    change: Callable[[str, Any, Any], Any] = lambda path, body, answer: answer
    adapters: dict[str, Any] = field(default_factory=dict)
    version: str = "default"
    asleep: bool = False
    mutex: Any = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.lm = copy.deepcopy(self.lm).eval()

    def __call__(self, path: str, body: Any, number: int) -> Any:
        if path not in PATHS or path in self.missing:
            return Sent({"detail": "Not Found"}, 404)
        with self.mutex:
            answer = getattr(self, path.partition("?")[0].rpartition("/")[2])(body or {})
            return self.change(path, body, answer)

    def models(self, body: Any) -> Any:
        return {"object": "list", "data": [{"id": name} for name in ("base", *self.adapters)]}

    def load_lora_adapter(self, body: Any) -> Any:
        with quiet_peft():
            adapted = PeftModel.from_pretrained(copy.deepcopy(self.lm), body["lora_path"]).eval()
        self.adapters[body["lora_name"]] = self.lm if self.stale else adapted
        return Sent(b"Success: LoRA adapter added successfully.")

    def unload_lora_adapter(self, body: Any) -> Any:
        if self.adapters.pop(body["lora_name"], None) is None:
            return Sent({"error": {"message": "not found"}}, 404)
        return Sent(b"Success: LoRA adapter removed successfully.")

    def collective_rpc(self, body: Any) -> Any:
        assert body["method"] == "reload_weights"
        weights = load_file(Path(body["kwargs"]["weights_path"], "model.safetensors"))
        if not self.stale:
            self.lm.load_state_dict(weights, strict=False)  # tied weights are written once
            self.lm.tie_weights()
        return {"results": [None]}

    def reset_prefix_cache(self, body: Any) -> Any:
        return Sent(b"")

    def update_weight_version(self, body: Any) -> Any:
        self.version = body["new_version"]
        return {"success": True, "new_version": self.version}

    def weight_info(self, body: Any) -> Any:
        return {"weight_version": self.version}

    def sleep(self, body: Any) -> Any:
        self.asleep = True
        return Sent(b"")

    def wake_up(self, body: Any) -> Any:
        self.asleep = False
        return Sent(b"")

    def completions(self, body: Any) -> Any:
        if self.asleep:
            return Sent({"error": {"message": "the engine sleeps"}}, 500)
        lm = self.lm if body["model"] == "base" else self.adapters.get(body["model"])
        if lm is None:
            return Sent({"error": {"message": f"The model {body['model']} does not exist."}}, 404)
        prompt, eos = body["prompt"], body["stop_token_ids"]
        engine = LocalEngine(top_k=body["top_k"], top_p=body["top_p"], static=False)
        engine.start(lm, eos)
        found = engine.generate(
            [prompt], body["n"], max_new_tokens=body["max_tokens"], temperature=body["temperature"],
            seed_parts=(body["seed"],), ids=[0],
        )  # fmt: skip
        choices = [
            {
                "index": index, "text": "", "token_ids": tokens, "prompt_token_ids": prompt,
                "finish_reason": "stop" if ended else "length",
                "logprobs": {"token_logprobs": logprobs(lm, prompt, tokens, body["temperature"]), "tokens": []},
            }
            for index, (tokens, ended) in enumerate(zip(found.responses, found.finished, strict=True))
        ]  # fmt: skip
        return {"id": "cmpl-x", "object": "text_completion", "model": body["model"], "choices": choices[::-1]}


@torch.no_grad()
def logprobs(lm: Any, prompt: list[int], tokens: list[int], temperature: float) -> list[float]:
    """Return the processed log-probabilities of a response's tokens."""
    ids = torch.tensor([[*prompt, *tokens]])
    logits = lm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / (temperature or 1.0)
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1).tolist()


@contextmanager
def vllm_double(lm: Any, **options: Any) -> Iterator[tuple[Double, FakeServer]]:
    """Serve a copy of `lm`."""
    double = Double(lm, **options)
    with serve(double) as server:
        yield double, server
