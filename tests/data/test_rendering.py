"""Chat templates within bounds: the same text as Hugging Face's, from a process that comes and goes."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_lightning.data import rendering
from rlhf_lightning.data.chat_templates import TEMPLATES, own_template
from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.rendering import Renderer, TemplateError
from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.tiny import build_tiny

TALK = [{"role": "user", "content": 'H\u00f6 <b> "there"\n'}, {"role": "assistant", "content": "\ue000 \U0001f600"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = build_tiny(tmp_path_factory.mktemp("tiny") / "model", ["a b c"], vocab_size=300, hidden_size=32, layers=1)
    return AutoTokenizer.from_pretrained(folder)


def worker(renderer: Renderer) -> int:
    assert renderer.process is not None
    return renderer.process[1]


@pytest.mark.parametrize("name", [*TEMPLATES, "auto"])
@pytest.mark.parametrize("generation", [False, True])
def test_the_text_is_that_of_the_tokenizer(tiny: Any, name: str, generation: bool) -> None:
    source = tiny.chat_template if name == "auto" else own_template(name, tiny)
    theirs = tiny.apply_chat_template(TALK, chat_template=source, tokenize=False, add_generation_prompt=generation)
    assert Renderer(tiny, source)(TALK, add_generation_prompt=generation) == theirs


def test_options_reach_the_template(tiny: Any) -> None:
    source = "{{ messages[0].content }} {{ tools[0].name }} {{ extra.a }} {{ eos_token }}"
    assert Renderer(tiny, source)(TALK[:1], tools=[{"name": "f"}], extra={"a": 1}).endswith(" f 1 <|eos|>")


def test_one_process_renders_until_it_is_idle_and_a_fork_has_its_own(tiny: Any) -> None:
    renderer = Renderer(tiny, own_template("plain", tiny))
    texts = {renderer(TALK), renderer(TALK)}
    first = worker(renderer)
    child = os.fork()
    if child == 0:
        os._exit(0 if renderer(TALK) in texts and worker(renderer) != first else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert renderer(TALK) in texts
    assert worker(renderer) == first
    os.kill(first, 0)  # alive
    renderer._end()
    assert renderer(TALK) in texts
    assert worker(renderer) != first
    second = worker(renderer)
    del renderer
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


def test_an_idle_process_ends_and_the_next_rendering_starts_another(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "IDLE_SECONDS", 0.0)
    renderer = Renderer(tiny, own_template("plain", tiny))
    assert len({renderer(TALK) for _ in range(3)}) == 1
    assert os.waitpid(worker(renderer), 0)[1] == 0
    assert renderer(TALK)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "bound"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "0 s"),
        ("{{ 'a' * 10**12 }}", "1024 MiB"),
        ("{% for i in range(99999) %}aa{% endfor %}", r"100\d\d\d characters"),
    ],
)
def test_what_exceeds_a_bound_is_named(tiny: Any, source: str, bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "CPU_SECONDS", 0.3)
    renderer = Renderer(tiny, source)
    for _ in range(2):  # the second time in another process
        with pytest.raises(UserError, match=f"takes more than {bound} for a conversation of 2 messages"):
            renderer(TALK)


def test_long_messages_are_no_long_output(tiny: Any) -> None:
    text = "word " * 200_000
    assert text in Renderer(tiny, own_template("chatml", tiny))([{"role": "user", "content": text}])


def test_what_the_template_says_is_passed_on(tiny: Any) -> None:
    with pytest.raises(TemplateError, match="^no system, please$"):
        Renderer(tiny, "{{ raise_exception('no system, please') }}")(TALK)


def test_a_system_message_that_is_left_out_is_told(tiny: Any) -> None:
    tiny = copy.deepcopy(tiny)
    tiny.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{{ eos_token }}{% endfor %}"
    template = Template(tiny)
    assert template.prompt(TALK[:1])
    with pytest.raises(RowError, match="leaves out the content of message 1, role system"):
        template.prompt([{"role": "system", "content": "Be brief."}, *TALK[:1]])
