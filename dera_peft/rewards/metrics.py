"""The built-in rewards, from a completion's tokens, the branches' log-probabilities or a reference answer."""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from dera_peft.errors import DeRaError

REPEATED = 4  # tokens: Welleck et al., "Neural Text Generation with Unlikelihood Training" (2020), seq-rep-4
LARGEST_EXPONENT = 700.0  # of exp, in float64


@dataclass(frozen=True)
class Measured:
    """
    A completion as the metrics see it.

    Attributes:
        text: without special tokens.
        tokens: ids, without an end token.
        log_ref, log_aligned: log π(y|x) in nats at temperature 1, of the reference and of the aligned model, an end
            token included; None where it was not measured.
        length: the number of tokens that these are of.
        columns: of its prompt.
    """

    text: str
    tokens: Sequence[int]
    log_ref: float | None = None
    log_aligned: float | None = None
    length: int = 0
    columns: Mapping[str, Any] = field(default_factory=dict)


Metric = Callable[[Measured], float | None]  # None for a completion that it does not score

NAMES = ("length", "implicit", "perplexity", "repetition", "distinct-1", "exact_match")
LIST = "length, implicit, perplexity, repetition, distinct-1 (or another n), exact_match:COLUMN"


def read_metric(name: str, beta: float | None = None) -> Metric | None:
    """
    The built-in reward of that name, or None if there is none.

    - `length`: tokens, without an end token.
    - `implicit`: the reward that the adapter itself stands for, β·log(π_aligned(y|x) / π_ref(y|x)) (DPO, Rafailov et
      al. 2023, eq. 5, up to a term of the prompt alone).
    - `perplexity`: under the reference, per token; low for fluent text.
    - `repetition`: the share of the completion's 4-grams of tokens that stood in it before.
    - `distinct-n`: different n-grams of tokens over all of them (Li et al., "A Diversity-Promoting Objective Function",
      2016), of each completion; none for one that is shorter than n.
    - `exact_match:COLUMN`: 1 if the completion is the text in that column of its prompt, or one of a list of them, but
      for spaces around it; 0 else; none where the column has none.

    Args:
        beta: of the adapter's training.

    Raises:
        DeRaError: it needs β, and that is not known; or there is no such metric, and the name is so close to that of
            one that no model is meant.
    """
    kind, _, column = name.partition(":")
    if kind == "exact_match" and column:
        return lambda measured: exact_match(measured, column)
    if found := re.fullmatch(r"distinct-([1-9])", name):
        return lambda measured: distinct(measured.tokens, int(found[1]))
    match name:
        case "length":
            return lambda measured: float(len(measured.tokens))
        case "repetition":
            return lambda measured: repetition(measured.tokens)
        case "perplexity":
            return perplexity
        case "implicit":
            if beta is None:
                raise DeRaError(
                    "rewards: 'implicit' needs the β of the training, and the adapter has no dera.json with it."
                )
            return lambda measured: implicit(measured, beta)
    if meant := _meant(name):
        raise DeRaError(
            f"reward={name!r} is not built in; {meant} is. Built in are {LIST}. (A model would be named by its folder, "
            "or by a hub id with its owner.)"
        )
    return None


def _meant(name: str) -> str | None:
    """The metric that a name is a slip of the pen for, if it can't be meant for anything else."""
    if "/" in name or ".py:" in name or os.path.isdir(name):
        return None
    ways = {"distinct-1": "'distinct-n', with n from 1 to 9,", "exact_match": "'exact_match:COLUMN'"}
    found = get_close_matches(name.partition(":")[0].lower(), NAMES, n=1, cutoff=0.75)
    return ways.get(found[0], repr(found[0])) if found else None


def is_better_low(name: str) -> bool:
    """Whether a metric tells what is wrong with a text, so that no λ should be chosen for its highest value."""
    return name in ("perplexity", "repetition")


def distinct(tokens: Sequence[int], n: int) -> float | None:
    grams = [tuple(tokens[place : place + n]) for place in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(tokens: Sequence[int]) -> float:
    """In [0, 1]; 0 for what is too short to repeat itself."""
    return 1 - (distinct(tokens, REPEATED) or 1.0)


def perplexity(measured: Measured) -> float | None:
    if measured.log_ref is None or not measured.length:
        return None
    return perplexity_of(measured.log_ref, measured.length)


def perplexity_of(log_probability: float, num_tokens: int) -> float:
    """Finite, too, for a text that a model holds impossible."""
    return math.exp(min(-log_probability / num_tokens, LARGEST_EXPONENT))


def implicit(measured: Measured, beta: float) -> float | None:
    if measured.log_ref is None or measured.log_aligned is None:
        return None
    return beta * (measured.log_aligned - measured.log_ref)


def exact_match(measured: Measured, column: str) -> float | None:
    answer = measured.columns.get(column)
    if answer is None:
        return None
    answers = answer if isinstance(answer, (list, tuple)) else [answer]
    return float(measured.text.strip() in [str(text).strip() for text in answers])
