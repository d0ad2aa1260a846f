"""Plants known RLHF mistakes, one at a time, into a copy of the package and asks which test notices.

The lists beside this file hold the mistakes by the function they are planted in, as in `ops.kl.kl_estimate`:

* `name`, and `source`: which detail of RLHF it is about.
* `from`, `to`: Python code. `from` is one expression or statement, which must occur exactly once in the function
  (decorators and arguments included) whatever its formatting and comments; `to` is what stands there instead.
* `tests`: below tests/; one of them must fail.

A mutant is caught by a test that runs and fails; an import error, a collection error or a timeout is no verdict.
"""

from __future__ import annotations

import argparse
import ast
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
LISTS = sorted(Path(__file__).parent.glob("*.yaml"))
HEAVY = [
    "lightning.pytorch",
    "transformers.models.llama.modeling_llama",
    "peft",
    "torchmetrics.classification",
    "pytest",
]
HEAVY += ["hypothesis", "hydra", "torch._dynamo"]
TIMEOUT = 120


class PatchError(Exception):
    """A mutant whose function or code is not there exactly once."""


class _Replace(ast.NodeTransformer):
    """Replaces every node that equals `old`, and counts them."""

    def __init__(self, old: ast.AST, new: Any) -> None:
        self.kind, self.old, self.new, self.count = type(old), ast.dump(old), new, 0

    def visit(self, node: ast.AST) -> Any:
        if type(node) is not self.kind or ast.dump(node) != self.old:
            return self.generic_visit(node)
        self.count += 1
        return self.new


@dataclass(frozen=True)
class Mutant:
    """One mistake: the code `old` in the function `where` becomes `new`, and some test of `tests` must fail."""

    name: str
    source: str
    where: str
    old: str
    new: str
    tests: tuple[str, ...]

    def file(self, package: Path) -> Path:
        """Return the file of the function."""
        parts = self.where.split(".")
        files = (package.joinpath(*parts[:n]).with_suffix(".py") for n in range(1, len(parts) + 1))
        path = next((file for file in files if file.is_file()), None)
        if path is None:
            raise PatchError(f"{self.name}: there is no module of {self.where}")
        return path

    def mutated(self, source: str, package: Path) -> str:
        """Return the source of the file with the mistake in it."""
        tree = ast.parse(source)
        scope: Any = tree
        for name in self.where.split(".")[len(self.file(package).relative_to(package).parts) :]:
            scope = next((node for node in scope.body if getattr(node, "name", None) == name), None)
            if scope is None:
                raise PatchError(f"{self.name}: there is no {self.where}")
        (old,), new = ast.parse(self.old).body, ast.parse(self.new).body
        if isinstance(old, ast.Expr) and isinstance(new[0], ast.Expr):  # an expression anywhere, else a statement
            replace = _Replace(old.value, new[0].value)
        else:
            replace = _Replace(old, new)
        replace.generic_visit(scope)
        if replace.count != 1:
            raise PatchError(f"{self.name}: {self.old!r} occurs {replace.count} times in {self.where}, not once")
        return ast.unparse(tree)

    def apply(self, package: Path) -> None:
        """Plant the mistake into the package folder `package`."""
        path = self.file(package)
        path.write_text(self.mutated(path.read_text(), package))


@dataclass
class Verdict:
    """What pytest said: the first test that failed by itself, and whatever else went wrong."""

    caught_by: str | None = None
    trouble: list[str] = field(default_factory=list)
    passed: int = 0
    seconds: float = 0.0


def load(paths: Iterable[Path] = LISTS) -> list[Mutant]:
    """Return the mutants of all lists."""
    mutants = []
    for path in paths:
        for where, entries in yaml.safe_load(path.read_text()).items():
            for entry in entries:
                tests = tuple(f"tests/{test}" for test in entry["tests"])
                mutants.append(Mutant(entry["name"], entry["source"], where, entry["from"], entry["to"], tests))
    return mutants


def run(tests: Sequence[str], mutant: Mutant | None) -> Verdict:
    """Run `tests` in a copy of the project, with the mistake planted into it; called in a process of its own."""
    import hypothesis
    import pytest

    gc.freeze()  # what was imported before the fork is not garbage
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # a failure is enough, it need not be the smallest
    hypothesis.settings.register_profile("mutants", phases=phases, derandomize=True, deadline=None, database=None)
    verdict, start = Verdict(), time.monotonic()

    class Listener:
        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                verdict.trouble.append(f"{report.nodeid} cannot be collected")

        def pytest_runtest_logreport(self, report: Any) -> None:
            verdict.passed += report.when == "call" and report.passed
            if report.failed and report.when == "call" and "Failed: Timeout" not in str(report.longrepr):
                verdict.caught_by = verdict.caught_by or report.nodeid
            elif report.failed:
                verdict.trouble.append(f"{report.nodeid} failed in {report.when}")

    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder).resolve()
        for name in ("rlhf_lightning", "tests"):
            shutil.copytree(ROOT / name, copy / name)
        shutil.copytree(ROOT / "conf", copy / "rlhf_lightning" / "conf", dirs_exist_ok=True)  # as the wheel has it
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutant is not None:
            mutant.apply(copy / "rlhf_lightning")
        os.chdir(copy)  # pyproject.toml puts the folder it is in first on the path
        os.environ["PYTHONPATH"] = str(copy)  # and this does so for the processes that a test starts
        options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={copy}/tmp", "--hypothesis-profile=mutants"]
        options += ["--assert=plain", f"--timeout={TIMEOUT}"]  # nor need it be explained
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        code = int(pytest.main([*options, *tests], plugins=[Listener()]))
        if code not in (0, 1):
            verdict.trouble.append(f"pytest ended with {code}")
        for name, module in list(sys.modules.items()):
            place = getattr(module, "__file__", None)
            if name.startswith("rlhf_lightning") and place and not Path(place).is_relative_to(copy):
                raise RuntimeError(f"{name} was imported from {place}, not from the copy {copy}")
        os.chdir(ROOT)
    verdict.seconds = time.monotonic() - start
    return verdict


def control(pool: ProcessPoolExecutor, mutants: Iterable[Mutant]) -> list[str]:
    """Return what is wrong with the selected tests before anything is planted."""
    by_file: dict[str, list[str]] = {}
    for test in dict.fromkeys(test for mutant in mutants for test in mutant.tests):
        by_file.setdefault(test.partition("::")[0], []).append(test)
    jobs = [pool.submit(run, tests, None) for tests in by_file.values()]
    verdicts = [(file, job.result()) for file, job in zip(by_file, jobs, strict=True)]
    return [
        f"{file}: {verdict.caught_by or 'no test ran'} {verdict.trouble}"
        for file, verdict in verdicts
        if verdict.caught_by or verdict.trouble or not verdict.passed
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of mutants; return 1 when one was not caught."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track
    from rich.table import Column, Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="mutants to plant; all when none is given")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--lists", nargs="+", type=Path, default=LISTS, help="files of mutants, instead of all here")
    options = parser.parse_args(arguments)
    known = load(options.lists)
    if unknown := set(options.names) - {mutant.name for mutant in known}:
        parser.error(f"there is no mutant {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in known if mutant.name in options.names or not options.names]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RLHF_SHARED", str(ROOT.parent / "shared"))
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]  # of the pytest this may itself run under
    console, start = Console(width=None if sys.stdout.isatty() else 180), time.monotonic()
    context = get_context("forkserver")
    context.set_forkserver_preload(HEAVY)  # imported once; every mutant is a fork of that process
    with ProcessPoolExecutor(options.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        if broken := control(pool, chosen):
            console.print("the tests fail without any mutant:", *broken, sep="\n", markup=False)
            return 1
        console.print(f"control: the tests pass without any mutant ({time.monotonic() - start:.0f} s)")
        jobs = [pool.submit(run, mutant.tests, mutant) for mutant in chosen]
        table = Table("mutant", "function", Column("caught by", overflow="fold"), "seconds")
        survived = 0
        for mutant, job in track(list(zip(chosen, jobs, strict=True)), "mutants", console=console):
            try:
                verdict = job.result()
            except PatchError as error:
                verdict = Verdict(trouble=[str(error)])
            survived += verdict.caught_by is None
            told = escape((verdict.caught_by or "; ".join(verdict.trouble)).removeprefix("tests/"))
            told = told if verdict.caught_by else f"[red]SURVIVED[/] {told}"
            table.add_row(mutant.name, mutant.where, told, f"{verdict.seconds:.1f}")
    console.print(table)
    console.print(f"{len(chosen) - survived} of {len(chosen)} caught in {time.monotonic() - start:.0f} s")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
