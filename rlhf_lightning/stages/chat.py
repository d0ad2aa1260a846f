"""`rlhf stage=chat`: talk to a model in the terminal."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rlhf_lightning.callbacks.samples import CONTROL
from rlhf_lightning.data.messages import Message, turn
from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.files import atomic_path
from rlhf_lightning.generation.chat import Chat, LocalChat, check_sampling
from rlhf_lightning.models.loading import context_length, load_causal_lm, load_tokenizer
from rlhf_lightning.runtime.run import Run

COMMANDS = {
    "/help": "shows this",
    "/reset": "begins a new conversation",
    "/system <text>": "sets the system message, of a new conversation; without text there is none",
    "/undo": "takes back your last message and its answer",
    "/save <file>": "appends the conversation to a JSON lines file, as a demonstration",
    "/quit": "ends; so does Ctrl-D",
}


def run(run: Run) -> float | None:
    """Read lines and answer them until they end."""
    options = run.options
    system = options["system"]
    chat = local_chat(run, options["max_new_tokens"], options["temperature"])
    Conversation(chat, system and str(system), run.settings["seed"]).run()
    return None


def local_chat(run: Run, max_new_tokens: int, temperature: float) -> LocalChat:
    """Return the model that the stage starts from, with the configuration's sampler."""
    name = run.stage.name
    check_sampling(name, max_new_tokens, temperature)
    if run.start is None:
        raise UserError(f"stage={name} needs a model to talk to: init_from=<folder or hub name>")
    lm: Any = load_causal_lm(run.start, **run.settings["model"]["load"]).eval()
    lm.to(run.device)
    return LocalChat(
        lm,
        Template(load_tokenizer(run.start), run.settings["data"]["template"]),
        run.build("sampler"),
        context=context_length(run.start),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )


class Conversation:
    """A conversation in the terminal, or with lines from a pipe.

    Args:
        chat: answers.
        system: the system message, None for none.
        seed: with the number of answers so far decides every answer.
    """

    def __init__(self, chat: Chat, system: str | None = None, seed: int = 0, console: Console | None = None) -> None:
        self.chat, self.seed, self.console = chat, seed, console or Console()
        self.answered = 0
        self.messages: list[Message] = []
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Begin a new conversation."""
        self.system = system
        self.messages = [turn("system", system)] if system else []

    def run(self) -> None:
        """Answer lines until there are no more, /quit, or Ctrl-C where a line is awaited."""
        interactive = sys.stdin.isatty()
        if interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  lines can be edited and recalled
            self.say("/help shows the commands, Ctrl-D ends", "dim")
        while True:
            try:
                line = input("> " if interactive else "")
            except (EOFError, KeyboardInterrupt):
                return
            try:
                if not self.take(line):
                    return
            except UserError as error:
                self.say(str(error), "red")

    def take(self, line: str) -> bool:
        """Carry out a command, or answer; return whether the conversation goes on.

        Raises:
            UserError: no such command, or the model cannot answer.
        """
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if not word.startswith("/"):
            if line.strip():
                self.answer(line.strip())
            return True
        known = {command.partition(" ")[0] for command in COMMANDS}
        if word not in known:
            raise UserError(f"there is no command {word}; /help shows them.{nearest(word, known)}")
        if word == "/help":
            for command, what in COMMANDS.items():
                self.say(f"{command:16} {what}")
        elif word == "/reset":
            self.reset(self.system)
        elif word == "/system":
            self.reset(rest or None)
        elif word == "/undo":
            self.undo()
        elif word == "/save":
            self.save(rest)
        return word != "/quit"

    def answer(self, text: str) -> None:
        """Print the answer to a message; Ctrl-C, or a failure, takes the message back."""
        messages = [*self.messages, turn("user", text)]
        try:
            with self.console.status("...") if self.console.is_terminal else nullcontext():
                (answer,) = self.chat(messages, 1, (self.seed, "chat", self.answered))
        except KeyboardInterrupt:
            self.say("interrupted; the message is taken back", "dim")
            return
        self.answered += 1
        self.messages = [*messages, turn("assistant", answer)]
        self.say(answer, "cyan" if self.console.is_terminal else "")

    def undo(self) -> None:
        """Take back the last message of the user and what followed it."""
        last = max((i for i, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if last is None:
            raise UserError("there is nothing to undo")
        self.messages = self.messages[:last]

    def save(self, name: str) -> None:
        """Append the conversation to a file as a demonstration row."""
        if not name.endswith(".jsonl"):
            raise UserError("/save <file>.jsonl: the name of a JSON lines file is needed")
        if not any(message["role"] == "assistant" for message in self.messages):
            raise UserError("there is no answer to save")
        path = Path(name).expanduser()
        try:
            before = path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        with atomic_path(path) as temporary:
            before += "" if not before or before.endswith("\n") else "\n"
            temporary.write_text(f"{before}{json.dumps({'messages': self.messages})}\n", encoding="utf-8")
        self.say(f"saved {path}", "dim")

    def say(self, text: str, style: Any = "") -> None:
        """Print a text without control characters."""
        self.console.print(Text(CONTROL.sub("", text), style), soft_wrap=True)
