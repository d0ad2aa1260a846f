"""What a reward model has to beat: "the longer response is better", and a bag of words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.sparse import vstack
from torch import Tensor

from rlhf_lightning.errors import UserError, needs
from rlhf_lightning.evaluation.reward_model import TextPair

STRENGTH = 0.03
"""Inverse of the L2 penalty of the bag of words."""


Judgement = Callable[[Sequence[TextPair]], Tensor]
"""Returns how much better (P,) it takes the better response of each pair to be; above 0 is right, 0 is undecided."""


def longer(pairs: Sequence[TextPair]) -> Tensor:
    """Return by how many characters the better response of each pair is longer."""
    return torch.tensor([float(len(pair.better) - len(pair.worse)) for pair in pairs])


def bag_of_words(pairs: Sequence[TextPair]) -> Judgement:
    """Return a Bradley-Terry model whose score is a sum of weights of the words of a response, learned from `pairs`.

    Raises:
        UserError: without scikit-learn, or without a word that occurs five times.
    """
    text, linear = (needs(f"sklearn.{part}", "agreement") for part in ("feature_extraction.text", "linear_model"))
    words = text.CountVectorizer(min_df=5, binary=True)
    try:
        words.fit([text for pair in pairs for text in (pair.better, pair.worse)])
    except ValueError as error:
        raise UserError(f"evaluate.bag_of_words: of {len(pairs)} pairs nothing can be learned: {error}") from error

    def gaps(those: Sequence[TextPair]) -> Any:
        return words.transform([p.better for p in those]).astype(float) - words.transform([p.worse for p in those])

    table = gaps(pairs)
    # the loss is symmetric: a pair and its swap are one example each, so there is no intercept
    model = linear.LogisticRegression(C=STRENGTH / 2, fit_intercept=False, max_iter=1000)
    model.fit(vstack([table, -table]), [1] * len(pairs) + [0] * len(pairs))
    weights = model.coef_[0]
    return lambda those: torch.from_numpy(gaps(those) @ weights)
