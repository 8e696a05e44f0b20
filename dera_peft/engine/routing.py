"""What the modules of a base share while a batch is computed."""

import torch

from dera_peft.engine.plan import BatchPlan
from dera_peft.errors import DeRaError


class Routing:
    """
    What fork, adapted modules and join of one model share while a batch is computed.

    Attributes:
        plan: the batch's rows.
        length: S, the batch's number of tokens a sequence.
        keep_branches: whether the head runs for each branch, since their logits are asked for.
        forked: the inputs forked so far, see `fork_inputs`.
        side_stream: for products beside the base's, while a step is recorded as a CUDA graph.
    """

    plan: BatchPlan  # not there before the first batch

    def __init__(self):
        self.length = 1
        self.keep_branches = False
        self.forked: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.side_stream: torch.cuda.Stream | None = None

    def start(self, plan: BatchPlan, length: int, keep_branches: bool = False) -> None:
        self.plan, self.length, self.keep_branches, self.forked = plan, length, keep_branches, []

    def rows(self, name: str, x: torch.Tensor, rows: slice) -> slice:
        """
        The rows of `x` that a plan's `rows` stand for: in `[R, S, ...]` themselves, in `[R·S, D]` S times as many.

        Raises:
            DeRaError: `x` has another number of rows.
        """
        if rows.start is None:  # all of them
            return rows
        each = self.length if x.ndim == 2 and x.is_floating_point() else 1
        if x.shape[0] != self.plan.num_rows * each:
            raise DeRaError(
                f"{name} was called with {x.shape[0]} rows in a batch of {self.plan.num_rows}: its model reorders or "
                "folds the rows before this layer, so an adapter here cannot be kept to its branch; train one on the "
                "attention layers."
            )
        return rows if each == 1 else slice(rows.start * each, rows.stop * each)
