"""The table of stages, what `rlhf stage=<name>` does. A new one is a file here, a row, and a file in conf/stage."""

from __future__ import annotations

from rlhf_lightning.runtime.stage import Stage

STAGES = {
    stage.name: stage
    for stage in (
        Stage("sft", "supervised fine-tuning on demonstrations", "sft:run", trains=True),
        Stage("reward", "a reward model from preferences", "reward:run", trains=True, generative=False),
        Stage("dpo", "direct preference optimization", "dpo:run", trains=True),
        Stage("ppo", "PPO against a reward", "online:run", trains=True, online=True, needs_start=True),
        Stage("rloo", "RLOO against a reward", "online:run", trains=True, online=True, needs_start=True),
        Stage("grpo", "GRPO against a reward", "online:run", trains=True, online=True, needs_start=True),
        Stage(
            "online_dpo",
            "DPO on preferences between its own responses",
            "online:run",
            trains=True,
            online=True,
            needs_start=True,
        ),
        Stage(
            "candidates",
            "several scored responses to every prompt",
            "candidates:run",
            needs_start=True,
            output="candidates.jsonl",
        ),
        Stage(
            "revise",
            "answers criticized and revised by a constitution",
            "revise:run",
            needs_start=True,
            output="demonstrations.jsonl",
            judges=True,
        ),
        Stage(
            "judge", "labels by a judge, and how far it can be trusted", "judge:run", output="labels.jsonl", judges=True
        ),
        Stage("simulate", "labels by simulated annotators", "simulate:run", output="labels.jsonl"),
        Stage(
            "agreement",
            "how far annotators agree, and what is known of each",
            "agreement:run",
            output="metrics.json",
        ),
        Stage(
            "aggregate",
            "labels of several annotators made into rows to train on",
            "aggregate:run",
            output="preferences.jsonl",
        ),
        Stage(
            "evaluate",
            "rewards, KL, length and accuracy of models on held-out rows",
            "evaluate:run",
            output="metrics.json",
            models=("evaluate.models", "evaluate.reference"),
            judges=True,
            sources={"evaluate.preferences": "val", "evaluate.bag_of_words": "train", "evaluate.answers": "val"},
        ),
        Stage(
            "overoptimize",
            "proxy and gold reward of best-of-n and policies against KL",
            "overoptimize:run",
            needs_start=True,
            output="metrics.json",
            models=("overoptimize.proxies", "overoptimize.policies"),
        ),
        Stage(
            "probe",
            "what RLHF did to a model: probes with intervals and alarms",
            "probe:run",
            output="metrics.json",
            models=("probe.models", "probe.reference"),
            judges=True,
            sources={"probe.data": "val"},
        ),
        Stage("report", "a page of what a pipeline has stored", "report:run", output=None),
        Stage("compare", "pipelines side by side on one page", "compare:run", output=None),
        Stage("label", "a page on which annotators compare, rank, edit or write answers", "label:run", output=None),
        Stage("chat", "talk to a model in the terminal", "chat:run", output=None),
        Stage("audit", "checks of model, data and reward before a long run", "audit:run", output=None),
        Stage("export", "the rows of a data source as files", "export:run", output="metrics.json"),
    )
}
