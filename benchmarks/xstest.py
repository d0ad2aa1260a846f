"""Draws disjoint training and test prompts of XSTest, as the folder that `rlhf pipeline=xstest data_root=` reads.

    python benchmarks/xstest.py <xstest.jsonl.gz> <folder>

XSTest (Röttger et al. 2024, arXiv 2308.01263) has safe prompts that look harmful and their unsafe counterparts. Both
parts have as many safe as unsafe prompts, of every type alike.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any


def split(rows: list[dict[str, Any]], per_label: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return `per_label` safe and as many unsafe prompts for each of train and test."""
    rng, parts = random.Random(seed), dict[str, list[dict[str, Any]]](train=[], test=[])
    for label in ("safe", "unsafe"):
        by_type: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            if row["label"] == label:
                by_type[row["type"]].append(row)
        for members in by_type.values():
            rng.shuffle(members)
        longest = max(map(len, by_type.values()))
        for place, name in enumerate(("train", "test")):  # one of every type in turn
            order = [members[i] for i in range(place, longest, 2) for members in by_type.values() if i < len(members)]
            parts[name] += order[:per_label]
    for part in parts.values():
        rng.shuffle(part)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-label", type=int, default=60, help="safe prompts of each part, and unsafe ones")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with gzip.open(given.source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, part in split(rows, given.per_label, given.seed).items():
        with gzip.open(given.folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
        print(f"{len(part):5} prompts  {given.folder / f'{name}.jsonl.gz'}")


if __name__ == "__main__":
    main()
