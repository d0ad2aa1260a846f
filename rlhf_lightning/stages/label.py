"""`rlhf stage=label`: a page on loopback on which annotators compare, rank, edit or write answers, or chat."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from rlhf_lightning.data.layouts import Columns
from rlhf_lightning.data.sources import read_source
from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.feedback.labeling.export import export
from rlhf_lightning.feedback.labeling.items import Item, read_items
from rlhf_lightning.feedback.labeling.service import Labeling, PageSettings, withdraw
from rlhf_lightning.feedback.labeling.store import Store
from rlhf_lightning.files import regular, write_json
from rlhf_lightning.generation.chat import Chat, ServerChat, check_sampling
from rlhf_lightning.runtime.instantiate import missing_extra
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages.chat import local_chat

if TYPE_CHECKING:
    from rlhf_lightning.feedback.labeling.server import Server

LONGEST_INSTRUCTIONS = 1 << 18


def run(run: Run) -> float | None:
    """Serve the page until Ctrl-C, then write the labels as files; or only write them, or withdraw some first."""
    options, received = run.options, None
    page = PageSettings(
        options["mode"],
        options["scale"],
        read_instructions(options["instructions"]),
        listed("groups", options["groups"]),
        options["break_minutes"],
    )
    path = Path(options["database"] or run.folder / "labels.db")
    if options["export"] or options["withdraw"] is not None:
        if options["database"] is None and not path.exists():
            what = "label.export=true" if options["withdraw"] is None else f"label.withdraw={options['withdraw']}"
            raise UserError(f"{what} needs label.database=<file>, the database of the labels")
        with contextlib.closing(Store(path, create=False)) as store:
            if options["withdraw"] is not None:
                withdraw(store, str(options["withdraw"]), "the command")
            finish(run, store, page)
        return None
    try:
        from rlhf_lightning.feedback.labeling.server import Server, annotator_names
    except ImportError as error:
        raise UserError(f"stage=label: {missing_extra(error) or error}") from error
    names = annotator_names(options["annotators"])
    items, checks, chat = rows_to_label(run), check_questions(run), model(run)
    settings = {"mode": page.mode, "seed": run.settings["seed"]}
    with contextlib.closing(Store(path, settings)) as store:
        gone = len(store.items.keys() - items.keys() - checks.keys()) if page.mode != "chat" else 0
        labeling = Labeling(
            store,
            items,
            names,
            page,
            checks=checks,
            chat=chat,
            num_generations=options["num_generations"],
            overlap=options["overlap"],
            annotators_per_item=options["annotators_per_item"],
            check_share=options["check_share"],
        )
        if gone:
            say(
                f"{gone} items of {path} are not in {run.settings['data']['train']} as they were; their labels are kept"
            )
        with Server(labeling, options["port"]) as server:
            show(server)
            received = until_stopped(server)
        finish(run, store, page)
    if received == signal.SIGTERM:
        raise KeyboardInterrupt(128 + received)
    return None


# ---- what is labeled -------------------------------------------------------------------------------------------------


def rows_to_label(run: Run) -> dict[str, Item]:
    """Return the items of data.train; a conversation needs none."""
    options, data = run.options, run.settings["data"]
    source = run.sources.get("data.train")
    if source is None and options["mode"] == "chat":
        return {}
    if source is None:
        raise UserError(f"label.mode={options['mode']} needs rows to label: data.train=<file>")
    check_number("label.pairs", options["pairs"], "[1, inf)", whole=True)
    with Progress(transient=True, disable=not Console().is_terminal) as bar:
        task = bar.add_task("reading rows", total=source.count())
        items, skipped = read_items(
            source,
            options["mode"],
            Columns(data["columns"]),
            seed=run.settings["seed"],
            pairs=options["pairs"],
            warn=listed("warn", options["warn"]),
            on_bad_row=data["on_bad_row"],
            progress=partial(bar.advance, task),
        )
    say(f"{len(items)} items of {source.name}{f', {skipped} rows skipped' if skipped else ''}")
    return items


def check_questions(run: Run) -> dict[str, Item]:
    """Return the check questions, of which the best response is known."""
    options, data = run.options, run.settings["data"]
    if options["checks"] is None:
        return {}
    if options["mode"] not in ("compare", "rank"):
        raise UserError("label.checks has check questions for label.mode=compare and rank")
    with of_option("checks"):
        source = read_source(options["checks"], "train", None, "preferences", name="checks")
        columns, seed = Columns(data["columns"]), run.settings["seed"]
        return read_items(
            source, options["mode"], columns, seed=seed, warn=listed("warn", options["warn"]), checks=True
        )[0]


def model(run: Run) -> Chat | None:
    """Return the model that annotators talk to, None where they do not."""
    options = run.options
    if options["mode"] != "chat":
        return None
    sampling = {"max_new_tokens": options["max_new_tokens"], "temperature": options["temperature"]}
    if options["base_url"] is None:
        if run.start is None:
            raise UserError("label.mode=chat needs a model: init_from=<model>, or label.base_url and label.model")
        if options["model"] is not None:
            raise UserError(f"label.model={options['model']} is a model's name on a server: label.base_url is missing")
        return local_chat(run, **sampling)
    check_sampling("label", **sampling)
    return ServerChat(options["base_url"], options["model"], **sampling)


def read_instructions(path: Any) -> str:
    """Return the text of the instructions."""
    if path is None:
        return ""
    with of_option("instructions"):
        file = regular(Path(str(path)).expanduser())
    if file.stat().st_size > LONGEST_INSTRUCTIONS:
        raise UserError(f"label.instructions={path} has more than {LONGEST_INSTRUCTIONS} bytes")
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise UserError(f"label.instructions={path} is not UTF-8 text: {error}") from error


def listed(name: str, value: Any) -> list[str]:
    """Return the texts of an option that is a list, or one text."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(one, str | int) for one in values):
        raise UserError(f"label.{name}={value} is not a list of texts, such as [a,b]")
    return [str(one) for one in values]


@contextlib.contextmanager
def of_option(name: str) -> Iterator[None]:
    """Say with a user's error of which option it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"label.{name}: {str(error).removeprefix(f'data.{name}: ')}") from error


# ---- serving ---------------------------------------------------------------------------------------------------------


def show(server: Server) -> None:
    """Print the links, how to reach them from another machine, and how to end."""
    say("labeling page, on this machine only; every link is personal and holds until this command ends")
    for name, link in server.links.items():
        say(f"  {name:16} {link}")
    say(f"  {'overview':16} {server.overview}")
    say(f"from another machine first: ssh -L {server.port}:127.0.0.1:{server.port} {socket.gethostname()}")
    say("Ctrl-C ends it and writes the labels as files")


def until_stopped(server: Server) -> int | None:
    """Wait for Ctrl-C or SIGTERM and return the signal; a second one ends at once."""
    received: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt(128 + number)
        received.append(number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not received:
            if not server.wait(0.2) and not received:
                raise UserError("the labeling server stopped unexpectedly, see the log; confirmed labels are saved")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return received[0]


def finish(run: Run, store: Store, page: PageSettings) -> None:
    """Write the labels as files, and how many there are to metrics.json."""
    written = export(store, run.folder, page.instructions)
    write_json(
        run.folder / "metrics.json",
        {"monitor": None} | {name.partition(".")[0]: count for name, count in written.items()},
    )
    for name, count in written.items():
        say(f"{count:6} rows  {run.folder / name}")
    say(f"card         {run.folder / 'card.md'}")
    say(f"database     {store.path}")


def say(line: str) -> None:
    """Print a line as it is, at once."""
    Console().print(line, highlight=False, markup=False, soft_wrap=True)
