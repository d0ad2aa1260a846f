"""Configurations composed in this process, many a second."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from hydra import compose, initialize_config_module
from hydra._internal.config_repository import ConfigRepository
from omegaconf import DictConfig

read = ConfigRepository.load_config
files: dict[tuple[str, ...], Any] = {}


def read_once(repository: ConfigRepository, config_path: str) -> Any:
    """Return a configuration file as Hydra reads it; parsing YAML anew for every composition is half its time."""
    key = (config_path, *(f"{source.provider}:{source.path}" for source in repository.get_sources()))
    if key not in files:
        files[key] = read(repository, config_path)
    return copy.deepcopy(files[key])


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_module("rlhf_lightning.conf", version_base="1.3"):
        ConfigRepository.load_config = read_once
        try:
            return compose("rlhf", overrides=list(overrides))
        finally:
            ConfigRepository.load_config = read


def composed(*overrides: str) -> DictConfig:
    """Return the configuration of `rlhf` with `overrides`, one that the caller may change."""
    return copy.deepcopy(_composed(overrides))
