"""The model under probe: answers by seed, key and place, forced beginnings, log-probabilities, the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.data.messages import Message
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.probes.probe import Subject
from rlhf_lightning.evaluation.probes.running import load_subject

ASKED: list[list[Message]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
]


def test_answers_depend_on_seed_key_and_place(chat_folder: Path, subject: Subject) -> None:
    first = subject.answer(ASKED, "a", num_generations=2)
    assert len(first) == 4
    assert first == subject.answer(ASKED, "a", num_generations=2)
    assert first[:2] == subject.answer(ASKED[:1], "a", num_generations=2)
    assert first != subject.answer(ASKED, "b", num_generations=2)
    other = load_subject(str(chat_folder), max_new_tokens=8, seed=1)
    assert first != other.answer(ASKED, "a", num_generations=2)
    greedy = subject.answers(ASKED, "a", temperature=0, max_new_tokens=3)
    assert all(len(ids) <= 3 for ids in greedy.token_ids)
    assert greedy.texts == subject.answer(ASKED, "b", temperature=0, max_new_tokens=3)


def test_a_forced_beginning_is_part_of_the_response_and_decides_the_rest(subject: Subject) -> None:
    found = subject.answers(ASKED, "p", prefixes=["The capital", ""], temperature=0)
    assert found.texts[0].startswith("The capital")
    assert found.texts[1] == subject.answer(ASKED, "p", temperature=0)[1]
    tokens = found.token_ids[0]
    again = subject.answers(ASKED[:1], "p", prefixes=[tokens[:-4]], temperature=0, max_new_tokens=4)
    assert again.token_ids[0] == tokens  # greedy: the same tokens follow
    learned = subject.template.completions(ASKED[0], ["The capital of France is Paris."])[1][0]
    assert tokens[: len(learned)][:3] == learned[:3]  # the tokens that a response that begins so is learned with


def test_logprobs_are_those_of_a_whole_forward_pass(subject: Subject) -> None:
    (found,) = subject.logprobs(ASKED[:1], ["Paris."])
    prompt, (tokens,), _ = subject.template.completions(ASKED[0], ["Paris."])
    with torch.no_grad():
        logits = subject.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
    expected = torch.stack([logits[len(prompt) + i - 1, token] for i, token in enumerate(tokens)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (same,) = subject.logprobs(ASKED[:1], [tokens])
    torch.testing.assert_close(same, found)
    (reference,) = subject.logprobs(ASKED[:1], ["Paris."], of="reference")
    torch.testing.assert_close(reference, found)
    (text,) = subject.logprobs([""], ["Paris."])  # a text without roles
    assert len(text) == len(subject.template.content("Paris.")) + 1


def test_the_reference_answers_once(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = load_subject(str(chat_folder), max_new_tokens=4, reference=str(chat_folder))
    before = subject.reference
    assert before is not None
    assert before is subject.reference
    first = before.answer(ASKED, "r")
    monkeypatch.setattr(before.engine, "generate", lambda *_, **__: pytest.fail("asked again"))
    assert before.answer(ASKED, "r") == first
    assert load_subject(str(chat_folder)).reference is None


def test_the_mode_of_the_model_is_left_alone(subject: Subject) -> None:
    subject.model.train()
    subject.answer(ASKED, "m")
    subject.logprobs(ASKED[:1], ["Paris."])
    assert subject.model.training
    subject.model.eval()


def test_progress_counts_the_answers(chat_folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    subject = load_subject(str(chat_folder), max_new_tokens=2, progress=lambda *state: seen.append(state))
    subject.answer(ASKED, "count")
    assert seen[-1] == ("count", 2, 2)


@pytest.mark.parametrize(
    ("conversation", "options", "message"),
    [
        (ASKED[0], {"max_new_tokens": 600}, r"conversation 1 has \d+ tokens, and the model reads at most 512"),
        ([{"role": "user", "content": "x \ufdd0"}], {}, "conversation 1: .*U.FDD0"),
    ],
)
def test_a_conversation_without_an_answer(subject: Subject, conversation: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        subject.answer([conversation], "e", **options)


def test_a_response_that_is_too_long_for_the_model(subject: Subject) -> None:
    with pytest.raises(UserError, match="conversation 1 and its response have .* at most 512"):
        subject.logprobs(ASKED[:1], ["Paris " * 600])
