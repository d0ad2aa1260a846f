"""Times a big preference file: tokenizing, planning an epoch, the second start, and the memory of each.

    python benchmarks/bigdata.py --rows 1000000

The rows are random. Each start is a separate process; its memory is the proportional set size of the process and its
workers, so what forked workers share is counted once.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

BATCHES = 200


def rows(count: int) -> Iterator[dict[str, str]]:
    """Yield pairs of a question and two answers of a few random words, about fifty tokens."""
    random_ = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(random_.choices(syllables, k=random_.randint(1, 3))) for _ in range(3000)]
    for number in range(count):
        lengths = [random_.randint(4, 10) for _ in range(3)]
        prompt, chosen, rejected = (" ".join(random_.choices(words, k=length)) for length in lengths)
        yield {"prompt": f"{prompt}?", "chosen": f"{chosen}.", "rejected": f"{rejected}, {number}."}


def write(folder: Path, count: int, name: str) -> Path:
    """Write the file, and a tiny model folder for its tokenizer."""
    from rlhf_lightning.models.tiny import build_tiny

    build_tiny(folder / "tiny", (text for row in rows(5000) for text in row.values()))
    with (gzip.open if name.endswith(".gz") else open)(folder / name, "wt") as file:
        for row in track(rows(count), "writing rows", count, transient=True):
            file.write(json.dumps(row) + "\n")
    return folder / name


def start(path: Path) -> dict[str, Any]:
    """Open the file as a training run would, and return the time of each part."""
    from rlhf_lightning import PreferenceData
    from rlhf_lightning.models.loading import load_tokenizer

    data = PreferenceData(load_tokenizer(str(path.parent / "tiny")), str(path), cache_dir=path.parent / "cache")
    moments = [time.time()]
    data.setup()
    moments.append(time.time())
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches)
    moments.append(time.time())
    for _ in range(BATCHES):
        next(batches)
    moments.append(time.time())
    steps = sum(1 for _ in loader.plan)
    moments.append(time.time())
    names = ("setup", "first batch", f"{BATCHES} batches", "plan of an epoch")
    seconds = {name: b - a for name, a, b in zip(names, moments[:-1], moments[1:], strict=True)}
    return {"began": moments[0], "ended": moments[1], "seconds": seconds, "steps": steps}


def watched(path: Path) -> dict[str, Any]:
    """Run :func:`start` in a new process and sample its memory."""
    began = time.time()
    samples: list[tuple[float, float]] = []
    with subprocess.Popen([sys.executable, __file__, "--start", str(path)], stdout=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            samples.append((time.time(), sum(map(memory, [child.pid, *children(child.pid)]))))
            time.sleep(0.5)  # sampling slows the process down
        assert child.stdout is not None
        printed = child.stdout.read()
    if child.returncode:
        raise SystemExit(child.returncode)
    report = json.loads(printed.splitlines()[-1])
    ended = report["ended"]
    shares = {}
    for share in (0, 0.1, 0.5, 1):
        moment = report["began"] + share * (ended - report["began"])
        shares[f"at {share:.0%}"] = min(samples, key=lambda sample: abs(sample[0] - moment))[1]
    seconds = {"start to first batch": report["began"] - began + sum(list(report["seconds"].values())[:2])}
    peak = {"peak of setup": max((m for t, m in samples if t < ended), default=0.0), "peak": max(m for _, m in samples)}
    return report | {"seconds": report["seconds"] | seconds, "gb": shares | peak, "samples": samples}


def children(pid: int) -> list[int]:
    """Return the processes a process has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def memory(pid: int) -> float:
    """Return a process's share of memory in GB."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("Pss:")), 0.0)


def show(starts: dict[str, dict[str, Any]]) -> None:
    """Print seconds and memory of the first and the second start."""
    table = Table(title="seconds, and memory in GB at a share of setup")
    for name in ("", *starts):
        table.add_column(name, justify="right" if name else "left")
    for kind, form in (("seconds", "{:.2f} s"), ("gb", "{:.2f} GB")):
        for name in starts["cold"][kind]:
            table.add_row(name, *(form.format(report[kind][name]) for report in starts.values()))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--name", default="pairs.jsonl", help="of the file; .jsonl or .jsonl.gz")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/bigdata.json"))
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.start)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), options.rows, options.name)
        size = path.stat().st_size / 1e6
        starts = {name: watched(path) for name in ("cold", "warm")}
        cached = sum(file.stat().st_size for file in Path(folder, "cache").rglob("*") if file.is_file()) / 1e6
    about = {"rows": options.rows, "file": options.name, "file_mb": size, "cache_mb": cached, "cores": os.cpu_count()}
    show(starts)
    print({**about, "rows_per_s": round(options.rows / starts["cold"]["seconds"]["setup"])})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(about | {"machine": platform.machine(), "starts": starts}, indent=1))
    print(options.out)


if __name__ == "__main__":
    main()
