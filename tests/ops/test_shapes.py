"""Every function of `ops` that returns tensors returns the shapes its docstring names."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning import ops
from rlhf_lightning.ops.groups import Group, pack

S, T = 3, 5  # responses, and tokens of the longest
P, N_SAMPLES = 2, 7  # prompts, and responses to each
N, D, V = 11, 13, 17  # tokens in the loss, hidden size, vocabulary
R, L = 4, 6  # rows of a batch, and tokens of each

TABLE = torch.arange(S * T).reshape(S, T).float()
MASK = torch.arange(T)[None, :] < torch.tensor([5, 1, 3])[:, None]
SCORES = torch.arange(P * N_SAMPLES).reshape(P, N_SAMPLES).float()
FLAT, PAIRS = torch.zeros(N), torch.zeros(P)
HIDDEN, LOGITS = torch.zeros(N, D), torch.zeros(N, V)
HEAD = torch.nn.Linear(D, V)
TARGETS = torch.zeros(N, dtype=torch.long)
RANKS, GROUP_OF = torch.tensor([0, 1, 1, 2, 0, 1]), torch.tensor([0, 0, 0, 0, 1, 1])  # 5 + 1 untied pairs
ROWS = torch.zeros(R, L, dtype=torch.long)
GROUPS = [Group([1], [[2, 3], [4]]), Group([5, 6], [[7, 8, 9]])]

SHAPES: dict[str, tuple[tuple[Any, ...], Any]] = {
    # function: its arguments, and the shape of what it returns
    "gae": ((TABLE, TABLE, MASK), [(S, T), (S, T)]),
    "discounted_returns": ((TABLE, MASK), (S, T)),
    "moments": ((TABLE, MASK), [(), ()]),
    "whiten": ((TABLE, MASK), (S, T)),
    "rloo": ((SCORES,), (P, N_SAMPLES)),
    "grpo": ((SCORES,), (P, N_SAMPLES)),
    "ridge_step": ((HIDDEN, FLAT, 1.0), [(D,), ()]),
    "explained_variance": ((TABLE, TABLE + 1, MASK), ()),
    "best_of_n_means": ((FLAT, FLAT), (N,)),
    "best_of_n_kl_with_ties": ((FLAT,), (N,)),
    "kl_estimate": ((FLAT, FLAT), (N,)),
    "token_rewards": ((TABLE[:, 0], TABLE, MASK, 0.1), (S, T)),
    "widened": ((LOGITS, 0.5), [(N, V)]),
    "entropies": ((LOGITS, 0.5), (N,)),
    "token_logprobs": ((HIDDEN, HEAD, TARGETS, 1.0, True), [(N,), (N,)]),
    "sequence_sum": ((FLAT, TARGETS, S), (S,)),
    "preference_loss": ((PAIRS, 0.1), (P,)),
    "ppo_policy_loss": ((FLAT, FLAT, FLAT), [(N,), (N,)]),
    "ppo_value_loss": ((FLAT, FLAT, FLAT), [(N,), (N,)]),
    "response_weights": ((MASK.sum(1), "grpo", 9.0, 3.0, 8), (S,)),
    "group_attention_mask": ((ROWS, ROWS), (R, 1, L, L)),
    "bradley_terry": ((PAIRS, PAIRS), (P,)),
    "ranked_pairs": ((RANKS, GROUP_OF), [(6,), (6,)]),
    "pairs_in_order": ((PAIRS,), (P,)),
    "count_each": ((GROUP_OF, P), (P,)),
    "pairwise_ranking": ((RANKS.float(), RANKS, GROUP_OF, PAIRS, PAIRS), [(P,), (6,)]),
    "plackett_luce": ((RANKS.float(), RANKS, GROUP_OF, P), (P,)),
    "centering": ((RANKS.float(), GROUP_OF, P), (P,)),
    "permutation": ((N, 0), (N,)),
    "uniform": ((N, 0), (N,)),
    "normal": ((N, 0), (N,)),
}


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the public functions of `ops` that return a tensor or several."""
    for info in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"{ops.__name__}.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and "Tensor" in str(function.__annotations__["return"]):
                yield name, function


FUNCTIONS = dict(functions())


def test_no_function_is_left_out() -> None:
    assert set(SHAPES) == set(FUNCTIONS)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    arguments, expected = SHAPES[name]
    result = FUNCTIONS[name](*arguments)
    shapes = tuple(result.shape) if isinstance(result, Tensor) else [tuple(x.shape) for x in result]
    assert shapes == expected


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_shapes_of_a_batch(layout: Any) -> None:
    """Two groups with three responses of six tokens: one row of nine tokens when packed, else a row per response."""
    batch = pack(GROUPS, layout=layout)
    rows = (1, 9) if layout == "packed" else (3, 5)
    shapes = dict.fromkeys(("input_ids", "position_ids", "group_ids", "response_ids"), rows)
    shapes |= dict.fromkeys(("source", "targets", "sequence_ids"), (6,))
    shapes |= dict.fromkeys(("last", "lengths", "group_of", "ranks"), (3,))
    shapes |= dict.fromkeys(("margins", "labels", "index"), (2,)) | dict.fromkeys(("better", "worse"), (1,))
    assert {name: tuple(x.shape) for name, x in vars(batch).items() if isinstance(x, Tensor)} == shapes
    assert (batch.groups, batch.sequences, batch.tokens) == (2, 3, 9 if layout == "packed" else 3 + 2 + 5)
