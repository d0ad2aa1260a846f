"""Artefacts of others: settings, checkpoints, model folders, chat templates, data. Each is refused in one line, exit code 2,
in bounded time, and nothing in it is executed: the marker file that every payload would write is not there."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file

from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.sources import read_source
from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.folder import weights_key
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer, resolve_model
from rlhf_lightning.models.tiny import build_tiny
from tests.helpers.cli import rlhf

SECONDS = 120  # an idle machine needs 5


class Payload:
    """Pickles to a call that writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@dataclass
class Place:
    """A working directory with rows.jsonl, a model folder to damage, and payloads that write `marker`."""

    folder: Path
    model: Path
    marker: Path

    @property
    def target(self) -> str:
        """A configuration that runs a pickle."""
        return f"{{_target_: torch.load, f: {self.folder}/evil.pt, weights_only: false}}"

    def experiment(self, text: str, group: str = "experiment") -> list[str]:
        """Write an option `evil` of a group of the configuration and return the arguments that choose it."""
        file = self.folder / "conf" / group / "evil.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        head = "# @package _global_\n" if group == "experiment" else "name: evil\nstages:\n  one:\n"
        file.write_text(head + text)
        return [f"--config-dir={self.folder / 'conf'}", f"{group}=evil"]

    def edit(self, file: str, **changes: Any) -> list[str]:
        """Change keys of a JSON file of the model folder."""
        path = self.model / file
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
        return []

    def write(self, file: str, content: str | bytes | Any) -> list[str]:
        """Write a file of the model folder: text, bytes, or JSON."""
        data = content if isinstance(content, str | bytes) else json.dumps(content)
        (self.model / file).write_bytes(data if isinstance(data, bytes) else data.encode())
        return []

    def replace(self, file: str, make: Callable[[Path], Any]) -> list[str]:
        """Replace a file of the model folder by a link, a pipe or the like."""
        (self.model / file).unlink(missing_ok=True)
        make(self.model / file)
        return []

    def checkpoint(self, name: str) -> list[str]:
        """Return the argument that resumes from a file of the working directory."""
        return [f"resume={self.folder / name}"]

    def run(self, **files: str) -> list[str]:
        """Write files into a run folder, the payload as its checkpoint, and return what resumes from it."""
        run = self.folder / "run"
        (run / "checkpoints").mkdir(parents=True)
        shutil.copy(self.folder / "evil.ckpt", run / "checkpoints" / "last.ckpt")
        for name, text in files.items():
            (run / f"{name}.json").write_text(text)
        return [f"resume={run}"]

    def data(self, name: str, make: Callable[[Path], Any]) -> list[str]:
        """Make a data file and return the argument that reads it."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
        return [f"data.train={name}"]

    def gguf(self, content: bytes) -> list[str]:
        """Return the argument that starts from a GGUF file of this content."""
        (self.folder / "evil.gguf").write_bytes(content)
        return [f"init_from={self.folder / 'evil.gguf'}"]


def link(target: str) -> Callable[[Path], Any]:
    return lambda path: path.symlink_to(target)


def only_pickled(place: Place) -> list[str]:
    (place.model / "model.safetensors").unlink()
    return place.write("pytorch_model.bin", pickle.dumps(Payload(place.marker)))


def indexed(name: str, file: str = "model.safetensors.index.json") -> Callable[[Place], list[str]]:
    """Return what replaces the weights by an index that names a file."""

    def make(place: Place) -> list[str]:
        shutil.move(place.model / "model.safetensors", place.folder / "outside.safetensors")
        shutil.copy(place.folder / "evil.pt", place.model / "evil.bin")
        return place.write(file, {"metadata": {}, "weight_map": {"lm_head.weight": name}})

    return make


def code_in_folder(file: str, **changes: Any) -> Callable[[Place], list[str]]:
    """Return what adds a module and names it in a config."""

    def make(place: Place) -> list[str]:
        shutil.copy(place.folder / "evil.py", place.model / "evil.py")
        return place.edit(file, **changes)

    return make


def adapter(pickled: bool = False, **changes: Any) -> Callable[[Place], list[str]]:
    """Return what puts an adapter into the model folder."""

    def make(place: Place) -> list[str]:
        if pickled:
            shutil.copy(place.folder / "evil.pt", place.model / "adapter_model.bin")
        else:
            save_file({"x": torch.zeros(1)}, place.model / "adapter_model.safetensors")
        base = shutil.copytree(place.model, place.folder / "base", ignore=shutil.ignore_patterns("adapter_*"))
        settings = {"peft_type": "LORA", "r": 1, "base_model_name_or_path": str(base)}
        return place.write("adapter_config.json", settings | changes)

    return make


def template(source: str) -> Callable[[Place], list[str]]:
    """Return what gives the model folder a chat template; {marker} in it is the marker file."""
    return lambda place: place.write("chat_template.jinja", source.replace("{marker}", str(place.marker)))


def bomb(path: Path) -> None:
    """Write a checkpoint of a few KB that unpacks to much more."""
    torch.save({"state_dict": {"x": torch.zeros(1_000_000)}}, path.with_suffix(".pt"))
    with zipfile.ZipFile(path.with_suffix(".pt")) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))


def saved_elsewhere(path: Path) -> None:
    """Write a data set of save_to_disk whose rows are in a file elsewhere."""
    path.mkdir()
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../etc/passwd"}], "_split": "train"}))
    (path / "dataset_info.json").write_text("{}")


def primary(place: Place, text: str) -> list[str]:
    """Return what composes a primary configuration of one's own."""
    (place.folder / "conf").mkdir(exist_ok=True)
    (place.folder / "conf" / "mine.yaml").write_text(text)
    return [f"--config-dir={place.folder / 'conf'}", "--config-name=mine"]


def run_with_config(place: Place) -> list[str]:
    """Return what composes the configuration that a run folder has in .hydra."""
    folder = place.folder / "run" / ".hydra"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"defaults: [rlhf, _self_]\nhydra:\n  callbacks:\n    x: {place.target}\n")
    return [f"--config-dir={folder}", "--config-name=config"]


def other_run(place: Place) -> list[str]:
    """Return what resumes from a checkpoint of another model."""
    state = {
        "state_dict": {"x": torch.zeros(1)},
        "global_step": 1,
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
    }
    more = {"epoch": 0, "lr_schedulers": [], "pytorch-lightning_version": "2.6.6"}
    torch.save(state | more, place.folder / "other.ckpt")
    return place.checkpoint("other.ckpt")


def cut(place: Place) -> list[str]:
    (place.folder / "cut.ckpt").write_bytes((place.folder / "evil.ckpt").read_bytes()[:600])
    return place.checkpoint("cut.ckpt")


NESTED = "[" * 200_000
Case = tuple[Callable[[Place], list[str]], str]
SETTINGS: dict[str, Case] = {
    "escaped interpolation": (lambda p: [f'+trainer.default_root_dir="\\${{oc.create:{p.target}}}"'], "was escaped"),
    "escaped in a file": (
        lambda p: p.experiment(f"trainer:\n  default_root_dir: '\\${{oc.create:{p.target}}}'\n"), "was escaped"),
    "escaped twice": (
        lambda p: p.experiment(f"trainer:\n  default_root_dir: '\\\\\\${{oc.create:{p.target}}}'\n"), "was escaped"),
    "escaped in a list": (
        lambda p: p.experiment(f"optimizer:\n  betas: ['\\${{oc.create:{p.target}}}', 0.9]\n"), "was escaped"),
    "interpolated target": (
        lambda p: p.experiment(f"trainer:\n  default_root_dir: '${{oc.create:{p.target}}}'\n"), "not an allowed target"),
    "interpolated name": (
        lambda p: p.experiment("name: torch.load\noptimizer:\n  _target_: ${name}\n"), "not an allowed target"),
    "target in a list": (
        lambda p: p.experiment(f"optimizer:\n  betas: [{p.target}]\n"), "optimizer.betas[0]._target_=torch.load"),
    "target by another name": (
        lambda p: ["optimizer._target_=rlhf_lightning.callbacks.checkpoints.torch.load"], "not an allowed target"),
    "callback": (lambda p: p.experiment(f"callbacks:\n  x: {p.target}\n"), "callbacks.x._target_=torch.load"),
    "data module": (lambda p: ["data._target_=evil.Data"], "data._target_=evil.Data is not an allowed target"),
    "engine": (lambda p: ["sampler._target_=evil.Engine"], "sampler._target_=evil.Engine is not an allowed target"),
    "allow_targets in a file": (
        lambda p: p.experiment(f"allow_targets: [torch.load]\ncallbacks:\n  x: {p.target}\n"), "command line only"),
    "allow_targets as overrides of a file": (
        lambda p: p.experiment(
            f"allow_targets: [torch.load]\nhydra:\n  overrides:\n    task: ['allow_targets=[torch.load]']\ncallbacks:\n"
            f"  x: {p.target}\n"), "no file can set it"),
    "allow_targets in a pipeline": (
        lambda p: p.experiment("    use: {stage: sft}\n    set: {allow_targets: [torch.load]}\n", "pipeline"),
        "command line only"),
    "allow_targets in a sweep": (
        lambda p: ["-m", *p.experiment("hydra:\n  sweeper:\n    params:\n      allow_targets: '[torch.load]'\n")],
        "cannot be swept"),
    "hydra in a pipeline": (
        lambda p: p.experiment(f"    use: {{stage: sft}}\n    set: {{+hydra.callbacks.x: {p.target}}}\n", "pipeline"),
        "command line only"),
    "option in a pipeline": (
        lambda p: p.experiment(f"    use: {{--experimental-rerun: {p.folder}/evil.pt}}\n", "pipeline"), "is not a key"),
    "hydra.callbacks": (lambda p: [f"+hydra.callbacks.x={p.target}"], "hydra.callbacks.x._target_=torch.load"),
    "hydra.callbacks in a file": (
        lambda p: p.experiment(f"hydra:\n  callbacks:\n    x: {p.target}\n"), "not an allowed target"),
    "hydra.callbacks in arguments": (
        lambda p: p.experiment(
            f"hydra:\n  callbacks:\n    x:\n      _target_: rlhf_lightning.runtime.sweeps.SweepSummary\n      y: {p.target}\n"),
        "hydra.callbacks.x.y._target_=torch.load"),
    "hydra.callbacks interpolated": (
        lambda p: p.experiment(
            "name: rlhf_lightning.runtime.sweeps.SweepSummary\nhydra:\n  callbacks:\n    x: {_target_: '${name}'}\n"),
        "written out"),
    "hydra.callbacks escaped": (
        lambda p: p.experiment(
            "hydra:\n  callbacks:\n    x:\n      _target_: rlhf_lightning.runtime.sweeps.SweepSummary\n"
            f"      y: '\\${{oc.create:{p.target}}}'\n"), "was escaped"),
    "hydra.launcher": (
        lambda p: ["-m", *p.experiment("hydra:\n  launcher: {_target_: evil.Launcher}\n")], "hydra.launcher._target_=evil"),
    "hydra.sweeper": (
        lambda p: ["-m", *p.experiment("hydra:\n  sweeper: {_target_: evil.Sweeper}\n")], "hydra.sweeper._target_=evil"),
    "hydra.job.env_set": (
        lambda p: p.experiment(f"hydra:\n  job:\n    env_set: {{LD_PRELOAD: {p.folder}/evil.so}}\n"), "command line only"),
    "hydra.output_subdir": (lambda p: p.experiment("hydra:\n  output_subdir: ../../x\n"), "not the name of a folder"),
    "logging class": (
        lambda p: p.experiment("hydra:\n  job_logging:\n    handlers:\n      x: {class: evil.Handler}\n"), "is not allowed"),
    "logging factory": (
        lambda p: p.experiment(f"hydra:\n  job_logging:\n    handlers:\n      x: {{'()': torch.load, f: {p.folder}/evil.pt}}\n"),
        "is not allowed"),
    "logging object": (
        lambda p: p.experiment("hydra:\n  hydra_logging:\n    handlers:\n      console: {stream: 'ext://evil.stream'}\n"),
        "is not allowed"),
    "log elsewhere": (
        lambda p: p.experiment(f"hydra:\n  job_logging:\n    handlers:\n      file: {{filename: {p.marker}}}\n"),
        "below the run folder"),
    "log by a job's name": (lambda p: p.experiment("hydra:\n  job:\n    name: ../../../ran\n"), "below the run folder"),
    "search path": (lambda p: primary(p, "defaults: [rlhf, _self_]\nhydra:\n  searchpath: [pkg://evil]\n"), "only file:// folders"),
    "pickled configuration": (lambda p: [f"--experimental-rerun={p.folder}/evil.pt"], "unpickles a file"),
    "configuration of a run": (run_with_config, "not an allowed target"),
    "tag of Python": (
        lambda p: p.experiment(f"name: !!python/object/apply:pathlib.Path.touch ['{p.marker}']\n"), "cannot be composed"),
    "address of a logger": (
        lambda p: p.experiment("logger:\n  x: {_target_: lightning.pytorch.loggers.MLFlowLogger, tracking_uri: 'http://x'}\n"),
        "logger.x.tracking_uri is taken from the command line"),
    "address of a model": (
        lambda p: p.experiment("label:\n  base_url: http://x\n"), "label.base_url is taken from the command line only"),
    "unknown resolver": (lambda p: p.experiment("name: ${python:exit}\n"), "Unsupported interpolation type python"),
    "kernel of the hub": (lambda p: ["model.load.attn_implementation=evil/kernel"], "is code from the hub"),
}  # fmt: skip
CHECKPOINTS: dict[str, Case] = {
    "pickle in a checkpoint": (lambda p: p.checkpoint("evil.ckpt"), "more than tensors and primitives"),
    "pickle as a checkpoint": (lambda p: p.checkpoint("raw.ckpt"), "more than tensors and primitives"),
    "truncated checkpoint": (cut, "cut.ckpt is damaged"),
    "packed checkpoint": (lambda p: (bomb(p.folder / "b.ckpt"), p.checkpoint("b.ckpt"))[1], "it is compressed"),
    "checkpoint of no run": (
        lambda p: (torch.save({"a": 1}, p.folder / "a.ckpt"), p.checkpoint("a.ckpt"))[1], "is not a checkpoint of a run"),
    "checkpoint of another model": (other_run, "is not of this run"),
    "checkpoint is a device": (
        lambda p: ((p.folder / "d.ckpt").symlink_to("/dev/zero"), p.checkpoint("d.ckpt"))[1], "there is no checkpoint"),
    "run folder with a pickle": (lambda p: p.run(), "more than tensors and primitives"),
    "run.json is a list": (lambda p: p.run(run="[1]"), "not an object"),
    "run.json is nested": (lambda p: p.run(run=NESTED), "not readable JSON"),
    "run.json with a long number": (lambda p: p.run(run='{"stage": ' + "9" * 6000 + "}"), "not readable JSON"),
}  # fmt: skip
MODELS: dict[str, Case] = {
    "pickled weights": (only_pickled, "no file named model.safetensors"),
    "index names a pickle": (indexed("evil.bin"), "names 'evil.bin'; only .safetensors files"),
    "index leads elsewhere": (indexed("../outside.safetensors"), "which is no file beside it"),
    "index is absolute": (indexed("/etc/passwd.safetensors"), "which is no file beside it"),
    "index of pickles": (indexed("evil.bin", "pytorch_model.bin.index.json"), "no file named model.safetensors"),
    "index is no object": (lambda p: p.write("model.safetensors.index.json", [1]), "not an object"),
    "code for the config": (
        code_in_folder("config.json", model_type="evil", auto_map={"AutoConfig": "evil.C"}), "custom code"),
    "code for the tokenizer": (
        code_in_folder("tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.T", None]}),
        "custom code"),
    "weights are a device": (lambda p: p.replace("model.safetensors", link("/dev/zero")), "is a device, not a file"),
    "config is a pipe": (lambda p: p.replace("generation_config.json", os.mkfifo), "is a pipe, not a file"),
    "tokenizer is a device": (lambda p: p.replace("tokenizer.json", link("/dev/urandom")), "is a device, not a file"),
    "ten million layers": (lambda p: p.edit("config.json", num_hidden_layers=10**7), "but its weights are"),
    "negative layers": (lambda p: p.edit("config.json", num_hidden_layers=-1), "is negative"),
    "large vocabulary": (lambda p: p.edit("config.json", vocab_size=10**18), "but its weights have"),
    "large hidden size": (lambda p: p.edit("config.json", hidden_size=10**9), "but its weights have"),
    "many heads": (lambda p: p.edit("config.json", num_attention_heads=10**9), "but its weights have"),
    "config is a list": (lambda p: p.write("config.json", [1]), "not an object"),
    "config is nested": (lambda p: p.write("config.json", NESTED), "not readable JSON"),
    "config is large": (lambda p: p.write("config.json", " " * 10**7 + "{}"), "bytes; a config has at most"),
    "config of another kind": (lambda p: p.edit("config.json", hidden_act="os.system"), "does not hold a usable model"),
    "kernel in the config": (lambda p: p.edit("config.json", _attn_implementation="evil/kernel"), "is code from the hub"),
    "quantized by a package": (
        lambda p: p.edit("config.json", quantization_config={"quant_method": "gptq"}), "holds quantized weights"),
    "weights are no safetensors": (lambda p: p.write("model.safetensors", b"\xff" * 64), "does not hold a usable model"),
    "tokenizer is nested": (lambda p: p.write("tokenizer.json", NESTED), "does not hold a usable model"),
    "tokenizer has another shape": (lambda p: p.write("tokenizer_config.json", [1]), "does not hold a usable model"),
    "adapter with pickled weights": (adapter(pickled=True), "has no adapter_model.safetensors"),
    "adapter of a model elsewhere": (adapter(base_model_name_or_path="../../etc"), "which is not there"),
    "adapter that names a class": (
        adapter(auto_mapping={"base_model_class": "C", "parent_library": "evil"}), "names a class to import"),
    "manifest is a list": (lambda p: p.write("manifest.json", [1]), "not an object"),
    "manifest leads elsewhere": (
        lambda p: p.write("manifest.json", {"weights": "../../../etc/passwd", "parents": ["/"]}), "is no SHA-256"),
    "no GGUF": (lambda p: p.gguf(pickle.dumps(Payload(p.marker))), "is not a GGUF file"),
    "GGUF of another version": (lambda p: p.gguf(b"GGUF" + struct.pack("<IQQ", 99, 1, 1)), "is not a GGUF file"),
    "GGUF with too many tensors": (
        lambda p: p.gguf(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(100)), "its header counts"),
    "GGUF that ends": (lambda p: p.gguf(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + bytes(40)), "not hold a usable model"),
}  # fmt: skip
ESCAPE = (
    "{{ cycler.__init__.__globals__.os.system('touch {marker}') }}{% for m in messages %}{{ m.content }}{% endfor %}"
)
TEMPLATES: dict[str, Case] = {
    "template leaves the sandbox": (template(ESCAPE), "is unsafe"),
    "template with a loop": (
        template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"), "takes more than 2 s"),
    "template that computes": (template("{% set x = 10**100000000 %}{{ messages[0].content }}"), "takes more than 2 s"),
    "template that grows": (
        template("{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"),
        "takes more than"),
    "template that pads": (template("{{ messages[0].content.center(10**11) }}"), "takes more than 1024 MiB"),
    "template that is long": (
        template("{% for i in range(99999) %}aaaaaaaa{% endfor %}{{ messages[0].content }}"), "characters"),
    "template with a large range": (template("{{ range(10**9)|list }}"), "refuses the roles"),
    "template without end": (template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "refuses the roles"),
    "template that is nested": (template("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}"), "refuses the roles"),
    "template that reads a file": (template("{% include '/etc/passwd' %}"), "refuses the roles"),
    "template without messages": (template("Hello.{{ eos_token }}"), "leaves out the user message"),
    "template without prompts": (
        template("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"), "leaves out the user"),
    "template that changes text": (
        template("{% for m in messages %}{{ m.content[:20] }}{% endfor %}"), "or changes its text"),
    "template that does not parse": (template("{% for m in %}"), "refuses the roles"),
}  # fmt: skip
DATA: dict[str, Case] = {
    "data from a device": (lambda p: p.data("d.jsonl", link("/dev/zero")), "is a device, not a file (a link to /dev/zero)"),
    "data from a pipe": (lambda p: p.data("d.csv", os.mkfifo), "is a pipe, not a file"),
    "data from the kernel": (lambda p: p.data("d.jsonl", link("/proc/kmsg")), "not a file"),
    "window from a device": (
        lambda p: [*p.data("d.jsonl", link("/dev/zero")), "data.window=4"], "is a device, not a file"),
    "folder with a device": (
        lambda p: (p.data("many/train.jsonl", link("/dev/zero")), ["data.train=many"])[1], "is a device, not a file"),
    "saved data elsewhere": (lambda p: p.data("saved", saved_elsewhere), "which is no file beside it"),
    "held-out rows from a device": (
        lambda p: [*p.data("d.jsonl", link("/dev/zero")), "data.train=rows.jsonl", "data.val=d.jsonl"], "is a device"),
}  # fmt: skip
BY_THE_COMMAND = [
    "ten million layers", "index names a pickle", "code for the config", "weights are a device", "manifest is a list",
    "template with a loop", "template leaves the sandbox", "template without messages", "data from a device",
]  # fmt: skip
"""Of the tables of models, templates and data: those that the command is given in every run of the tests."""
CASES = SETTINGS | CHECKPOINTS | MODELS | TEMPLATES | DATA


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hostile") / "model"
    return Path(build_tiny(place, ["answer one two"] * 9, vocab_size=300, hidden_size=32, layers=1, heads=2))


@pytest.fixture
def place(model: Path, tmp_path: Path) -> Place:
    marker = tmp_path / "ran"
    torch.save(Payload(marker), tmp_path / "evil.pt")
    torch.save({"state_dict": Payload(marker)}, tmp_path / "evil.ckpt")
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Payload(marker)))
    (tmp_path / "evil.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    rows = [{"prompt": f"q {i}", "response": f"answer {i}"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Place(tmp_path, Path(shutil.copytree(model, tmp_path / "model")), marker)


@contextmanager
def bounded(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError after so many seconds."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def by_the_command(name: str, place: Place) -> None:
    """Run the command on an artefact and check how it ends."""
    make, message = CASES[name]
    arguments = make(place)
    given = {argument.partition("=")[0] for argument in arguments}
    default = {
        "stage": "sft", "init_from": str(place.model), "data.train": "rows.jsonl", "max_steps": "1",
        "callbacks.samples": "null",
    }  # fmt: skip
    for key, unless in {"stage": "pipeline", "callbacks.samples": "sampler._target_"}.items():
        if unless in given:
            default.pop(key)
    arguments += [f"{key}={value}" for key, value in default.items() if key not in given]
    with bounded(SECONDS):
        done = rlhf(place.folder, *arguments, code=2)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr
    assert not place.marker.exists()


@pytest.mark.slow
@pytest.mark.xdist_group("hostile")
@pytest.mark.parametrize("name", [*SETTINGS, *CHECKPOINTS, *BY_THE_COMMAND])
def test_the_command_refuses_in_one_line(name: str, place: Place) -> None:
    by_the_command(name, place)


@pytest.mark.nightly
@pytest.mark.xdist_group("hostile")
@pytest.mark.parametrize("name", [name for name in MODELS | TEMPLATES | DATA if name not in BY_THE_COMMAND])
def test_the_command_refuses_every_other_one(name: str, place: Place) -> None:
    by_the_command(name, place)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS | TEMPLATES | DATA)
def test_a_library_is_not_asked_to_open_it(name: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of a stage in its order, without the command."""
    make, message = CASES[name]
    monkeypatch.chdir(place.folder)
    given = dict(argument.split("=", 1) for argument in make(place))
    with bounded(SECONDS), pytest.raises((UserError, RowError)) as caught:
        folder = resolve_model(given.get("init_from", str(place.model)), place.folder / "cache")
        rows = given.get("data.val", given.get("data.train", "rows.jsonl"))
        list(read_source(rows, "train", stream="data.window" in given).rows())
        weights_key(folder)
        Template(load_tokenizer(folder))
        load_causal_lm(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not place.marker.exists()


def test_the_payloads_work(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cases above are made of runs where nothing looks at it first."""
    namespace: dict[str, Any] = {}
    ways: dict[str, Callable[[], Any]] = {
        "checkpoint": lambda: torch.load(place.folder / "evil.ckpt", weights_only=False),
        "pickle": lambda: pickle.loads((place.folder / "raw.ckpt").read_bytes()),
        "module": lambda: exec((place.folder / "evil.py").read_text(), namespace),
        "template": lambda: jinja2.Template(ESCAPE.replace("{marker}", str(place.marker))).render(messages=[]),
        "target": lambda: hydra_instantiate(OmegaConf.create(f"x: {place.target}").x),
        "escaped": lambda: hydra_instantiate(
            OmegaConf.create(
                OmegaConf.to_container(
                    OmegaConf.create({"_target_": "builtins.dict", "x": f"\\${{oc.create:{place.target}}}"}),
                    resolve=True,
                )
            )
        ),
    }
    for name, way in ways.items():
        way()
        assert place.marker.exists(), name
        place.marker.unlink()


def test_as_many_as_the_issue_asks_for() -> None:
    assert len(CASES) == sum(map(len, (SETTINGS, CHECKPOINTS, MODELS, TEMPLATES, DATA))) >= 40
