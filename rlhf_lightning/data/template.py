"""Conversations to token ids and back, with the same tokens in training and in generation.

A conversation has the tokens that `apply_chat_template` gives it, up to the end of the turn that is learned; only
control tokens that a message spells out are encoded as text. The prompt of a demonstration is the prompt used for
sampling: the turns before the last, with the generation prompt.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from rlhf_lightning.data.chat_templates import own_template, tokenizer_template
from rlhf_lightning.data.encoding import START, Encoder, unmarked
from rlhf_lightning.data.records import Content, Message, RowError
from rlhf_lightning.data.rendering import Renderer, TemplateError
from rlhf_lightning.errors import UserError

Tools = list[Any] | None
JOINED = "the tokenizer joins the beginning of the response with the prompt"
REWRITTEN = "the chat template writes another prompt once an answer follows"
UNCLOSED = "the chat template drops the reasoning that its generation prompt opens; the learned response closes it"
SPELLED = "the text spells a control token, which stays text"
DIFFERS = (JOINED, REWRITTEN, UNCLOSED, SPELLED)
"""Why the tokens of a row are not those of `apply_chat_template`; the last is as it should be."""
MARK = "\ufdd20\ufdd3"
PROBE = "Every <word> & 'sign' of a \"message\" stays."
OPENED = re.compile(r"<(\w+)>\s*\Z")


class Conversation(NamedTuple):
    """Tokens of a conversation: its prompt, the response, which response tokens are learned.

    `differs` says why they are not those of `apply_chat_template`, None when they are.
    """

    prompt: list[int]
    response: list[int]
    loss_mask: list[bool]
    differs: str | None


class Template:
    """Encodes conversations for one tokenizer.

    Args:
        tokenizer: a Hugging Face fast tokenizer with an EOS token.
        template: "auto" for the tokenizer's own chat template, "chatml", "human_assistant", or "plain" (prompt and
            response one after the other, without roles).

    Raises:
        UserError: no EOS token, unknown template name, "auto" without a chat template, or a template that cannot write
            an answer to a user.
    """

    def __init__(self, tokenizer: Any, template: str = "auto") -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} has no EOS token, so a model could never learn to stop; set "
                "eos_token in its tokenizer_config.json"
            )
        self.tokenizer, self.name = tokenizer, template
        if template == "auto":
            self.source, self._with_tools = (tokenizer_template(tokenizer, tools) for tools in (False, True))
            self.exported = tokenizer.chat_template
        else:
            self.source = self._with_tools = self.exported = own_template(template, tokenizer)
        """`exported`: the chat template to save with a model, which gives "auto" the tokens of this one."""
        self.renderer = Renderer(tokenizer, self.source)
        same = self._with_tools == self.source
        self._renderer_with_tools = self.renderer if same else Renderer(tokenizer, self._with_tools)
        try:
            turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
            written = self._raw(turns, True)  # with the control tokens that the template puts together
            self.encoder = Encoder(tokenizer, self.source + self._with_tools + written)
            self.control = self.encoder.control
            self._probe()
        except RowError as error:
            raise UserError(f"the chat template cannot be used: {error}") from error

    def _probe(self) -> None:
        """Find what the template writes around an assistant's turn, and which token ends it."""
        roles = ("user", "assistant")
        shown = self._raw([{"role": role, "content": f"{role}: {PROBE}"} for role in roles], False)
        # a template for a model without capitals may fold them
        if lost := [role for role in roles if f"{role}: {PROBE}".casefold() not in shown.casefold()]:
            raise RowError(f"it leaves out the {lost[0]} message, or changes its text")
        user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARK}
        prompt, text = self._raw([user], True), self._raw([user, assistant], False)
        before, _, self._tail = text.partition(MARK)
        self._end_tokens = len(self.encoder.written(self._tail))
        self.end = [self.tokenizer.eos_token_id]
        if self._end_tokens:
            ids = self.encoder.ids(self._tail, first=False)
            self.end = ids[: next(i for i, token in enumerate(ids) if token in self.encoder.control_ids) + 1]
        self.eos_ids = {self.tokenizer.eos_token_id, self.end[-1], *self._end_of_call()}
        # what a turn has between the generation prompt and the message: nothing, a space, an empty reasoning block
        self._lead = before[len(prompt) :] if before.startswith(prompt) else ""
        self._lead_ids = self.encoder.ids(self._lead, first=False) if self.encoder.written(self._lead) else []
        self._lead_text = ""
        shown = self.decode(self.response("a"))[:-1]
        self._lead_text = shown if shown.isspace() else ""

    @property
    def ends(self) -> list[int]:
        """The tokens that end a response; the first is that of a plain answer."""
        return [self.end[-1], *sorted(self.eos_ids - {self.end[-1]})]

    def _end_of_call(self) -> list[int]:
        """Return the token that ends a turn with a tool call, which is another one in some templates."""
        call = {"type": "function", "id": "callcall1", "function": {"name": "f", "arguments": {"x": "1"}}}
        schema = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]}
        tools = [{"type": "function", "function": {"name": "f", "description": "f", "parameters": schema}}]
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            ends = self.encoder.written(self._raw(turns, False, tools))
        except RowError:  # a template without tools
            return []
        return [self.control[ends[-self._end_tokens][0]]] if 0 < self._end_tokens <= len(ends) else []

    @property
    def key(self) -> str:
        """Hash of everything that decides the tokens; the rendered turns also cover what a template inserts itself."""
        turns = self._raw([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}], True)
        parts = [self.tokenizer.backend_tokenizer.to_str(), self.source, self._with_tools, self._start(), self.end]
        return hashlib.sha256(repr([*parts, turns]).encode()).hexdigest()

    # ---- encoding --------------------------------------------------------------------------------------------------

    def prompt(self, content: Content, tools: Tools = None) -> list[int]:
        """Return the tokens up to the start of the assistant's turn."""
        if isinstance(content, str):
            return [*self._start(), *self.encoder.text(content)]
        text = self._render(content, True, tools)
        self._need_all(content, text, tools)
        return self.encoder.ids(text) or self._start()

    def response(self, answer: str | Message, prompt: Content | None = None, tools: Tools = None) -> list[int]:
        """Return the tokens of the assistant's turn after `prompt`, by default after a user's, and of its end."""
        content = [{"role": "user", "content": "Hi"}] if prompt is None else prompt
        return self.completions(content, [answer], tools)[1][0]

    def completions(
        self, prompt: Content, answers: Sequence[str | Message], tools: Tools = None
    ) -> tuple[list[int], list[list[int]], str | None]:
        """Return the tokens of a prompt, those of each answer to it, and why they differ from the chat template's."""
        if isinstance(prompt, str):
            texts = [answer if isinstance(answer, str) else answer["content"] for answer in answers]
            ids = [[*self.encoder.text(text, first=False), self.tokenizer.eos_token_id] for text in texts]
            return self.prompt(prompt), ids, None
        head = self._render(prompt, True, tools)
        turns = [answer if isinstance(answer, dict) else {"role": "assistant", "content": answer} for answer in answers]
        found = [self._final(head, [*prompt, turn], tools) for turn in turns]
        ids = found[0].prompt if found else self.prompt(prompt, tools)
        reasons = {one.differs for one in found} | {SPELLED if START in head else None}
        return ids, [one.response for one in found], next((reason for reason in DIFFERS if reason in reasons), None)

    def demonstration(
        self, content: Content, turns: str = "last", tools: Tools = None
    ) -> tuple[list[int], list[int], list[bool]]:
        """Return the first three of :meth:`conversation`."""
        return self.conversation(content, turns, tools)[:3]

    def conversation(self, content: Content, turns: str = "last", tools: Tools = None) -> Conversation:
        """Return the tokens of a conversation that ends with an assistant turn, or of a raw text (all is learned).

        Args:
            turns: "last" learns the last assistant turn, "all" every one, each with its end token; never those of
                weight 0, nor empty ones.
            tools: JSON schemas for the chat template.
        """
        if isinstance(content, str):
            ids = [*self.encoder.text(content), self.tokenizer.eos_token_id]
            return Conversation(self._start(), ids, [True] * len(ids), None)
        if turns not in ("last", "all"):
            raise UserError(f"data.turns={turns!r} is not one of: last, all")
        if turns == "last":
            if content[-1].get("weight", 1) == 0:
                raise RowError("the last assistant message has weight 0; data.turns=all learns those before it")
            head = self._render(content[:-1], True, tools) if len(content) > 1 else None
            return self._final(head, content, tools)
        return self._all_turns(content, tools)

    def _final(self, head: str | None, content: list[Message], tools: Tools) -> Conversation:
        """Return the conversation that learns its last turn; `head` is the rendered prompt."""
        head, tail, differs = self._split(head, content, tools)
        ids, response, as_whole = self.encoder.response(head, tail)
        response = [*response, *self._appended()]
        differs = differs or (None if as_whole else JOINED) or (SPELLED if START in head + tail else None)
        return Conversation(ids or self._start(), response, [True] * len(response), differs)

    def _all_turns(self, content: list[Message], tools: Tools) -> Conversation:
        """Return the conversation that learns every assistant turn, up to the last that is learned."""
        learned = [i for i, message in enumerate(content) if _is_learned(message)]
        if not learned:
            raise RowError("no assistant message is learned: every one is empty or has weight 0")
        content = content[: learned[-1] + 1]
        head = self._render(content[:-1], True, tools) if len(content) > 1 else None
        head, tail, differs = self._split(head, content, tools)
        spans = [self._span(head, content[:-1], i, tools) for i in learned[:-1]] + [(len(head), len(head + tail))]
        start, text = spans[0][0], head + tail
        prompt = self.encoder.ids(text[:start])
        ids, offsets = self.encoder.rendered(text)
        cuts = {begin for begin, _ in spans if any(a < begin < b for a, b in offsets)}
        if cuts or ids[: len(prompt)] != prompt:  # sampling begins between two tokens, so training does too
            places = sorted({0, start, *cuts, len(text)})
            parts = [(a, *self.encoder.rendered(text[a:b], first=not a)) for a, b in pairwise(places)]
            ids = [token for _, more, _ in parts for token in more]
            offsets = [(begin + a, begin + b) for begin, _, more in parts for a, b in more]
            differs = differs or JOINED
        ids, offsets = ids[len(prompt) :], offsets[len(prompt) :]
        flags = [any(begin <= a and b <= end for begin, end in spans) for a, b in offsets]
        ids, flags = [*ids, *self._appended()], [*flags, *[True] * len(self._appended())]
        differs = differs or (SPELLED if START in text else None)
        return Conversation(prompt or self._start(), ids, flags, differs)

    def _split(self, head: str | None, content: list[Message], tools: Tools) -> tuple[str, str, str | None]:
        """Return the rendered prompt, the last turn up to its end, and why they differ from the whole rendered."""
        text = self._render(content, False, tools)
        differs = None
        if head is None:  # the assistant opens the conversation
            head = text[: self._content_begins(text, content, tools)]
        if text.startswith(head):
            tail = text[len(head) :]
        else:
            tail, differs = self._another_prompt(head, text, content, tools)
        ends = self.encoder.written(tail)
        if self._end_tokens and len(ends) >= self._end_tokens:
            tail = tail[: ends[-self._end_tokens].end()]
        elif self._tail:
            tail = tail.removesuffix(self._tail)
        self._need_all(content, head + tail, tools)
        return head, tail, differs

    def _another_prompt(self, head: str, text: str, content: list[Message], tools: Tools) -> tuple[str, str]:
        """Return the last turn of `text` as it follows `head`, which `text` does not begin with."""
        opened = OPENED.search(head)
        if opened and text.startswith(head[: opened.start()]):
            body, tag = text[opened.start() :], opened[1]
            if body.lstrip().startswith(f"<{tag}>"):
                return body.lstrip()[len(tag) + 2 :], REWRITTEN
            message = self._marked(content[-1:])[0]
            inside = (message.get("content") or "").partition(f"</{tag}>")
            reasoning = message.get("reasoning_content") or (inside[0] if inside[1] else "")
            reasoning = reasoning.rpartition(f"<{tag}>")[2].strip()
            return "{}\n</{}>\n\n{}".format(reasoning, tag, body.lstrip("\n")), UNCLOSED
        return self._lead + text[self._content_begins(text, content, tools) :], REWRITTEN

    def _span(self, text: str, content: list[Message], place: int, tools: Tools) -> tuple[int, int]:
        """Return where a turn of a prompt begins and ends in its `text`, with an end token where sampling stops."""
        message = content[place]
        head = self._render(content[:place], True, tools) if place else ""
        if head and text.startswith(head):
            begin = len(head)
        else:
            begin = self._edges(text, content, place, message | {"content": MARK}, True, tools)[0]
        turn = self._render(content[: place + 1], False, tools)
        if text.startswith(turn):
            ends = [end for end in self.encoder.written(turn) if end.start() >= (begin or 0)]
            end = ends[-self._end_tokens] if 0 < self._end_tokens <= len(ends) else None
            stop = len(turn.removesuffix(self._tail))
        else:
            calls = message.get("tool_calls")
            other = {"tool_calls": [*calls[:-1], _renamed(calls[-1])[0]]} if calls else {"content": MARK}
            stop = self._edges(text, content, place, message | other, True, tools)[1]
            end = next((end for end in self.encoder.written(text) if end.start() >= (stop or 0)), None)
        if begin is None or stop is None:
            raise RowError("the chat template writes earlier turns differently from the prompt; use data.turns=last")
        if end is None:
            return begin, stop
        return begin, end.end() if self.control[end[0]] in self.eos_ids else end.start()

    def _edges(
        self, text: str, content: list[Message], place: int, other: Message, generation: bool, tools: Tools
    ) -> tuple[int | None, int | None]:
        """Return where MARK, with which `other` replaces the message at `place`, begins and ends in rendered `text`."""
        changed = list(content)
        changed[place] = other
        before, found, rest = self._render(changed, generation, tools).partition(MARK)
        return (
            len(before) if found and text.startswith(before) else None,
            len(text) - len(rest) if found and text.endswith(rest) else None,
        )

    def _content_begins(self, text: str, content: list[Message], tools: Tools) -> int:
        """Return where the content of the last message begins in rendered `text`."""
        begin = self._edges(text, content, -1, content[-1] | {"content": MARK}, False, tools)[0]
        if begin is None:
            raise RowError(
                "the chat template writes another prompt once this answer follows, such as another reasoning"
            )
        return begin

    def _appended(self) -> list[int]:
        """Return the end of a turn that the template leaves to the tokenizer."""
        return [] if self._end_tokens else self.end

    # ---- rendering -------------------------------------------------------------------------------------------------

    def _need_all(self, content: list[Message], text: str, tools: Tools) -> None:
        """Raise a RowError when the template leaves out a message, the last reasoning, tools or their calls."""
        text = unmarked(text)
        for place, message in enumerate(content):
            fields = ["content", "reasoning_content"] if message is content[-1] else ["content"]
            for name in fields:
                value = message.get(name) or ""
                if value.rpartition("</think>")[2].strip() in text:
                    continue
                other = [*content[:place], message | {name: MARK}, *content[place + 1 :]]
                if name == "reasoning_content" or MARK not in self._raw(self._marked(other), False, tools):
                    what = f"{name} of message {place + 1}, role {message['role']}"
                    raise RowError(f"the chat template leaves out the {what}")
        if tools or any(message.get("tool_calls") for message in content):
            renamed, names = _renamed([content, tools])
            written = self._raw(self._marked(renamed[0]), False, renamed[1])
            if lost := [name for mark, name in names.items() if mark not in written]:
                raise RowError(f"the chat template leaves out tools or tool calls: {', '.join(dict.fromkeys(lost))}")

    def _render(self, content: Sequence[Message], generation: bool, tools: Tools) -> str:
        """Return the rendered conversation with marks around control text in messages."""
        marked = None if tools is None else self.encoder.mark(tools)
        return self._raw(self._marked(content), generation, marked)

    def _marked(self, content: Sequence[Message]) -> list[Message]:
        return [{k: self.encoder.mark(v) for k, v in message.items() if k != "weight"} for message in content]

    def _raw(self, messages: list[Message], generation: bool, tools: Tools = None) -> str:
        try:
            return self.rendered(messages, tools, add_generation_prompt=generation)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RowError(f"the chat template refuses the roles {roles}: {error}") from error

    def rendered(self, messages: list[Message], tools: Tools = None, **options: Any) -> str:
        """Return the text that the chat template makes of messages, within the bounds of :class:`Renderer`."""
        renderer = self.renderer if tools is None else self._renderer_with_tools
        return renderer(messages, tools=tools, **options)

    def _start(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [bos if bos is not None else self.tokenizer.eos_token_id]

    # ---- decoding --------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of response tokens, without special tokens and without what the template writes around it."""
        ids, end, lead = list(ids), len(self.end), self._lead_ids
        ids = ids[:-end] if ids[-end:] == self.end else ids
        starts = [i + len(lead) for i in range(len(ids)) if lead and ids[i : i + len(lead)] == lead]
        text = self.encoder.decode([i for i in ids[max(starts, default=0) :] if i not in self.eos_ids])
        return text.removeprefix(self._lead_text)

    def content(self, text: str) -> list[int]:
        """Return the tokens of a text in which nothing is a control token."""
        return self.encoder.text(text)


def _is_learned(message: Message) -> bool:
    said = (
        any(message.get(name) for name in ("reasoning_content", "tool_calls")) or (message.get("content") or "").strip()
    )
    return message["role"] == "assistant" and message.get("weight", 1) != 0 and bool(said)


def _renamed(value: Any, names: dict[str, str] | None = None) -> tuple[Any, dict[str, str]]:
    """Return messages and tools with the name of every function replaced by a text that occurs nowhere else."""
    names = {} if names is None else names
    if isinstance(value, list):
        return [_renamed(item, names)[0] for item in value], names
    if isinstance(value, dict):
        other = {key: _renamed(item, names)[0] for key, item in value.items() if key in ("tool_calls", "function")}
        if isinstance(value.get("name"), str) and "role" not in value:
            mark = f"\ufdd2{len(names)}\ufdd3"
            names[mark] = value["name"]
            other["name"] = mark
        return value | other, names
    return value, names
