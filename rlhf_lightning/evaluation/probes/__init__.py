"""The table of probes, what `probe=<name>` chooses. A new one is a file and rows here, and conf/probe/<name>.yaml."""

from __future__ import annotations

from rlhf_lightning.evaluation.probes.probe import Probe

PROBES: dict[str, Probe] = {probe.name: probe for probe in ()}
