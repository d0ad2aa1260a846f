"""Conversations to token ids and back, with the same tokens in training and in generation.

The chat template is rendered with a placeholder for every message; the template's own text is tokenized with its
control tokens, the messages' text without. So text from data never becomes a control token, the borders of every
turn are known exactly, and the prompt of a demonstration is by construction the prompt used for sampling.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from rlhf_lightning.data.control import control_tokens, forbidden_ids, without_control
from rlhf_lightning.data.records import Content, Message, RowError
from rlhf_lightning.data.rendering import Renderer, TemplateError
from rlhf_lightning.errors import UserError, nearest

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "human_assistant": (
        "{% for m in messages %}{% if m['role'] == 'user' %}\n\nHuman: {% elif m['role'] == 'assistant' %}"
        "\n\nAssistant: {% endif %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}\n\nAssistant: {% endif %}"
    ),
    "plain": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}
MARK = re.compile("\ue000(\\d+)\ue001")
PROBE = "Every <word> & 'sign' of a \"message\" stays.\ue001"


class Template:
    """Encodes conversations for one tokenizer.

    Args:
        tokenizer: a Hugging Face fast tokenizer with an EOS token.
        template: "auto" for the tokenizer's own chat template, "chatml", "human_assistant", or "plain" (prompt and
            response one after the other, without roles).

    Raises:
        UserError: no EOS token, unknown template name, or "auto" without a chat template.
    """

    def __init__(self, tokenizer: Any, template: str = "auto") -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} has no EOS token, so a model could never learn to stop; set "
                "eos_token in its tokenizer_config.json"
            )
        if template == "auto":
            if not tokenizer.chat_template:
                names = "|".join(TEMPLATES)
                raise UserError(
                    f"the tokenizer {tokenizer.name_or_path} has no chat template; choose one with "
                    f"data.template={names}"
                )
            self.source = str(tokenizer.chat_template)
        elif template in TEMPLATES:
            self.source = TEMPLATES[template]
        else:
            options = ["auto", *TEMPLATES]
            raise UserError(
                f"data.template={template!r} is not one of {', '.join(options)}.{nearest(template, options)}"
            )
        self.tokenizer, self.name = tokenizer, template
        self.renderer = Renderer(tokenizer, self.source)
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self.control = control_tokens(tokenizer, self.source + self._raw(("user", "assistant"), True))
        self._forbidden = forbidden_ids(tokenizer, self.control)
        self._control_pattern = re.compile(
            "|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) or r"(?!)"
        )
        # sentencepiece tokenizers put a space before the first word of every call; a newline in front absorbs it
        first = tokenizer.convert_ids_to_tokens(self._ids("a"))[0]
        self._anchor = self._ids("\n") if first.startswith("▁") else []
        with_special = tokenizer("a").input_ids
        bos = tokenizer.bos_token_id
        self._bos = [bos] if bos is not None and with_special[:1] == [bos] else []
        self._check_messages()
        self._layout = lru_cache(maxsize=1024)(self._render)
        self._trims = self.source != TEMPLATES["plain"] and " \ue0000\ue001" not in self._raw(("user",), False, pad=" ")
        self.end = self._end_of_turn()
        self.eos_ids = {tokenizer.eos_token_id, self.end[-1]}

    @property
    def key(self) -> str:
        """Hash of everything that decides the tokens; the rendered turns also cover what a template inserts itself."""
        turns = self._layout(("user", "assistant"), True)
        parts = [self.tokenizer.backend_tokenizer.to_str(), self.source, self.name, self._bos, self._start(), self.end]
        return hashlib.sha256(repr([*parts, turns]).encode()).hexdigest()

    @property
    def exported(self) -> str:
        """The chat template to save with a model, which gives "auto" the tokens of this one."""
        return "{{ bos_token }}" + self.source if self.name != "auto" and self._bos else self.source

    def prompt(self, content: Content) -> list[int]:
        """Return the tokens up to the start of the assistant's turn."""
        if isinstance(content, str):
            return [*self._start(), *self._inert(content, first=True)]
        ids = [token for _, tokens in self._pieces(content, True) for token in tokens]
        return ids or self._start()

    def response(self, text: str) -> list[int]:
        """Return the tokens of a final assistant turn and the token that ends it."""
        return [*self.content(text), *self.end]

    def demonstration(self, content: Content, turns: str = "last") -> tuple[list[int], list[int], list[bool]]:
        """Return prompt tokens, response tokens, and which response tokens are learned.

        Args:
            content: a conversation that ends with an assistant turn, or a raw text (all of it is learned).
            turns: "last" learns the last assistant turn, "all" every one, each with its end token.
        """
        if isinstance(content, str):
            ids = [*self._inert(content, first=True), self.tokenizer.eos_token_id]
            return self._start(), ids, [True] * len(ids)
        if turns not in ("last", "all"):
            raise UserError(f"data.turns={turns!r} is not one of: last, all")
        if turns == "last":
            response = self.response(content[-1]["content"])
            return self.prompt(content[:-1]), response, [True] * len(response)
        return self._all_turns(content)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of response tokens, without control tokens."""
        kept = [i for i in ids if i not in self.eos_ids]
        text = self.tokenizer.decode([*self._anchor, *kept], skip_special_tokens=True)
        return text[len(self.tokenizer.decode(self._anchor)) :] if self._anchor else text

    def content(self, text: str, first: bool = False) -> list[int]:
        """Return the tokens of a text in which nothing is a control token; `first` when nothing stands before it."""
        return self._inert(text.strip() if self._trims else text, first)

    def _inert(self, text: str, first: bool) -> list[int]:
        encode = self._ids if first else self._inner_ids
        parts = self._control_pattern.split(text)
        controls = self._control_pattern.findall(text)
        ids = encode(parts[0])
        for token, rest in zip(controls, parts[1:], strict=True):
            # cut inside the token's text, so that the tokenizer cannot see it whole
            ids += [*self._inner_ids(token[:1]), *self._inner_ids(token[1:]), *self._inner_ids(rest)]
        if self._forbidden.isdisjoint(ids):
            return ids
        return without_control(self.tokenizer, text, self._inner_ids, self._forbidden)

    def _all_turns(self, content: list[Message]) -> tuple[list[int], list[int], list[bool]]:
        first = next(i for i, m in enumerate(content) if m["role"] == "assistant")
        prompt = self.prompt(content[:first])
        ids: list[int] = []
        flags: list[bool] = []
        follows_assistant = False
        for piece, tokens in self._pieces(content, False):
            if isinstance(piece, int):
                follows_assistant = content[piece]["role"] == "assistant"
                flags += [follows_assistant] * len(tokens)
            else:
                ended = follows_assistant and tokens[: len(self.end)] == self.end
                flags += [ended and i < len(self.end) for i in range(len(tokens))]
                follows_assistant = False
            ids += tokens
        last = max(i for i, flag in enumerate(flags) if flag) + 1
        ids, flags = ids[:last], flags[:last]
        if ids[-len(self.end) :] != self.end:
            ids, flags = ids + self.end, flags + [True] * len(self.end)
        if ids[: len(prompt)] != prompt:
            raise RowError("the chat template renders earlier turns differently from the prompt; use data.turns=last")
        return prompt, ids[len(prompt) :], flags[len(prompt) :]

    def _pieces(
        self, content: Sequence[Message], generation: bool
    ) -> Iterator[tuple[int | tuple[int, ...], list[int]]]:
        """Yield each piece of the rendered template with its tokens; a BOS the template leaves out comes first."""
        layout = self._layout(tuple(m["role"] for m in content), generation)
        if self.name != "auto" and self._bos and layout and layout[0] != tuple(self._bos):
            yield tuple(self._bos), list(self._bos)
        first = True
        for piece in layout:
            if isinstance(piece, int):
                yield piece, self.content(content[piece]["content"], first)
            else:
                yield piece, list(piece)
            first = first and piece == tuple(self._bos)

    def _render(self, roles: tuple[str, ...], generation: bool) -> list[int | tuple[int, ...]]:
        """Return the template as pieces: a message number, or the token ids of the template's own text."""
        text = self._raw(roles, generation)
        pieces: list[int | tuple[int, ...]] = []
        for number, part in enumerate(MARK.split(text)):
            if number % 2:
                pieces.append(int(part))
            elif part:
                pieces.append(tuple(self._template_ids(part, first=number == 0)))
        if lost := [number for number in range(len(roles)) if number not in pieces]:
            raise RowError(
                f"the chat template leaves out message {lost[0] + 1} ({roles[lost[0]]}), or changes its text"
            )
        return pieces

    def _raw(self, roles: tuple[str, ...], generation: bool, pad: str = "", probe: str = "") -> str:
        messages = [{"role": role, "content": f"{pad}\ue000{i}\ue001{probe}"} for i, role in enumerate(roles)]
        try:
            return self.renderer(messages, add_generation_prompt=generation)
        except TemplateError as error:
            raise RowError(f"the chat template refuses the roles {', '.join(roles)}: {error}") from error

    def _check_messages(self) -> None:
        """Raise a UserError when the template leaves out a message or changes its text: such tokens teach nothing."""
        text = self._raw(("user", "assistant"), False, probe=PROBE)
        for number, role in enumerate(("user", "assistant")):
            if f"\ue000{number}\ue001{PROBE}" not in text:
                raise UserError(
                    f"the chat template of {self.tokenizer.name_or_path} leaves out the {role} message, or changes its "
                    f"text; choose another with data.template={'|'.join(TEMPLATES)}"
                )

    def _end_of_turn(self) -> list[int]:
        """Return the template's tokens after an assistant turn up to its control token, or EOS."""
        tail = MARK.split(self._raw(("user", "assistant"), False))[-1]
        ids = self._template_ids(tail, first=False) if tail else []
        control = set(self.control.values())
        for place, token in enumerate(ids):
            if token in control:
                return ids[: place + 1]
        return [self.tokenizer.eos_token_id]

    def _start(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [bos if bos is not None else self.tokenizer.eos_token_id]

    def _template_ids(self, text: str, first: bool) -> list[int]:
        return self._ids(text) if first or text.startswith(tuple(self.control)) else self._inner_ids(text)

    def _inner_ids(self, text: str) -> list[int]:
        if not self._anchor or not text:
            return self._ids(text)
        ids = self._ids("\n" + text)
        return ids[len(self._anchor) :] if ids[: len(self._anchor)] == self._anchor else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        # calling the tokenizer itself takes twice as long
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids if text else []
