"""Prompts as token ids: one for all branches, or one for the reference beside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PromptPairs:
    """
    The prompts by their index: one for all branches, or a second one that the reference reads.
    """

    prompts: Sequence[Sequence[int]] | Mapping[int, Sequence[int]]
    reference: Sequence[Sequence[int]] | Mapping[int, Sequence[int]] | None

    @property
    def differ(self) -> bool:
        """Whether the reference has prompts of its own."""
        return self.reference is not None

    def of(self, indices: Sequence[int]) -> list[Sequence[int]]:
        return [self.prompts[index] for index in indices]

    def of_reference(self, indices: Sequence[int]) -> list[Sequence[int]] | None:
        return None if self.reference is None else [self.reference[index] for index in indices]

    def lengths(self, index: int) -> list[int]:
        others = [] if self.reference is None else [len(self.reference[index])]
        return [len(self.prompts[index]), *others]

    def length(self, index: int) -> int:
        """Of the longer one."""
        return max(self.lengths(index))

    def tokens(self, index: int) -> list[int]:
        return [*self.prompts[index], *(() if self.reference is None else self.reference[index])]
