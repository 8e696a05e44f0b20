"""What a batch's scores pass before a token is drawn: transformers' warpers, then noise."""

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dera_peft.decoding.sampling import Sampling
from dera_peft.engine.noise import GumbelMax


def logits_processor(
    sampling: Sampling, keys: Sequence[int], prompt_length: int, padding: Sequence[int]
) -> LogitsProcessorList:
    """
    For `generate(do_sample=False)`: transformers' warpers, then the noise that makes its argmax a sample.

    Args:
        keys: from `row_key`, one a row.
        prompt_length: of the batch, padding included.
        padding: how many tokens of padding stand left of each row.
    """
    warpers = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        # generate's own would count the padding as text, so that a row's penalty depended on its batch
        warpers.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty, torch.tensor(padding)))
    if sampling.temperature > 0:
        warpers += [*row_warpers(sampling), GumbelMax(keys, prompt_length)]
    return warpers


def row_warpers(sampling: Sampling) -> LogitsProcessorList:
    """transformers' warpers that make of a row's logits what is sampled from, at a temperature other than 0."""
    warpers = LogitsProcessorList()
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers
