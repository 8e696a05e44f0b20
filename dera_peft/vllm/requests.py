"""What a request must fulfil, told where it comes in: vLLM answers a refusal with status 400."""

from typing import TYPE_CHECKING, Any

from dera_peft.errors import DeRaError
from dera_peft.vllm.branches import Branches

if TYPE_CHECKING:
    from vllm import SamplingParams

# of the last model that was configured in this process: vLLM gives a check of requests nothing but the request
current: Branches | None = None
about: dict[str, Any] | None = None  # what a client is told of it


def check_request(params: "SamplingParams", prompt_logprobs: bool) -> None:
    """
    Args:
        prompt_logprobs: whether they can be computed.

    Raises:
        DeRaError: λ is none that the model takes, or something is asked that can't be had.
    """
    if current is None:
        raise DeRaError("no model with an adapter of DeRa was configured in this process.")
    current.read(params.extra_args)
    if params.prompt_logprobs is not None and not prompt_logprobs:
        raise DeRaError(
            "log-probabilities of a prompt (prompt_logprobs, or echo with logprobs) can't be had from vLLM's model "
            "runner V1, which does not say whose prompt it computes them for; runner V2 has them."
        )
