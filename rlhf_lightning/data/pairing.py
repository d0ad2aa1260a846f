"""Rows with one rated response, as of KTO and HelpSteer, made into rankings of the responses to equal prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rlhf_lightning.data import records
from rlhf_lightning.data.layouts import Canonical, Columns
from rlhf_lightning.data.messages import RowError
from rlhf_lightning.data.sources import Row, Source


def paired(source: Source, columns: Columns) -> Source:
    """Return the rows of a source with rated responses to equal prompts as rows with a ranking, at the end.

    They are held in memory until all rows are read. A row whose prompt no other row has with another rating stays as
    it is; a preference is not read from it.
    """

    def rows() -> Iterator[tuple[str, Row]]:
        groups: dict[bytes, list[tuple[str, Row, tuple[Row, Any, float]]]] = {}
        for where, row in source.rows():
            try:
                found = records.rated(row, columns)
            except RowError:  # refused when it is read
                found = None
            if found is None:
                yield where, row
            else:
                key = json.dumps(found[0], sort_keys=True, default=str).encode()
                groups.setdefault(hashlib.sha256(key).digest(), []).append((where, row, found))
        for members in groups.values():
            ratings = [rating for _, _, (_, _, rating) in members]
            if len(set(ratings)) == 1:
                yield from ((where, row) for where, row, _ in members)
                continue
            shared = members[0][2][0]
            responses = [response for _, _, (_, response, _) in members]
            ranking = [-rating for rating in ratings]
            where = " and ".join(where for where, _, _ in members)
            yield where, Canonical(shared | {"responses": responses, "ranking": ranking})

    return replace(source, rows=rows)
