"""The report says what is stored, and no more: lineage, results, what stands out, samples, what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.report.findings import findings
from rlhf_lightning.evaluation.report.page import report, write_report
from rlhf_lightning.evaluation.report.samples import side_by_side
from rlhf_lightning.evaluation.report.store import curves, models_of, read_results, visible
from tests.helpers.results import EVALUATED, answers, hydra, intervals, stored_pipeline, stored_stage


def told(folder: Path, **values: tuple[float, float, float]) -> list[str]:
    """Return what stands out of sft and ppo with these paired differences."""
    models = intervals(sft__gold=(0.0, -0.1, 0.1), sft__length=(20.0, 19.0, 21.0), ppo__gold=(0.0, -0.1, 0.1))
    gaps = intervals(**{f"ppo__minus__sft__{name}": value for name, value in values.items()})
    stored_stage(folder / "run", "evaluate", models | gaps)
    return [finding.text for finding in findings(read_results(folder / "run"))[0]]


BETTER, UNCLEAR, WORSE = (0.3, 0.1, 0.5), (0.1, -0.1, 0.3), (-0.3, -0.5, -0.1)


@pytest.mark.parametrize(
    ("gold", "length", "words"),
    [
        (UNCLEAR, (8.0, 7.0, 9.0), "40% longer than sft's (95% interval 35% to 45%) and not shown to be better"),
        (WORSE, (8.0, 7.0, 9.0), "40% longer than sft's (95% interval 35% to 45%) and worse"),
        (BETTER, (8.0, 7.0, 9.0), None),
        (UNCLEAR, (8.0, -1.0, 17.0), None),  # the interval does not say that they are longer
        (UNCLEAR, (1.0, 0.5, 1.5), None),  # longer, by 5%
        (UNCLEAR, (-8.0, -9.0, -7.0), None),
    ],
)
def test_longer_and_no_better_is_told_only_where_the_intervals_say_so(
    gold: Any, length: Any, words: str | None, tmp_path: Path
) -> None:
    found = [text for text in told(tmp_path, gold=gold, length=length) if "longer" in text]
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


@pytest.mark.parametrize(
    ("reward", "gold", "words"),
    [(BETTER, WORSE, "falls"), (BETTER, UNCLEAR, "not shown to rise"), (BETTER, BETTER, None), (UNCLEAR, WORSE, None)],
)
def test_overoptimization_needs_a_proxy_that_rises_and_a_gold_reward_that_does_not(
    reward: Any, gold: Any, words: str | None, tmp_path: Path
) -> None:
    found = [text for text in told(tmp_path, reward=reward, gold=gold) if "overoptimization" in text]
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


def test_a_gain_is_told_once_and_is_no_warning(tmp_path: Path) -> None:
    assert told(tmp_path, gold=BETTER, reward=BETTER) == [
        "ppo is better than sft by the gold reward (+0.300, 95% interval +0.100 to +0.500)"
    ]


def test_without_intervals_nothing_stands_out(tmp_path: Path) -> None:
    """A single prompt has no interval, and results of an older version have none."""
    bare = {key: value for key, value in EVALUATED.items() if not key.endswith(("_low", "_high"))}
    stored_stage(tmp_path / "run", "evaluate", bare)
    found, looked = findings(read_results(tmp_path / "run"))
    assert found == []
    assert looked > 0


@pytest.mark.slow
def test_that_a_model_is_better_than_what_it_was_trained_from_is_no_warning(tmp_path: Path) -> None:
    results = read_results(stored_pipeline(tmp_path / "made"))
    assert results.before("ppo") == {"sft", "base"}  # not the reward model
    warned = {finding.model for finding in findings(results)[0]}
    assert warned == {"ppo"}
    drawn = next(figure for figure in report(results)["figures"] if figure.title == "Gold reward against KL")
    assert "base (48 nats)" in drawn.caption


def test_every_rule_of_reward_models(tmp_path: Path) -> None:
    rows = intervals(
        coin__accuracy=(0.52, 0.48, 0.56), weak__accuracy=(0.62, 0.58, 0.66), good__accuracy=(0.8, 0.75, 0.85),
        biased__accuracy=(0.75, 0.7, 0.8), biased__shorter_accuracy=(0.2, 0.1, 0.3),
        biased__length_spearman=(0.5, 0.4, 0.6), good__length_spearman=(0.35, 0.25, 0.45), longer__accuracy=(0.6, 0.55, 0.65),
    )  # fmt: skip
    stored_stage(tmp_path / "run", "evaluate", rows)
    texts = [finding.text for finding in findings(read_results(tmp_path / "run"))[0]]
    assert [text.split()[0] for text in texts] == ["coin", "weak", "biased", "biased"]
    assert "better than chance" in texts[0]
    assert "longer response (0.600)" in texts[1]
    assert "rank correlation with length 0.500" in texts[2]
    assert "where the shorter one is better" in texts[3]


def test_alarms_of_probes_stand_out(tmp_path: Path) -> None:
    rows = [
        {"probe": "sycophancy", "model": "ppo", "metric": "flips", "value": 0.4, "low": 0.3, "high": 0.5, "count": 80,
         "alarm": "it gives up right answers"},
        {"probe": "sycophancy", "model": "sft", "metric": "flips", "value": 0.1, "low": 0.0, "high": 0.2, "count": 80,
         "alarm": ""},
    ]  # fmt: skip
    results = read_results(stored_stage(tmp_path / "run", "probe", {}, tables={"probes": rows}))
    found, looked = findings(results)
    assert ([finding.text for finding in found], looked) == (["ppo: it gives up right answers"], 2)


def test_wins_that_length_explains_stand_out(tmp_path: Path) -> None:
    ends = {"win_rate": 0.7, "low": 0.6, "high": 0.8, "opponent": "b", "by": "world"}
    at_equal = {"length_controlled": 0.5, "length_controlled_low": 0.4, "length_controlled_high": 0.6}
    better = {"length_controlled": 0.7, "length_controlled_low": 0.6, "length_controlled_high": 0.8}
    rows = [
        {"model": "long", **ends, **at_equal},
        {"model": "good", **ends, **better},
        {"model": "even", **ends, **at_equal, "low": 0.45},
        {"model": "unknown", **ends, "length_controlled": None},
    ]
    found, looked = findings(read_results(stored_stage(tmp_path / "run", "evaluate", {}, tables={"win_rates": rows})))
    assert ([finding.model for finding in found], looked) == (["long"], 3)
    assert "at equal length it is not shown to win more than half (0.500, 95% interval 0.400 to 0.600)" in found[0].text


# ---- what is stored ---------------------------------------------------------------------------------------------------


def test_stages_are_linked_by_the_hash_of_their_weights(tmp_path: Path) -> None:
    """A pipeline that was moved is still understood: paths in its manifests lead nowhere."""
    results = read_results(stored_pipeline(tmp_path / "made").rename(tmp_path / "moved"))
    parents = {stage.name: stage.parents for stage in results.stages}
    assert parents["ppo"] == ["sft", "reward (reward)"]
    assert (parents["base"], parents["sft"]) == ([], ["base"])


def test_two_folders_with_stages_of_one_name(tmp_path: Path) -> None:
    one, two = stored_pipeline(tmp_path / "one"), stored_pipeline(tmp_path / "two")
    config = {"probe": {"models": {"ppo": str(two / "3_ppo" / "model")}}}
    beside = stored_stage(tmp_path / "probed", "probe", {}, config=config)
    results = read_results(one, two, beside)
    names = [stage.name for stage in results.stages]
    assert names[4:7] == ["evaluate", "base (2)", "sft (2)"]
    assert len(set(names)) == len(names) == 11
    assert results.stages[-1].parents == ["ppo (2)"]
    assert results.missing == []


def test_curves_come_from_tensorboard_or_csv(tmp_path: Path) -> None:
    (tmp_path / "csv" / "version_0").mkdir(parents=True)
    (tmp_path / "csv" / "version_0" / "metrics.csv").write_text(
        "step,train/loss,other\n0,2.5,1\n1,,1\n2,nan,\n3,1.5,\n"
    )
    complaints: list[str] = []
    assert curves(tmp_path, ["train/loss", "val/loss"], complaints.append) == {"train/loss": [(0, 2.5), (3, 1.5)]}
    (tmp_path / "csv" / "version_0" / "metrics.csv").write_text("step,train/loss\nx,2.5\n")
    assert curves(tmp_path, ["train/loss"], complaints.append) == {}
    assert complaints == [f"{tmp_path / 'csv'} cannot be read (ValueError)"]


def test_weights_that_changed_since_are_named(tmp_path: Path) -> None:
    folder = stored_pipeline(tmp_path / "made")
    manifest = json.loads((folder / "3_ppo" / "model" / "manifest.json").read_text())
    manifest["parents"][0] |= {"weights": "e" * 64, "folder": str(folder / "1_sft" / "model")}
    (folder / "3_ppo" / "model" / "manifest.json").write_text(json.dumps(manifest))
    assert "stage ppo was trained from other weights of sft than are there now" in read_results(folder).missing


@pytest.mark.slow
def test_the_page_and_its_json_have_every_section(tmp_path: Path) -> None:
    folder = stored_pipeline(tmp_path / "made")
    page = write_report(folder)
    html, content = page.read_text(), json.loads((folder / "report.json").read_text())
    assert page == folder / "report.html"
    for id in ("findings", "lineage", "results", "figures", "samples", "missing"):
        assert f'<section id="{id}">' in html
    assert content["results"]["evaluate"]["ppo"]["gold"] == [0.12, 0.0, 0.24]
    assert content["command"] == "rlhf pipeline=made"
    assert {figure["title"] for figure in content["figures"]} == {
        "Gold reward against KL", "Difference in gold reward", "Difference in length (tokens)", "Lengths of the answers",
        "Reward model against KL",
    }  # fmt: skip
    assert {figure["command"] for figure in content["figures"]} == {"rlhf stage=evaluate seed=10"}
    assert "svg" not in content["figures"][0]
    assert "://" not in re.sub(r"http://www.w3.org/\d+/(svg|xlink)", "", html)  # nothing is loaded
    assert write_report(folder).read_bytes() == html.encode()  # nor does it depend on the time


@pytest.mark.slow
def test_the_page_has_no_markup_of_a_model(tmp_path: Path) -> None:
    """Without a browser, which has its own test of all of the page."""
    markup = "<img src=x onerror=alert(1)>"
    rows = [{"prompt": markup, "response": markup, "gold": 1.0}]
    stored_stage(tmp_path / "run", "evaluate", {f"a{markup}/gold": 1.0}, samples={"a": rows, "b": rows})
    html = write_report(tmp_path / "run").read_text()
    assert "<img" not in html
    assert html.count("&lt;img src=x onerror=alert(1)&gt;") >= 4


def test_samples_come_first_where_the_models_differ_most() -> None:
    samples = answers(base=["9 x", "9 x", "9 x"], sft=["1 x", "0 x", "1 x"], ppo=["2 x", "-3 x", "1 x"])
    found = side_by_side(samples, apart=["base"])
    assert [one.prompt for one in found] == ["Question 1?", "Question 0?", "Question 2?"]
    assert [one.spread for one in found] == [3.0, 1.0, 0.0]
    assert [answer.text for answer in found[0].answers] == ["9 x", "0 x", "-3 x"]


def test_of_many_models_some_are_shown_and_the_page_says_so() -> None:
    samples = answers(**{f"m{number}": [f"{number} x"] for number in range(20)})
    (one,) = side_by_side(samples)
    assert (len(one.answers), one.models, one.spread) == (8, 20, 19.0)


def test_of_a_prompt_that_is_there_more_than_once_the_largest_difference_is_shown() -> None:
    samples = {
        name: [{"prompt": "Q", "response": str(value), "gold": value} for value in values]
        for name, values in (("a", (1, 5, 2)), ("b", (1, 0, 1)))
    }
    (one,) = side_by_side(samples)
    assert ([answer.text for answer in one.answers], one.spread) == (["5", "0"], 5.0)


def test_intervals_are_read_from_flat_metrics() -> None:
    metrics = {
        "a/gold": 1.0,
        "a/gold_low": 0.5,
        "a/gold_high": 1.5,
        "a/kl": 2,
        "perf/rows_per_s": 3.0,
        "monitor": "a/gold",
    }
    metrics |= {"a/x_low": 4.0, "a/bad": "text", "a/nan": float("nan"), "pair/a/b/kappa": 0.3}
    found = models_of(metrics)
    assert found.keys() == {"a"}
    assert found["a"]["gold"] == (1.0, 0.5, 1.5)
    assert found["a"].keys() == {"gold", "kl", "x_low"}


# ---- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pipeline_that_has_not_finished_says_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    hydra(folder, {"pipeline": {"name": "made", "stages": {"sft": {}, "ppo": {}, "evaluate": {}}}}, ["pipeline=made"])
    stored_stage(folder / "0_sft", "sft", {"global_step": 3}, weights="5" * 64)
    stored_stage(folder / "1_ppo", "ppo", None)
    stored_stage(folder / "1_ppo.old-17", "ppo", {})
    content = report(read_results(folder))
    assert content["missing"][:2] == [
        "stage evaluate has not been started",
        "stage ppo has not finished: there is no metrics.json",
    ]
    assert [row[0].text for row in content["lineage"].rows] == ["sft", "ppo"]


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("metrics.json", "[1, 2]", "4_evaluate/metrics.json is not readable JSON"),
        ("metrics.json", "[" * 100_000, "4_evaluate/metrics.json is not readable JSON"),
        ("run.json", "\xff\x00", "4_evaluate/run.json is not readable JSON"),
        (".hydra/config.yaml", "a: &a [1]\nb: *a\n", "4_evaluate/.hydra/config.yaml is not readable YAML"),
        (".hydra/config.yaml", "a: !!python/object/apply:os.system [true]\n", "config.yaml is not readable YAML"),
        (".hydra/overrides.yaml", "a: 1\n", "overrides.yaml is not readable: a dict, not a list"),
    ],
)
def test_what_cannot_be_read_is_named_and_the_other_stages_are_there(
    file: str, text: str, named: str, tmp_path: Path
) -> None:
    folder = stored_pipeline(tmp_path / "made")
    (folder / "4_evaluate" / file).write_text(text)
    results = read_results(folder)
    assert [line for line in results.missing if named in line]
    assert len(results.stages) == 5


@pytest.mark.slow
def test_rows_that_a_figure_cannot_show_are_named_and_the_others_drawn(tmp_path: Path) -> None:
    rows = {
        "samples/ppo": '{"prompt": "p", "response": "r"}\nnothing\n7\n',
        "tables/margins": '{"model": "m", "bucket": "b"}\n{"model": "m", "bucket": "b", "accuracy": 0.5}\n',
        "tables/ngrams": '{"model": "m", "effect": 1}\n',
        "tables/frontier": '{"method": "m", "kl": 1e300, "reward": 2}\n',
        "tables/win_rates": '{"model": "a", "opponent": "b", "by": "gold", "win_rate": NaN}\n',
    }
    folder = stored_pipeline(tmp_path / "made")
    (folder / "4_evaluate" / "tables").mkdir()
    for name, text in rows.items():
        (folder / "4_evaluate" / f"{name}.jsonl").write_text(text)
    content = report(read_results(folder))
    for words in (
        "samples/ppo.jsonl, row 2: not a JSON object, nor are 1 others",
        "evaluate/tables/margins.jsonl, row 1: accuracy is no finite number; 1 of 2 rows are left out of the figure",
        "evaluate/tables/ngrams.jsonl, row 1: there is no column ngram",
        "evaluate/tables/frontier.jsonl, row 1: kl is no finite number",
        "evaluate/tables/win_rates.jsonl, row 1: win_rate is no finite number",
    ):
        assert [line for line in content["missing"] if words in line], words
    assert [figure.title for figure in content["figures"] if "tables/" in figure.source] == ["Accuracy by margin: m"]


def test_a_folder_that_holds_no_results_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in (("empty", "neither the stages of a pipeline"), ("absent", "is not a folder")):
        with pytest.raises(UserError, match=words):
            write_report(tmp_path / folder)


def test_invisible_characters_are_shown_and_long_texts_cut() -> None:
    assert visible("a\u202eb\x00c\x1b[31m\ud800\n\t") == "a⟨U+202E⟩b⟨U+0000⟩c⟨U+001B⟩[31m⟨U+D800⟩\n\t"
    assert visible("x" * 1_000_000, 10) == "xxxxxxxxxx… (999,990 more characters)"
