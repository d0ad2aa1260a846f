"""Text to token ids, where text from data never becomes a control token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from rlhf_lightning.data.records import RowError

Encoding = tuple[list[int], list[tuple[int, int]]]
"""Token ids, and where in the text each begins and ends."""

MARKER = re.compile(r"<[^<>\s{}]+>|\[/?[A-Z_]+\]")
"""How the markers of turns look."""
START, END = "\ufdd0", "\ufdd1"
"""Noncharacters around control text in a message; a single one only keeps the characters beside it apart."""


def control_tokens(tokenizer: Any, source: str) -> dict[str, int]:
    """Return the tokens that only the chat template may write, with their ids: special ones and markers of turns.

    Added tokens that are not special are markers when the template contains them and they look like one
    (`<｜User｜>`). White space (Gemma's newlines), words, and tags in pairs (`<think>`, `</tool_call>`) are text that
    an assistant may write. Markers that a vocabulary has like any other piece are control tokens, too.
    """
    added = {str(token): (number, token.special) for number, token in tokenizer.added_tokens_decoder.items()}

    def marks_turns(text: str) -> bool:
        inner = text.strip("<>/")
        pair = text.startswith("<") and {f"<{inner}>", f"</{inner}>"} <= added.keys()
        bracketed = len(text) > 2 and not (text[0].isalnum() or text[-1].isalnum())
        return text in source and not text.isspace() and bracketed and not pair

    control = {text: number for text, (number, special) in added.items() if special or marks_turns(text)}
    control |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    vocabulary = tokenizer.get_vocab()
    pieces = {text for text in MARKER.findall(source) if text in vocabulary and text not in added}
    return control | {text: vocabulary[text] for text in pieces if f"</{text.strip('<>/')}>" not in vocabulary}


class Encoder:
    """Encodes with the tokenizer of a chat template.

    Messages are marked before the template is rendered; in the rendered text, control text with marks is encoded as
    plain text and all other control text, which the template wrote, as tokens.

    Args:
        tokenizer: a Hugging Face fast tokenizer; truncation and padding are switched off.
        source: the chat template.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self.tokenizer, self.backend = tokenizer, tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.control = control_tokens(tokenizer, source)
        self.control_ids = frozenset(self.control.values())
        ends = {tokenizer.eos_token_id, tokenizer.bos_token_id}
        # an unknown character is the unknown token, where that is nothing else
        self._forbidden = self.control_ids - ({tokenizer.unk_token_id} - ends)
        control = "|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) or r"(?!)"
        heads = {text[: 1 + text[0].isalnum()] for text in self.control if len(text) > 1}
        # what the template's code may look for in a message stays whole: <think> also where it is no added token
        tags = {*re.findall(r"</?\w+>", source), *map(str, tokenizer.added_tokens_decoder.values())} - {*self.control}
        kept = "|".join(re.escape(tag) for tag in tags if tag.startswith(tuple(heads))) or r"(?!)"
        head = "|".join(map(re.escape, sorted(heads, key=len, reverse=True))) or r"(?!)"
        self._control = re.compile(control)
        self._written = re.compile(f"(?<!{START})(?:{control})")
        self._marked = re.compile(f"{START}({control}){END}|[{START}{END}]")
        self._to_mark = re.compile(f"({control})|(?!{kept})(?:{head})")
        # sentencepiece tokenizers put a space before the first word of every call; a newline in front absorbs it
        first = tokenizer.convert_ids_to_tokens(self.encode("a")[0])[0]
        self._anchor = self.encode("\n")[0] if first.startswith("▁") else []
        self._head = lru_cache(maxsize=64)(self.ids)  # the generation prompt, the same for most rows
        self._before = lru_cache(maxsize=2)(self.ids)  # the turns before it, the same for all responses to a prompt

    # ---- marks -----------------------------------------------------------------------------------------------------

    def mark(self, value: Any) -> Any:
        """Return messages or tools with every control text, and every beginning of one, marked in keys and values."""
        if isinstance(value, str):
            if START in value or END in value:
                raise RowError("the text contains U+FDD0 or U+FDD1, which are not characters")
            return self._to_mark.sub(self._with_marks, value)
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, list | tuple) else value

    @staticmethod
    def _with_marks(match: re.Match[str]) -> str:
        whole = match[1]
        return f"{START}{whole}{END}" if whole else f"{match[0][0]}{END}{match[0][1:]}"

    def written(self, text: str) -> list[re.Match[str]]:
        """Return the control tokens in rendered text that the template wrote."""
        return list(self._written.finditer(text))

    # ---- ids -------------------------------------------------------------------------------------------------------

    def text(self, text: str, first: bool = True) -> list[int]:
        """Return the ids of text in which nothing is a control token; `first` when nothing stands before it."""
        return self.ids(self.mark(text), first)

    def ids(self, text: str, first: bool = True) -> list[int]:
        """Return the ids of rendered text, see :meth:`rendered`."""
        if first and text and START not in text and END not in text:
            ids = self.backend.encode(text, add_special_tokens=False).ids  # offsets take as long again
            if sum(token in self._forbidden for token in ids) == len(self.written(text)):
                return ids
        return self.rendered(text, first)[0]

    def response(self, prompt: str, text: str) -> tuple[list[int], list[int], bool]:
        """Return the ids of a rendered prompt, of the text that follows it, and whether they are those of the whole.

        They are not where the tokenizer joins the end of the one with the beginning of the other.
        """
        # tokenizers split at control tokens: what stands before the last one of the prompt is encoded once
        written = self.written(prompt)
        cut = written[-1].start() if written else 0
        before, head = self._before(prompt[:cut]), self._head(prompt[cut:], cut == 0)
        whole = self.ids(prompt[cut:] + text, cut == 0 or not self._anchor)
        if whole[: len(head)] == head:
            return before + head, whole[len(head) :], True
        return before + head, self.ids(text, first=False), False

    def rendered(self, text: str, first: bool = True) -> Encoding:
        """Return the encoding of rendered text, in which control text with marks is plain text.

        Raises:
            RowError: the tokenizer has no other id for a control text.
        """
        if START not in text and END not in text:
            return self._unfolded(text, self.encode(text) if first else self._inner(text))
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for places, piece, plain in self._pieces(text):
            inner = bool(ids) or not first
            encode = self._inner if inner else self.encode
            more, spans = self._plain(piece, inner) if plain else self._unfolded(piece, encode(piece))
            ids += more
            offsets += [(places[a], places[max(b - 1, a)] + (b > a)) if a < len(places) else (a, a) for a, b in spans]
        return ids, offsets

    def _pieces(self, text: str) -> Iterator[tuple[list[int], str, bool]]:
        """Yield what is encoded apart: where its characters stand in `text`, the characters, whether it is plain text.

        A single mark only separates where a control token would stand across it.
        """
        piece, places, begin = "", [], 0
        for match in [*self._marked.finditer(text), None]:
            end = match.start() if match else len(text)
            piece, places = piece + text[begin:end], [*places, *range(begin, end)]
            begin = match.end() if match else end
            across = match and not match[1] and self._control.match(piece[-1:] + unmarked(text[begin : begin + 200]))
            if match is None or match[1] or across:
                yield places, piece, False
                piece, places = "", []
            if match and match[1]:
                yield list(range(match.start(1), match.end(1))), match[1], True

    def _plain(self, text: str, inner: bool) -> Encoding:
        """Return the encoding of control text as plain text."""
        encode = self._inner if inner else self.encode
        self.backend.encode_special_tokens = True
        try:
            ids, offsets = encode(text)
        finally:
            self.backend.encode_special_tokens = False
        if self.control_ids & {*ids}:  # an added token that is not special: cut, so that the tokenizer cannot see it
            head, tail = encode(text[:1]), self._inner(text[1:])
            ids, offsets = head[0] + tail[0], head[1] + [(a + 1, b + 1) for a, b in tail[1]]
            if self.control_ids & {*ids} - {self.tokenizer.unk_token_id}:
                raise RowError(f"the text {text!r} is a control token, and the tokenizer has no other id for it")
        return ids, offsets

    def _unfolded(self, text: str, encoding: Encoding) -> Encoding:
        """Return the encoding of text, where what a normalizer folds into a control token is encoded by character.

        One that folds case or width finds "<|EOS|>" to be "<|eos|>".

        Raises:
            RowError: a character that is itself a control token.
        """
        if self._forbidden.isdisjoint(encoding[0]):
            return encoding
        written = [match.span() for match in self.written(text)]
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for token, (begin, end) in zip(*encoding, strict=True):
            if token not in self._forbidden or any(a < end and begin < b for a, b in written):
                ids, offsets = [*ids, token], [*offsets, (begin, end)]
                continue
            for place in range(begin, end):
                for number in self._inner(text[place])[0]:
                    if number in self._forbidden:
                        name = self.tokenizer.convert_ids_to_tokens(token)
                        raise RowError(f"a text contains what this tokenizer reads as its control token {name!r}")
                    ids, offsets = [*ids, number], [*offsets, (place, place + 1)]
        return ids, offsets

    def _inner(self, text: str) -> Encoding:
        """Return the encoding of text that stands after other text."""
        if not self._anchor or not text:
            return self.encode(text)
        ids, offsets = self.encode("\n" + text)
        count = len(self._anchor)
        if ids[:count] != self._anchor:
            return self.encode(text)
        return ids[count:], [(max(a - 1, 0), max(b - 1, 0)) for a, b in offsets[count:]]

    def encode(self, text: str) -> Encoding:
        """Return the tokenizer's own encoding, without the tokens that it adds to every text."""
        if not text:
            return [], []
        # calling the tokenizer itself takes twice as long
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids in the middle of a text, without special tokens."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        text = self.tokenizer.decode([*self._anchor, *ids], **options)
        return text[len(self.tokenizer.decode(self._anchor)) :] if self._anchor else text


def unmarked(text: str) -> str:
    """Return rendered text without marks."""
    return text.replace(START, "").replace(END, "")
