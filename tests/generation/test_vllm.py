"""The vLLM engine against a test double of its server: the right calls, and servers that are stale, lie or fail."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Generations
from rlhf_lightning.generation.vllm import VLLMEngine
from rlhf_lightning.models.adapters import add_lora
from rlhf_lightning.ops.seeding import derive_seed
from tests.helpers.models import tiny_config
from tests.helpers.openai_server import FakeServer, Sent
from tests.helpers.vllm_double import logprobs, vllm_double

pytestmark = pytest.mark.slow
PROMPTS, EOS = [[1, 5, 6, 7], [1, 9], [1, 20, 21]], [2, *range(8, 64, 6)]


def model(scale: float = 1.0, **changes: Any) -> Any:
    """Return a model with logits as far apart as a trained one's."""
    torch.manual_seed(0)
    lm = LlamaForCausalLM(tiny_config(initializer_range=0.2, **changes)).eval()
    with torch.no_grad():
        lm.get_input_embeddings().weight.mul_(scale)
    return lm


@pytest.fixture(scope="module")
def base() -> Any:
    return model()


def update(lm: Any, size: float = 0.5) -> None:
    """Move the weights that train."""
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))


def engine(server: FakeServer, folder: Path, **options: Any) -> VLLMEngine:
    return VLLMEngine(server.url, folder=folder, **{"timeout": 20, "retries": 0} | options)


def started(server: FakeServer, folder: Path, lm: Any, **options: Any) -> VLLMEngine:
    found = engine(server, folder, **options)
    found.start(lm, EOS)
    found.sync()
    return found


def paths(server: FakeServer) -> list[str]:
    """Return the paths that were asked, without completions."""
    return [path for path, _, _ in server.seen if path != "/v1/completions"]


def completions(server: FakeServer) -> list[Any]:
    """Return the bodies of the requests for responses, without those of the probe."""
    found = [body for path, _, body in server.seen if path == "/v1/completions"]
    return [body for body in found if body["stop_token_ids"]]


def test_responses_are_token_ids_of_requests_that_a_repeated_run_repeats(base: Any, tmp_path: Path) -> None:
    with vllm_double(base) as (_, server):
        one = started(server, tmp_path, base, weights="served", top_k=7, top_p=0.9)
        done: list[int] = []
        asked: dict[str, Any] = {
            "max_new_tokens": 8,
            "temperature": 0.7,
            "seed_parts": (3, "train", 1),
            "ids": [4, 9, 2],
        }
        found = one.generate(PROMPTS, 3, progress=done.append, **asked)
        assert found == one.generate(PROMPTS, 3, **asked)
        assert len(found.responses) == len(found.finished) == 9
        assert sum(done) == 3
        assert {True, False} == set(found.finished)
        for response, finished in zip(found.responses, found.finished, strict=True):
            assert finished == (response[-1] in EOS)
            assert len(response) == 8 or finished
        assert found.logprobs is not None
        expected = [logprobs(base, PROMPTS[i // 3], y, 0.7) for i, y in enumerate(found.responses)]
        for given, values in zip(found.logprobs, expected, strict=True):
            assert given == pytest.approx(values, abs=1e-5)
        bodies = sorted(completions(server)[:3], key=lambda body: PROMPTS.index(body["prompt"]))
        for body, prompt, number in zip(bodies, PROMPTS, (4, 9, 2), strict=True):
            assert body["prompt"] == prompt
            assert body["seed"] == derive_seed(3, "train", 1, number) % 2**31
            assert (body["n"], body["max_tokens"], body["temperature"]) == (3, 8, 0.7)
            assert (body["stop_token_ids"], body["ignore_eos"], body["return_token_ids"]) == (EOS, True, True)
            # a server would take these from the model's generation config
            assert (body["top_k"], body["top_p"], body["min_p"], body["repetition_penalty"]) == (7, 0.9, 0.0, 1.0)
        probe = next(body for path, _, body in server.seen if path == "/v1/completions")
        assert (probe["top_k"], probe["top_p"], probe["temperature"]) == (0, 1.0, 1.0)


def test_greedy_responses_are_asked_for_once(base: Any, tmp_path: Path) -> None:
    """vLLM refuses n > 1 with temperature 0."""
    with vllm_double(base) as (_, server):
        one = started(server, tmp_path, base, weights="served")
        found = one.generate(PROMPTS, 2, max_new_tokens=5, temperature=0)
        assert {body["n"] for body in completions(server)} == {1}
        assert found.responses[0::2] == found.responses[1::2]
        assert one.generate([], 2, max_new_tokens=5) == Generations([], [], [])


def test_no_response_is_asked_for_beyond_the_context(tmp_path: Path) -> None:
    lm = model(max_position_embeddings=64)
    with vllm_double(lm) as (_, server):
        one = started(server, tmp_path, lm, weights="served")
        one.generate([[1] * 60], 1, max_new_tokens=50)
        assert [body["max_tokens"] for body in completions(server)] == [4]


@pytest.mark.parametrize("weights", ["folder", "lora"])
def test_the_server_gets_the_weights_of_the_moment(weights: str, tmp_path: Path) -> None:
    lm: Any = model()
    with vllm_double(lm) as (double, server):
        if weights == "lora":
            lm = add_lora(lm, r=2)
        one = started(server, tmp_path, lm, weights=weights)
        for number in range(2):
            update(lm)
            before = len(paths(server))
            one.sync()
            assert len(paths(server)) > before
            (name,) = [path.name for path in tmp_path.iterdir()]
            served = double.lm if weights == "folder" else double.adapters[name]
            ids = torch.tensor([[1, 5, 6, 7]])
            torch.testing.assert_close(served(ids).logits, lm.eval()(ids).logits)
            if weights == "lora":
                assert list(double.adapters) == [name]
            else:
                assert double.version in name
            changed = ("/v1/load_lora_adapter", "/collective_rpc")
            one.sync()  # nothing has changed
            assert sum(path in changed for path in paths(server)) == 2 + number
            found = one.generate(PROMPTS, 1, max_new_tokens=4)
            assert found.logprobs is not None
            torch.testing.assert_close(found.logprobs[0], logprobs(lm, PROMPTS[0], found.responses[0], 1.0))
        if weights == "folder":
            assert "/reset_prefix_cache" in paths(server)
        one.close()
        assert list(tmp_path.iterdir()) == []
        assert double.adapters == {}


def test_an_adapter_is_merged_into_whole_weights(tmp_path: Path) -> None:
    lm: Any = model()
    with vllm_double(lm) as (double, server):
        lm = add_lora(lm, r=2)
        update(lm)
        started(server, tmp_path, lm, weights="folder")
        ids = torch.tensor([[1, 5, 6, 7]])
        torch.testing.assert_close(double.lm(ids).logits, lm.eval()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["folder", "lora"])
def test_a_server_that_keeps_old_weights_is_found(weights: str, tmp_path: Path) -> None:
    lm: Any = model()
    with vllm_double(lm) as (double, server):
        lm = add_lora(lm, r=2) if weights == "lora" else lm
        one = started(server, tmp_path, lm, weights=weights)
        double.stale = True
        update(lm)
        with pytest.raises(
            UserError, match=r"has other weights than the model: its log-probabilities of a probe are off by"
        ):
            one.sync()


def test_a_small_update_that_a_server_does_not_make_is_found(tmp_path: Path) -> None:
    """Below what other kernels and bfloat16 may differ by: but then the server's numbers move, too."""
    lm = model()
    with vllm_double(lm) as (double, server):
        one = started(server, tmp_path, lm)
        update(lm, 2e-3)
        one.sync()
        double.stale = True
        update(lm, 2e-3)
        with pytest.raises(UserError, match=r"stayed the same while the model's moved by 0\."):
            one.sync()


def test_weights_of_another_run_are_replaced(tmp_path: Path) -> None:
    lm, other = model(), model(0.5)
    with vllm_double(lm) as (double, server):
        one = started(server, tmp_path / "one", lm)
        two = started(server, tmp_path / "two", other)
        sent = paths(server).count("/collective_rpc")
        one.sync()
        assert paths(server).count("/collective_rpc") == sent + 1
        assert double.version == one.mark != two.mark
        double.missing = ("/weight_info", "/update_weight_version")  # a server that knows no versions
        started(server, tmp_path / "two", other)
        one.sync()
        torch.testing.assert_close(double.lm.state_dict(), lm.state_dict())


def test_a_server_that_has_the_model_is_left_alone(base: Any, tmp_path: Path) -> None:
    with vllm_double(base) as (_, server):
        one = started(server, tmp_path, base, weights="served")
        one.close()
        assert paths(server) == ["/v1/models"]
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(UserError, match=r"has other weights than the model: .* sampler\.weights=served sends none"):
            started(server, tmp_path, model(0.5), weights="served")


def test_a_server_sleeps_between_rollouts(base: Any, tmp_path: Path) -> None:
    with vllm_double(base) as (double, server):
        one = started(server, tmp_path, base, weights="served", sleep=True)
        one.sleep()
        assert double.asleep
        one.sleep()
        one.sync()
        assert not double.asleep
        assert paths(server)[1:] == ["/sleep?level=1", "/wake_up"]
        awake = started(server, tmp_path, base, weights="served")
        awake.sleep()
        assert not double.asleep


@pytest.mark.parametrize(
    ("options", "missing", "message"),
    [
        ({}, "/collective_rpc", r"answered 404 .*; start it with VLLM_SERVER_DEV_MODE=1$"),
        (
            {"weights": "lora"},
            "/v1/load_lora_adapter",
            r"start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-",
        ),
        ({"model": "bas"}, "", r"^sampler\.model=bas is not at http.*: it has base\. Did you mean 'base'\?$"),
        ({}, "/v1/models", r"/v1 answered 404 Not Found"),
    ],
)
def test_what_a_server_lacks_is_one_line(options: dict[str, Any], missing: str, message: str, tmp_path: Path) -> None:
    lm: Any = model()
    with vllm_double(lm, missing=(missing,)) as (_, server), pytest.raises(UserError, match=message) as caught:
        started(server, tmp_path, add_lora(lm, r=2) if "weights" in options else lm, **options)
    assert "\n" not in str(caught.value)


def changed(**parts: Any) -> Any:
    """Return a change of every choice of a response."""

    def change(path: str, body: Any, answer: Any) -> Any:
        if path == "/v1/completions" and body["stop_token_ids"]:
            for choice in answer["choices"]:
                choice |= {name: value(choice) if callable(value) else value for name, value in parts.items()}
        return answer

    return change


def answered(sent: Any) -> Any:
    """Return a change of every answer to a request for responses."""
    return lambda path, body, answer: sent if path == "/v1/completions" and body["stop_token_ids"] else answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(token_ids=None), "it returned text without token ids: .* return_token_ids"),
        (changed(prompt_token_ids=[1, 2]), r"it returned a response to another prompt: it read 2 tokens, \d were sent"),
        (changed(token_ids=[64]), "it returned a token that is none of the model's 64"),
        (changed(token_ids=[True]), "it returned a token that is none"),
        (changed(token_ids=["5"]), "it returned a token that is none"),
        (changed(token_ids=[]), "it returned a response of 0 tokens where 1 to 6 were asked for"),
        (changed(token_ids=[5] * 7), "it returned a response of 7 tokens where 1 to 6 were asked for"),
        (changed(token_ids=[2, 5, 5, 5, 5, 5]), "it returned a response that goes on after EOS"),
        (changed(token_ids=[5], finish_reason="stop"), r"a response of 1 tokens without EOS \(finish_reason=stop\)"),
        (changed(index=0), "it returned 2 responses where 2 were asked for"),
        (answered({"choices": []}), "it returned 0 responses where 2 were asked for"),
        (answered({"choices": [None, None]}), "it returned 2 responses where 2 were asked for"),
        (changed(logprobs=None), r"it returned not one log-probability for each of \d sampled tokens"),
        (changed(logprobs={"token_logprobs": [0.0] * 99}), "not one log-probability for each"),
        (changed(logprobs=lambda c: {"token_logprobs": [float("nan")] * len(c["token_ids"])}), "log-probability that is none"),
        (changed(logprobs=lambda c: {"token_logprobs": [0.5] * len(c["token_ids"])}), "log-probability that is none"),
        (changed(logprobs=lambda c: {"token_logprobs": ["0"] * len(c["token_ids"])}), "log-probability that is none"),
        (answered(Sent(b"<html>", 200)), "its answer is no JSON"),
        (answered(Sent(b"", 500)), "answered 500 Internal Server Error"),
        (answered(Sent({"error": "slow down"}, 429)), "answered 429 Too Many Requests"),
        (answered(Sent({"error": "the prompt is too long"}, 400)), "answered 400 Bad Request: .*too long"),
    ],
)  # fmt: skip
def test_a_lying_server_is_one_line(base: Any, change: Any, message: str, tmp_path: Path) -> None:
    with vllm_double(base, change=change) as (_, server):
        one = started(server, tmp_path, base, weights="served")
        with pytest.raises(UserError, match=message) as caught:
            one.generate(PROMPTS, 2, max_new_tokens=6)
    assert "\n" not in str(caught.value)
    assert server.url in str(caught.value)


def test_what_passes_is_waited_for(base: Any, tmp_path: Path) -> None:
    seen: list[str] = []

    def change(path: str, body: Any, answer: Any) -> Any:
        seen.append(path)
        return answer if len(seen) % 2 == 0 else Sent({"error": "slow down"}, 429, {"retry-after": "0"})

    with vllm_double(base, change=change) as (_, server):
        one = started(server, tmp_path, base, weights="served", retries=3)
        assert len(one.generate(PROMPTS, 2, max_new_tokens=4).responses) == 6


def test_a_dead_server_is_one_line(base: Any, tmp_path: Path) -> None:
    with vllm_double(base) as (_, server):
        one = started(server, tmp_path, base)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+/v1 cannot be used: ") as caught:
        one.generate(PROMPTS, 2, max_new_tokens=4)
    assert "\n" not in str(caught.value)
    one.close()  # and the end of the run does not wait for it
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "lorra"}, r"^sampler\.weights=lorra is not one of lora, folder, served\. Did you mean 'lora'\?$"),
        ({"base_url": "127.0.0.1:8000"}, r"^sampler\.base_url=127\.0\.0\.1:8000 is not a URL"),
        ({"base_url": "http://user:pass@host/v1"}, r"is not a URL"),
        ({"concurrency": 0}, r"^sampler\.concurrency=0 "),
        ({"tolerance": 0}, r"^sampler\.tolerance=0 "),
        ({"timeout": 0}, r"^sampler\.timeout=0 "),
        ({"retries": -1}, r"^sampler\.retries=-1 "),
        ({"top_p": 0.0}, r"^sampler\.top_p=0.0 "),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VLLMEngine(**{"base_url": "http://127.0.0.1:9/v1"} | options)


def test_only_an_adapter_is_sent_as_one(base: Any) -> None:
    with pytest.raises(UserError, match=r"^sampler\.weights=lora sends the LoRA adapter, and the model has none: "):
        VLLMEngine("http://127.0.0.1:9/v1", weights="lora").start(base, EOS)


def test_a_copy_for_another_process_has_no_connection() -> None:
    copy.deepcopy(VLLMEngine("http://127.0.0.1:9/v1"))
