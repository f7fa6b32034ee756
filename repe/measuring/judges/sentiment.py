"""Sentiment: how good or bad the words of a text are, by VADER's lexicon. It is an extra: 'repe-torch[judges]'."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np

END = re.compile(r"(?<=[.!?])\s+|\n+")


def sentiment(prompt: Any, text: str) -> float:
    """Give the sentiment of an English text, in [-1, 1]: VADER's compound score, mean over sentences; 0 for no words.

    It counts words, with rules for negations and emphasis: irony and quotes are taken as they stand.

    Args:
        prompt: is not looked at.
        text: what was written.

    Raises:
        ImportError: vaderSentiment is not installed.

    Example:
        >>> sentiment("", "I love it.") > sentiment("", "It is a table.") > sentiment("", "I hate it.")
        True

    Source: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text"
    (ICWSM 2014).
    """
    sentences = [sentence for sentence in END.split(text) if sentence.strip()]
    return float(np.mean([_analyzer().polarity_scores(sentence)["compound"] for sentence in sentences or [""]]))


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            f"`sentiment` needs a package that is not installed ({error}): pip install 'repe-torch[judges]'"
        ) from error
    return SentimentIntensityAnalyzer()
