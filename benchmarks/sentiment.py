"""The sentiment of a response as a reward: the compound score of VADER, -1 to 1 (Hutto and Gilbert 2014)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()


def sentiment(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
    """Return the sentiment of each response, without its prompt."""
    return [analyzer.polarity_scores(text)["compound"] for text in responses]
