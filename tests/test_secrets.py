"""Values of environment variables are in nothing that is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf_lightning.runtime import secrets
from rlhf_lightning.runtime.pipeline import as_override
from rlhf_lightning.runtime.secrets import notice_variables, redact, redacted
from tests.helpers.cli import SMALL, rlhf

SECRET = "hunter2-hunter2"


@pytest.fixture
def secret() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_TOKEN", SECRET)
        patch.setenv("MY_RATE", "0.25")
        patch.setattr(secrets, "_names", set())
        yield SECRET


CFG = OmegaConf.create(
    {
        "plain": "${oc.env:MY_TOKEN}",
        "inside": "Bearer ${oc.env:MY_TOKEN}!",
        "through": {"a": ["${plain}"]},
        "number": "${oc.decode:${oc.env:MY_RATE}}",
        "absent": "${oc.env:NOT_THERE,${oc.env:MY_TOKEN}/x}",
        "default": "${oc.env:NOT_THERE,free}",
        "other": 3,
    }
)


def test_a_configuration_is_written_with_the_names(secret: str) -> None:
    assert redacted(CFG) == {
        "plain": "${oc.env:MY_TOKEN}",
        "inside": "Bearer ${oc.env:MY_TOKEN}!",
        "through": {"a": ["${oc.env:MY_TOKEN}"]},
        "number": "${oc.decode:${oc.env:MY_RATE}}",
        "absent": "${oc.env:MY_TOKEN}/x",
        "default": "free",
        "other": 3,
    }
    resolved = OmegaConf.to_container(CFG, resolve=True)
    assert resolved["number"] == 0.25  # type: ignore[index, call-overload]
    assert OmegaConf.to_container(OmegaConf.create(redacted(CFG)), resolve=True) == resolved  # what a child makes of it


def test_a_variable_that_chooses_a_key_is_not_resolved(secret: str) -> None:
    for text in ("${oc.select:a.${oc.env:MY_TOKEN}}", "${a.${oc.env:MY_TOKEN}}"):
        cfg = OmegaConf.create({"x": text, "a": {SECRET: 1}})
        assert cfg.x == 1
        assert redacted(cfg)["x"] == text


def test_messages_do_not_say_them(secret: str) -> None:
    notice_variables(CFG)
    assert redact(f"no file {secret}.jsonl") == "no file ${oc.env:MY_TOKEN}.jsonl"
    assert as_override("a", redacted(CFG)["plain"]) == "a='${oc.env:MY_TOKEN}'"


PIPELINE = """
name: p
stages:
  one:
    use: {stage: sft}
    set:
      data: {train: rows.jsonl}
      +note: token ${oc.env:MY_TOKEN}
      optimizer: {lr: "${oc.decode:${oc.env:MY_RATE}}"}
"""


@pytest.mark.slow
@pytest.mark.xdist_group("cli")
def test_a_run_and_a_pipeline_write_none(secret: str, tmp_path: Path) -> None:
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "p.yaml").write_text(PIPELINE)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 4)
    more = ["+other=a ${oc.env:MY_TOKEN}", "+hydra.job.env_copy=[MY_TOKEN]", "max_steps=1", *SMALL]
    rlhf(tmp_path, f"--config-dir={tmp_path / 'conf'}", "pipeline=p", *more)
    missing = ["stage=sft", "data.train=./${oc.env:MY_TOKEN}.jsonl", *SMALL]
    assert "${oc.env:MY_TOKEN}.jsonl" in rlhf(tmp_path, *missing, code=2).stderr
    files = [file for file in (tmp_path / "outputs").rglob("*") if file.is_file()]
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    events = b"".join(file.read_bytes() for file in files if "events" in file.name)
    assert b"a ${oc.env:MY_TOKEN}" in events  # the HParams tab has the keys
    overrides = next(file for file in files if file.name == "overrides.yaml" and "0_one" in str(file)).read_text()
    assert "token ${oc.env:MY_TOKEN}" in overrides
