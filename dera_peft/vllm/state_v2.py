"""Model runner V2: the weights of the branches for each token of the batch, as an argument of the model's forward."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

from dera_peft.vllm.branches import Branches
from dera_peft.vllm.requests import check_request
from dera_peft.vllm.rows_v1 import weights_of

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState

ARGUMENT = "branch_weights"  # of the model's forward


class RequestCheck(LogitsProcessor):
    """Checks requests where they come in, and leaves the logits as they are: they are mixed before the head."""

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        check_request(sampling_params, prompt_logprobs=True)

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        return False

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        return logits


class BranchState(DefaultModelState):
    """Keeps the weights of each request's branches."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.branches = Branches.of(self.vllm_config)
        count = len(self.branches.branches)
        self.of_request = np.zeros((self.max_num_reqs, count), dtype=np.float32)
        # one place in memory, which a recorded CUDA graph reads; a batch of the graph's size may have more rows
        self.of_token = torch.zeros(self.max_num_tokens + self.max_num_reqs, count, device=self.device)

    def add_request(self, req_index: int, new_req_data: "NewRequestData") -> None:
        super().add_request(req_index, new_req_data)
        if new_req_data.sampling_params is not None:
            self.of_request[req_index] = weights_of(self.branches, new_req_data.sampling_params).numpy()

    def prepare_inputs(self, input_batch: "InputBatch", req_states: "RequestState") -> dict[str, Any]:
        requests = self.of_request[input_batch.idx_mapping_np[: input_batch.num_reqs]]
        counts = np.diff(input_batch.query_start_loc_np[: input_batch.num_reqs + 1])
        tokens = torch.from_numpy(np.repeat(requests, counts, axis=0))
        self.of_token[: len(tokens)].copy_(tokens)
        weights = self.of_token[: input_batch.num_tokens_after_padding]
        return {**super().prepare_inputs(input_batch, req_states), ARGUMENT: weights}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {**super().prepare_dummy_inputs(num_reqs, num_tokens), ARGUMENT: self.of_token[:num_tokens]}
