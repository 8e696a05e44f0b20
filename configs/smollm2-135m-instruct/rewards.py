"""What the answers are trained on: a friendly tone, and a wished length."""

import re

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

SHORTEST, LONGEST = 10, 30  # words of an answer of the wished length
ANALYZER = SentimentIntensityAnalyzer()


def tone(prompts, completions, **columns) -> list[float]:
    """
    How positive an answer's sentences are, from -1 to 1: the mean of VADER's compound score over them.

    Of a whole answer the compound score is near 1 as soon as it has a few kind words, so VADER's authors have it taken
    of each sentence (Hutto and Gilbert, ICWSM 2014; the package's README).
    """
    return [_tone(text_of(completion)) for completion in completions]


def _tone(text: str) -> float:
    scores = [ANALYZER.polarity_scores(sentence)["compound"] for sentence in sentences(text)]
    return sum(scores) / len(scores) if scores else 0.0


def wished_length(prompts, completions, **columns) -> list[float]:
    """0 for an answer of 10 to 30 words, and -1 else: the reward of DeRa's first experiment (arXiv 2402.02992)."""
    return [0.0 if SHORTEST <= len(text_of(c).split()) <= LONGEST else -1.0 for c in completions]


def text_of(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+|\n+", text) if re.search(r"\w", part)]
