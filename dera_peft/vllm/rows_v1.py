"""Model runner V1: the weights of the branches for each row of the batch, followed as a logits processor."""

from typing import TYPE_CHECKING

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from dera_peft.engine.plan import branch_weights
from dera_peft.vllm.branches import Branches
from dera_peft.vllm.requests import check_request

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

ROWS = "dera_rows"  # of a VllmConfig: where the model of the same process finds them


class RowWeights(LogitsProcessor):
    """
    Leaves the logits as they are: they are mixed before the head. Runner V1 tells logits processors alone which request
    is at which row, and builds them before the model, which takes the tensor from the configuration.
    """

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        check_request(sampling_params, prompt_logprobs=False)

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool):
        self.branches = Branches.of(vllm_config)
        self.rows = torch.zeros(vllm_config.scheduler_config.max_num_seqs, len(self.branches.branches))
        setattr(vllm_config, ROWS, self.rows)

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row, params, _, _ in batch_update.added:
            self.rows[row] = weights_of(self.branches, params)
        for row, other, kind in batch_update.moved:
            before = self.rows[other].clone()
            self.rows[other] = self.rows[row]
            if kind == MoveDirectionality.SWAP:
                self.rows[row] = before

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


def weights_of(branches: Branches, params: "SamplingParams") -> torch.Tensor:
    """`[branches]` fp32: the weights of a request's branches, which sum to one."""
    return branch_weights(torch.tensor([branches.read(params.extra_args)], dtype=torch.float64))[0].float()


def rows_of(vllm_config: "VllmConfig") -> torch.Tensor:
    """`[rows, branches]` fp32 on the CPU, which follows the batch."""
    return getattr(vllm_config, ROWS)
