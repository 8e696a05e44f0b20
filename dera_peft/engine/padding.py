"""Token sequences of other lengths as one batch."""

from collections.abc import Sequence

import torch


def pad(sequences: Sequence[Sequence[int]], value: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Token ids and attention mask, both `[B, S]` int64 on the CPU, S the longest sequence's length.

    Args:
        value: the token id that fills up.
        left: pad on the left, so that all sequences end in the last column; else on the right.
    """
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), value)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), None) if left else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask[row, place] = 1
    return ids, mask
