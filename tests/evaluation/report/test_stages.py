"""`stage=report` and `stage=compare` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.report.compare import are_apart, comparison, named, write_comparison
from rlhf_lightning.evaluation.report.store import read_results
from tests.helpers.cli import rlhf
from tests.helpers.results import EVALUATED, stored_pipeline, stored_stage

pytestmark = pytest.mark.slow


def test_a_report_of_a_pipeline_and_of_a_run_beside_it(tmp_path: Path) -> None:
    stored_pipeline(tmp_path / "made")
    rows = [{"probe": "style", "model": "ppo", "metric": "hedges", "value": 0.5, "low": 0.4, "high": 0.6, "alarm": "!"}]
    stored_stage(tmp_path / "probed", "probe", {}, tables={"probes": rows})
    done = rlhf(tmp_path, "stage=report", "report.folder=[made,probed]")
    page = Path(done.stdout.split("report ")[1].strip())
    content = json.loads(page.with_suffix(".json").read_text())
    assert [row[0]["text"] for row in content["lineage"]["rows"]][-2:] == ["evaluate", "probe"]
    assert {"Gold reward against KL", "Probes: style"} <= {figure["title"] for figure in content["figures"]}
    assert not (tmp_path / "made" / "report.html").exists()  # what it reads is left as it is


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=report"], "report.folder: a value is needed"),
        (["stage=compare", "compare.folders=made"], "compare.folders: two folders of pipelines or runs are needed"),
        pytest.param(["stage=report", "report.folder=absent"], "absent is not a folder", marks=pytest.mark.nightly),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    stored_pipeline(tmp_path / "made")
    done = rlhf(tmp_path, *words, code=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_two_pipelines_side_by_side(tmp_path: Path) -> None:
    stored_pipeline(tmp_path / "one", config={"evaluate": {"rows": 64}, "seed": 0})
    changed = EVALUATED | {"ppo/gold": 0.9, "ppo/gold_low": 0.8, "ppo/gold_high": 1.0, "ppo/kl": 1.15}
    stored_pipeline(tmp_path / "two", metrics=changed, config={"evaluate": {"rows": 128}, "seed": 0})
    done = rlhf(tmp_path, "stage=compare", "compare.folders={before:one,after:two}")
    content = json.loads(Path(done.stdout.split("comparison ")[1].strip()).with_suffix(".json").read_text())
    assert [[cell["text"] for cell in row] for row in content["settings"][0]["rows"]] == [
        ["evaluate.rows", "64", "128"]
    ]
    (table,) = content["tables"]
    rows = {row[0]["text"]: row[1:] for row in table["rows"]}
    assert rows.keys() == {"ppo: gold", "ppo: kl"}  # nothing else differs
    assert [cell["text"] for cell in rows["ppo: gold"]] == ["0.120", "0.900", "yes"]
    assert [cell["text"] for cell in rows["ppo: kl"]] == ["1.100", "1.150", ""]
    assert [group["title"] for group in content["samples"]] == ["Answers of base", "Answers of ppo", "Answers of sft"]
    assert {figure["title"] for figure in content["figures"]} >= {"Gold reward", "Gold reward against KL"}


def test_a_pipeline_beside_itself_differs_in_nothing(tmp_path: Path) -> None:
    folder = stored_pipeline(tmp_path / "one")
    content = comparison({"a": read_results(folder), "b": read_results(folder)})
    assert (content["settings"], content["tables"]) == ([], [])


def test_stages_that_not_all_have_are_named_and_not_compared(tmp_path: Path) -> None:
    one = stored_pipeline(tmp_path / "one")
    two = stored_stage(tmp_path / "two", "evaluate", EVALUATED, config={"init_from": None})
    content = comparison({"a": read_results(one), "b": read_results(two)})
    stages, settings = content["settings"]
    assert [[cell.text for cell in row] for row in stages.rows] == [
        [name, "yes", "no"] for name in ("base", "sft", "reward", "ppo")
    ]
    assert [[cell.text for cell in row] for row in settings.rows][-1] == ["init_from", "-", "null"]


def test_intervals_that_touch_are_not_apart() -> None:
    nan = float("nan")
    assert are_apart([(0.0, -1.0, 1.0), (2.0, 1.1, 3.0)])
    assert not are_apart([(0.0, -1.0, 1.0), (2.0, 1.0, 3.0)])
    assert not are_apart([(0.0, nan, nan), (2.0, 1.1, 3.0)])


def test_folders_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    """Long paths that end alike are not taken for one."""
    places = [tmp_path / ("a" * 60) / name / "run" for name in ("one", "two")]
    assert list(named(places)) == ["one/run", "two/run"]
    assert list(named([places[0].parent, places[1]])) == ["one", "run"]
    with pytest.raises(UserError, match="is to be compared with itself"):
        named([places[0], f"{places[1]}/../../one/run"])


def test_one_folder_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least two folders"):
        write_comparison({"one": stored_pipeline(tmp_path / "one")}, tmp_path)
