"""The figures of a report as images in the loggers: present, readable, and those of the pipeline's report."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_lightning.evaluation.report import images, page
from rlhf_lightning.evaluation.report.images import log_figures
from rlhf_lightning.files import write_jsonl
from tests.evaluation.report.test_table_figures import ROWS
from tests.helpers.results import stored_pipeline, stored_stage

pytestmark = pytest.mark.slow


def logged(folder: Path, into: Path) -> dict[str, np.ndarray]:
    """Return the pixels of every image that TensorBoard gets of a run folder, at step 0."""
    logger = TensorBoardLogger(str(into), name="", version="", default_hp_metric=False)
    log_figures([logger], folder)
    logger.finalize("success")
    events = EventAccumulator(str(into), size_guidance={"images": 0}).Reload()
    found = {}
    for tag in events.Tags()["images"]:
        (event,) = events.Images(tag)
        assert event.step == 0
        found[tag] = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    return found


def test_a_stage_of_a_pipeline_has_the_figures_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stored_pipeline(tmp_path / "made")
    write_jsonl(made / "3_ppo" / "tables" / "probes.jsonl", ROWS["probes"])  # of another stage
    folder = made / "4_evaluate"
    drawn: list[Any] = []
    monkeypatch.setattr(page, "drawings", lambda *given, of=page.drawings: drawn.extend(of(*given)) or drawn)
    found = logged(folder, tmp_path / "events")
    assert {"figures/gold_reward_against_kl", "figures/difference_in_length_tokens"} <= found.keys()
    assert "figures/lengths_of_the_answers" in found
    assert len(found) == len(drawn)
    for image in found.values():
        assert image.shape[1:] == (700, 3)
        assert image[0, 0].tolist() == [255, 255, 255]
        assert image.std() > 10  # something is drawn
    plane = next(figure for figure in drawn if figure.title == "Gold reward against KL")
    assert "Not drawn: base" in plane.caption  # it is known only from the other stages
    assert {figure.source.partition("/")[0] for figure in drawn} == {"evaluate"}


def test_a_run_alone_has_those_of_its_tables(tmp_path: Path) -> None:
    tables = {name: ROWS[name] for name in ("overoptimization", "calibration", "probes")}
    stored_stage(tmp_path / "run", "evaluate", {}, tables=tables)
    (tmp_path / "run" / "run.json").unlink()  # as of a call in a notebook
    assert logged(tmp_path / "run", tmp_path / "events").keys() == {
        "figures/overoptimization_best_of_n", "figures/overoptimization_ppo", "figures/overoptimization_dpo",
        "figures/reliability_of_the_reward_model", "figures/probes_style",
    }  # fmt: skip


def test_nothing_is_read_or_drawn_where_no_logger_takes_images(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_figures([CSVLogger(str(tmp_path), name="", version="csv")], tmp_path / "nowhere")
        images.log_figures([], tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
