"""What a stage writes and the next one reads: a Hugging Face model folder with a manifest of where it came from."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import UserError
from rlhf_lightning.files import atomic_folder, read_json, regular
from rlhf_lightning.models.card import model_card

MANIFEST = "manifest.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_chain(name: str | Path) -> list[str]:
    """Return a model folder or hub name after the folders of the adapters on it, the outermost first.

    Raises:
        UserError: an adapter without a base, or whose base is not there.
    """
    chain = [str(name)]
    while (file := Path(chain[-1]) / ADAPTER_CONFIG).is_file():
        settings = read_json(file)
        base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
        if not isinstance(base, str) or not base:
            raise UserError(f"{file}: base_model_name_or_path must name the model that the adapter was trained on")
        beside = Path(chain[-1], base)
        base = str(beside) if beside.is_dir() and not Path(base).is_dir() else base
        if base in chain or len(chain) > 16:
            raise UserError(f"{file}: the adapter stands on itself (base_model_name_or_path={base})")
        if not Path(base).is_dir() and (base.startswith((".", "/", "~")) or base.count("/") > 1):
            raise UserError(
                f"the adapter {chain[-1]} was trained on {base}, which is not there; set base_model_name_or_path in "
                f"its {ADAPTER_CONFIG}"
            )
        chain.append(base)
    return chain


def holder(name: str | Path, *files: str) -> str:
    """Return the first of a model's :func:`adapter_chain` that has one of `files`, else the model at its end."""
    chain = adapter_chain(name)
    return next((place for place in chain if any(Path(place, file).is_file() for file in files)), chain[-1])


def hash_weights(folder: str | Path) -> str | None:
    """Return the SHA-256 over the safetensors and config files of a model folder; None for a hub name.

    That of an adapter covers the model it was trained on.
    """
    path = Path(folder)
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for base in adapter_chain(path)[1:2]:
        digest.update((weights_key(base) or base).encode())
    for file in sorted([*path.glob("*.safetensors"), *path.glob("config.json"), *path.glob(ADAPTER_CONFIG)]):
        digest.update(file.name.encode())
        with regular(file).open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """Return the manifest of a model folder, or None when it has none."""
    return read_json(Path(folder) / MANIFEST)


def versions() -> dict[str, str]:
    """Return the versions that decide a result."""
    installed = {"python": platform.python_version()}
    for name in ("rlhf-lightning", "torch", "lightning", "transformers", "tokenizers", "peft"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "unknown"
    if "bitsandbytes" in sys.modules:  # imported where it is installed
        installed["bitsandbytes"] = version("bitsandbytes")
    return installed


def write_model(folder: str | Path, model: Any, tokenizer: Any, manifest: dict[str, Any]) -> None:
    """Save a Hugging Face model, its tokenizer, `manifest` and a model card as `folder`, all or nothing."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        complete = manifest | {
            "weights": hash_weights(temporary),
            "versions": versions(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        (temporary / MANIFEST).write_text(json.dumps(complete, indent=2, default=str) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(model_card(temporary, complete, MANIFEST), encoding="utf-8")


def weights_key(folder: str) -> str | None:
    """Return the SHA-256 of a model folder's weights, as its manifest has it or computed; None for a hub name."""
    manifest = read_manifest(folder) if Path(folder).is_dir() else None
    weights = (manifest or {}).get("weights")
    if weights is not None and not (isinstance(weights, str) and re.fullmatch("[0-9a-f]{64}", weights)):
        raise UserError(f"{Path(folder) / MANIFEST}: weights={str(weights)[:80]!r} is no SHA-256")
    return weights or hash_weights(folder)


def parent_entry(role: str, folder: str) -> dict[str, Any]:
    """Return a manifest's record of a model this stage started from."""
    place = str(Path(folder).resolve()) if Path(folder).is_dir() else str(folder)
    return {"role": role, "folder": place, "weights": weights_key(folder)}
