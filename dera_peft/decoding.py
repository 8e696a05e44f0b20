"""Decoding many requests, each with its own λ, in batches."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from dera_peft.errors import DeRaError
from dera_peft.model import DeRaModel
from dera_peft.prompts import Prompt
from dera_peft.sampling import Sampling, row_key


@dataclass(frozen=True)
class Request:
    """One completion to be made: of which prompt, at which λ (None for a model without one), the how-manieth sample."""

    index: int
    lam: float | None
    sample: int = 0


@dataclass(frozen=True)
class Completion:
    """
    What a request gave.

    Attributes:
        tokens: the new token ids, with the end token if the model gave one.
        text: their text, without special tokens.
        finish: "eos" if the model ended it, "length" if the limit of tokens did.
    """

    request: Request
    tokens: list[int]
    text: str
    finish: str

    def row(self, prompt: Prompt) -> dict:
        """As a line of a results file, with the columns of its prompt."""
        return {
            **prompt.columns,
            "index": prompt.index,
            "prompt": prompt.content,
            "lambda": self.request.lam,
            "sample": self.request.sample,
            "completion": self.text,
            "tokens": len(self.tokens),
            "finish": self.finish,
        }


@torch.no_grad()
def decode(
    model: DeRaModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]] | Mapping[int, Sequence[int]],
    requests: Sequence[Request],
    sampling: Sampling,
    batch_size: int,
    streamer: BaseStreamer | None = None,
) -> Iterator[list[Completion]]:
    """
    Yields each batch of completions as it is finished. A batch mixes λ freely; each row pays for the branches it needs.

    Batches are made by length, longest prompts first, so that too little memory shows at once; then the batch is
    halved, which is said on stderr.

    Args:
        prompts: token ids by prompt index, from `prompts.encode`.
        model: a `DeRaModel`, or any causal language model for requests without λ.
        requests: indices into `prompts`.
        streamer: of transformers, for a single request.
    """
    waiting = sorted(requests, key=lambda r: (-len(prompts[r.index]), r.index, r.sample, r.lam))
    while waiting:
        batch = waiting[:batch_size]
        completions = None
        try:
            completions = _decode_batch(model, tokenizer, prompts, batch, sampling, streamer)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise DeRaError(
                    f"out of memory for a single prompt of {len(prompts[batch[0].index])} tokens and "
                    f"{sampling.max_new_tokens} new ones: lower max_new_tokens, or quantize the base (quantization)."
                ) from error
        if completions is None:  # out here, where the error's frames no longer hold the batch's tensors
            batch_size = len(batch) // 2
            torch.accelerator.empty_cache()
            print(f"out of memory: going on with a batch size of {batch_size}", file=sys.stderr)
            continue
        waiting = waiting[len(batch) :]
        yield completions


def _decode_batch(model, tokenizer, prompts, batch: list[Request], sampling, streamer) -> list[Completion]:
    length = max(len(prompts[request.index]) for request in batch)
    padding = [length - len(prompts[request.index]) for request in batch]
    input_ids = torch.full((len(batch), length), tokenizer.pad_token_id or 0)
    attention_mask = torch.zeros_like(input_ids)
    has_encoder = model.config.is_encoder_decoder
    for row, request in enumerate(batch):
        ids = torch.tensor(prompts[request.index])
        # an encoder's positions count from the left, so its padding stands on the right
        place = slice(0, len(ids)) if has_encoder else slice(padding[row], length)
        input_ids[row, place] = ids
        attention_mask[row, place] = 1
    if has_encoder:  # what is generated starts with the decoder's start token, not with the prompt
        length, padding = 1, [0] * len(batch)
    end = model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [] if end is None else [end])
    lam = {} if batch[0].lam is None else {"lam": [request.lam for request in batch]}
    sequences = model.generate(
        input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        **lam,
        do_sample=False,  # the noise in the logits makes the argmax a sample
        num_beams=1,
        logits_processor=sampling.logits_processor(
            [row_key(sampling.seed, request.index, request.sample) for request in batch],
            length,
            padding,
        ),
        repetition_penalty=1.0,  # ours is in the processor
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or 0,
        streamer=streamer,
    )
    completions = []
    for request, tokens in zip(batch, sequences[:, length:].tolist(), strict=True):
        length_with_end = next((place + 1 for place, token in enumerate(tokens) if token in ends), None)
        tokens = tokens[:length_with_end]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        completions.append(Completion(request, tokens, text, "length" if length_with_end is None else "eos"))
    return completions
