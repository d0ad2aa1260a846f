"""A file or a folder is there whole or not at all, and a manifest says what made it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rlhf_lightning.errors import UserError
from rlhf_lightning.files import atomic_path, fingerprint, read_json, readable_os_errors, write_json, write_jsonl
from rlhf_lightning.models.folder import hash_weights, parent_entry, read_manifest, write_model
from rlhf_lightning.runtime.run_folder import claim, find_run


class Words:
    """Stands for a tokenizer."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


class Failing:
    """A model whose weights cannot be written."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def save_pretrained(self, folder: Path, **options: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half of the wei")
        raise self.error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_fingerprint_ignores_key_order_and_sees_every_value() -> None:
    first = fingerprint({"a": 1, "b": {"c": [1, 2], "d": None}})
    assert first == fingerprint({"b": {"d": None, "c": [1, 2]}, "a": 1})
    assert len(first) == 64
    others = [{"a": 1}, {"a": 1, "b": {"c": [2, 1], "d": None}}, {"a": "1", "b": {"c": [1, 2], "d": None}}]
    assert len({first, *map(fingerprint, others)}) == 4


def test_hash_weights_sees_content_only(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "a" / "manifest.json").write_text("{}")  # says where it came from, not what it is
    assert hash_weights(tmp_path / "a") == hash_weights(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text('{"reward_mean": 1.0}')
    assert hash_weights(tmp_path / "a") != hash_weights(tmp_path / "b")
    assert hash_weights("org/name-on-the-hub") is None


def test_hash_of_a_folder_without_config_is_left_to_the_loader_to_refuse(tmp_path: Path) -> None:
    entry = parent_entry("reward", str(tmp_path))
    assert entry["role"] == "reward"
    assert len(entry["weights"]) == 64


def test_parent_entry_trusts_the_manifest(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"weights": "ab" * 32})
    assert parent_entry("init", str(tmp_path)) == {"role": "init", "folder": str(tmp_path), "weights": "ab" * 32}
    assert parent_entry("init", "hub/name") == {"role": "init", "folder": "hub/name", "weights": None}


def test_write_json_replaces_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.json"
    write_json(path, {"first": 1})
    write_json(path, {"naïve": [1.5, None]})
    assert read_json(path) == {"naïve": [1.5, None]}
    assert names(path.parent) == ["metrics.json"]


def test_the_old_file_is_swapped_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"run": 1})
    with path.open() as reader:
        write_json(path, {"run": 2})
        assert json.load(reader) == {"run": 1}  # at no moment does the name hold half a file
    assert read_json(path) == {"run": 2}


def test_a_failed_write_keeps_the_last_good_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"good": 1})
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half of")
        _ = 1 / 0
    assert read_json(path) == {"good": 1}
    assert names(tmp_path) == ["metrics.json"]


def test_write_jsonl_keeps_one_row_a_line(tmp_path: Path) -> None:
    rows = [{"response": "line\nnext\u2028\x1b[31m"}, {"response": "é"}]
    write_jsonl(tmp_path / "s.jsonl", rows)
    text = (tmp_path / "s.jsonl").read_text()
    assert text.isascii()
    assert "\x1b" not in text
    assert [json.loads(line) for line in text.splitlines()] == rows


def test_read_json_without_a_file_and_with_a_damaged_one(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") is None
    assert read_manifest(tmp_path) is None
    for content in (b'{"stage": "sf', b"\xff\xfe\x00"):
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(UserError, match=r"manifest\.json is not readable JSON"):
            read_manifest(tmp_path)


def full(error: Exception) -> Exception:
    """Return `error` as raised while the disk is full, the way torch reports it."""
    error.__context__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        PermissionError(errno.EACCES, "Permission denied"),
        # what safetensors 0.7 and torch 2.13 raised on a full file system
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        full(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")),
    ],
    ids=["space", "quota", "permission", "safetensors", "torch"],
)
def test_a_full_disk_is_one_message_with_path_and_free_space(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "last.ckpt"
    with pytest.raises(UserError, match=r"cannot write .*last\.ckpt: .*\d+ MiB free.*intact"):  # noqa: SIM117
        with readable_os_errors(path):
            raise error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        UserError("a row is bad"),
    ],
)
def test_other_errors_pass_unchanged(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, readable_os_errors(tmp_path):
        raise error
    assert caught.value is error


def test_a_file_in_the_way_of_a_folder_is_not_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        write_json(tmp_path / "outputs" / "metrics.json", {})


def test_of_two_starts_in_one_folder_one_is_refused(tmp_path: Path) -> None:
    claim(tmp_path / "run", {"fingerprint": "a"})
    with pytest.raises(UserError, match="already holds a run"):
        claim(tmp_path / "run", {"fingerprint": "b"})
    assert read_json(tmp_path / "run" / "run.json") == {"fingerprint": "a"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_a_run_of_another_stage_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    (tmp_path / "old" / "checkpoints" / "last.ckpt").touch()
    claim(tmp_path / "old", {"fingerprint": "a", "stage": "dpo"})
    with pytest.raises(UserError, match=r"is a run of stage=dpo, not of stage=sft"):
        find_run(tmp_path / "new", "sft", "model", str(tmp_path / "old"), "b")
    (tmp_path / "foreign").mkdir()
    write_json(tmp_path / "foreign" / "run.json", {"a": 1})  # somebody else's file of that name
    assert find_run(tmp_path / "new", "sft", "model", "auto", "b") == (tmp_path / "new", None, None)


def test_write_model_opens_with_plain_transformers(tiny_lm: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "model"
    write_model(folder, tiny_lm, Words(), {"stage": "sft", "parents": [], "seed": 3})
    again = AutoModelForCausalLM.from_pretrained(folder)
    for name, value in tiny_lm.state_dict().items():
        assert value.equal(again.state_dict()[name]), name
    manifest = read_manifest(folder)
    assert manifest is not None
    assert (manifest["stage"], manifest["parents"], manifest["seed"]) == ("sft", [], 3)
    assert manifest["weights"] == hash_weights(folder)
    assert {"python", "torch", "lightning", "transformers", "rlhf-lightning"} <= set(manifest["versions"])
    assert not list(folder.glob("*.bin"))
    assert names(folder.parent) == ["model"]
    assert oct(folder.stat().st_mode & 0o777) == "0o755"


def test_write_model_replaces_an_older_folder_completely(tiny_lm: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "stale.safetensors").write_bytes(b"old")
    write_model(folder, tiny_lm, Words(), {"stage": "dpo"})
    assert "stale.safetensors" not in names(folder)
    assert names(tmp_path) == ["model"]


def test_a_model_that_cannot_be_written_keeps_the_older_one(tiny_lm: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_model(folder, tiny_lm, Words(), {"stage": "sft"})
    before = hash_weights(folder)
    no_space = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(UserError, match="No space left"):
        write_model(folder, Failing(no_space), Words(), {"stage": "dpo"})
    assert hash_weights(folder) == before
    assert read_manifest(folder)["stage"] == "sft"  # type: ignore[index]
    assert names(tmp_path) == ["model"]
