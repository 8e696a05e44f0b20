"""What decodes, as its callers see it: a model in this process, or an engine elsewhere (`dera_peft.remote`)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel

from dera_peft.decoding.batching import Tokenizer, decode
from dera_peft.decoding.requests import Completion, Request
from dera_peft.decoding.sampling import Sampling

ANY_LAMBDA = (-math.inf, math.inf)  # a range of λ
Prompts = Sequence[Sequence[int]] | Mapping[int, Sequence[int]]  # token ids by prompt index


class Decoder(Protocol):
    """Makes completions of requests."""

    @property
    def lambda_range(self) -> tuple[float, float]:
        """The least and the greatest λ that it takes."""
        ...

    def decode(
        self,
        prompts: Prompts,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        particles: int | None = None,
        reference_prompts: Prompts | None = None,
    ) -> Iterator[list[Completion]]:
        """Yields completions as they are finished, in any order; for the arguments see `batching.decode`."""
        ...


@dataclass(frozen=True)
class LocalDecoder:
    """A model in this process."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    batch_size: int | None = None
    lambda_range: tuple[float, float] = ANY_LAMBDA

    def decode(
        self,
        prompts: Prompts,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        particles: int | None = None,
        reference_prompts: Prompts | None = None,
    ) -> Iterator[list[Completion]]:
        return decode(
            self.model, self.tokenizer, prompts, requests, sampling, self.batch_size, particles=particles,
            reference_prompts=reference_prompts,
        )  # fmt: skip
