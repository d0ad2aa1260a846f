"""Checks of rows, template and splits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

from rlhf_lightning.data import checks, records
from rlhf_lightning.data.checks import Check, Note
from rlhf_lightning.data.records import Message
from rlhf_lightning.data.template import SPELLED, Tools
from rlhf_lightning.errors import UserError
from rlhf_lightning.ops.statistics import wilson_interval

IDS_FIT = "token ids fit the model"


class DataChecks:
    """The rows of a data module: tokenized, and the first `limit` as they are in the file."""

    def __init__(self, data: Any, limit: int) -> None:
        if limit < 1:
            raise UserError("audit.rows must be at least 1")
        self.data, self.limit = data, limit

    def looked_at(self) -> int:
        """Return how many training rows the expensive checks read."""
        return min(self.limit, len(self.data.rows["train"]))

    def read(self) -> str:
        """Tokenize all rows."""
        self.data.setup()
        text = ", ".join(f"{len(rows)} {split}" for split, rows in self.data.rows.items()) + " rows"
        skipped = sum(sum(rows.skipped.values()) for rows in self.data.rows.values())
        return Note(f"{text}; {skipped} bad ones are left out (data.on_bad_row=skip)") if skipped else text

    def checks(self, vocabulary: int) -> Iterator[Check]:
        """Yield the checks for a model with `vocabulary` token ids."""
        data = self.data
        for split, rows in data.rows.items():
            if data.kind != "prompts":
                yield (
                    f"{split}: every row has a token in the loss mask",
                    partial(checks.loss_mask_is_not_empty, data, split),
                )
                yield f"{split}: responses end with EOS", partial(checks.ends_are_learned, data, split, len(rows))
            yield f"{split}: {IDS_FIT}", partial(checks.ids_fit, data, split, vocabulary)
        yield "tokens are those of the chat template", self.template
        if "val" in data.rows:
            yield "held-out rows are not training rows", self.leak
        if data.kind == "preferences":
            yield "chosen and rejected share the prompt", self.shared_prompt
            yield "length does not tell which is chosen", self.length

    def conversations(self) -> Iterator[tuple[str, list[Message], list[Message], Tools, dict[str, Any]]]:
        """Yield (where, prompt, answers, tools, other columns) of the first rows that are conversations."""
        columns = self.data.columns
        for where, row in islice(self.data.source("train").rows(), self.limit):
            try:
                self.data.to_group(row)
                record = records.prompt(row, columns)
                prompt, tools = record.content, record.tools
                answers: list[Message] = []
                if self.data.kind == "preferences":
                    pair = records.preference(row, columns)
                    prompt, tools = pair.prompt, pair.tools
                    answers = [{"role": "assistant", "content": text} for text in pair.responses]
                elif self.data.kind == "demonstrations":
                    demonstration = records.demonstration(row, columns)
                    prompt, tools = demonstration.content[:-1], demonstration.tools
                    if isinstance(demonstration.content, list):
                        answers = demonstration.content[-1:]
            except records.RowError:  # left out by data.on_bad_row=skip
                continue
            if isinstance(prompt, list):
                yield where, prompt, answers, tools, record.metadata

    def render(self, messages: list[Message], tools: Tools, **options: Any) -> list[int]:
        """Return the token ids that the chat template gives `messages` in other programs."""
        text = self.data.template.rendered(messages, tools, **options)
        return self.data.tokenizer(text, add_special_tokens=False).input_ids

    def template(self) -> str:
        """The tokens are those of `apply_chat_template`: as counted in all rows, and computed again for the first."""
        notes = []
        for split, rows in self.data.rows.items():
            for reason, places in rows.differs.items():
                first = self.data.where(split, [int(places[0])])
                text = f"{len(places)} of {len(rows)} rows of data.{split}: {reason}; the first is {first}"
                if reason != SPELLED:
                    raise UserError(text)
                notes.append(text)
        count, template = 0, self.data.template
        for where, prompt, answers, tools, _ in self.conversations():
            count += 1
            ids, responses, differs = template.completions(prompt, answers, tools)
            if differs is not None:
                continue
            ours = [ids, *(ids + response for response in responses)]
            theirs = [self.render(prompt, tools, add_generation_prompt=True)]
            theirs += [self.render([*prompt, answer], tools) for answer in answers]
            # behind a turn some templates write a newline, and to others that write no end EOS is added
            if any(a[: len(b)] != b[: len(a)] or len(a) > len(b) + 1 for a, b in zip(ours, theirs, strict=True)):
                raise UserError(f"{where}: the tokens are not those of apply_chat_template")
        return Note("; ".join(notes)) if notes else f"{count} conversations"

    def leak(self) -> str:
        """No held-out row is a training row."""
        train, val = (
            [(tuple(g.prompt), tuple(map(tuple, g.responses))) for g in (rows[i] for i in range(len(rows)))]
            for rows in (self.data.rows["train"], self.data.rows["val"])
        )
        training_rows, prompts = set(train), {prompt for prompt, _ in train}
        leaked = [i for i, row in enumerate(val) if row in training_rows]
        if leaked:
            place = self.data.where("val", leaked[:1])
            raise UserError(f"{len(leaked)} of {len(val)} held-out rows are training rows, the first is {place}")
        half = sum(prompt in prompts for prompt, _ in val)
        text = f"{half} of {len(val)} held-out prompts are training prompts"
        return Note(text) if half else text

    def shared_prompt(self) -> str:
        """The template writes the same prompt before either response."""
        for where, prompt, answers, tools, _ in self.conversations():
            rendered = self.data.template.rendered
            head = rendered(prompt, tools, add_generation_prompt=True)
            whole = [rendered([*prompt, answer], tools) for answer in answers]
            if not all(text.startswith(head) for text in whole):
                return Note(
                    f"{where}: the chat template writes another prompt once an answer follows; this system trains on "
                    "the prompt it samples from, other programs may not"
                )
        return f"{len(self.data.rows['train'])} rows, one prompt each"

    def length(self) -> str:
        """The length does not predict the label."""
        rows = self.data.rows["train"]
        sizes = [[len(y) for y in rows[i].responses] for i in range(len(rows))]
        longer = sum((s[0] > s[-1]) + 0.5 * (s[0] == s[-1]) for s in sizes)
        low, high = wilson_interval(longer, len(sizes))
        text = f"the best response is longer than the worst in {longer / len(sizes):.0%} [{low:.0%}, {high:.0%}]"
        return Note(f"{text}: a reward model may learn length") if low > 0.6 or high < 0.4 else text
