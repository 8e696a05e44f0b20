"""Which architectures can be forked inside vLLM."""

from collections.abc import Sequence

from dera_peft.errors import DeRaError

# An architecture's name in a base's config -> that of its class here. Their layers take and return the same, and their
# logits are linear in the last hidden state.
ARCHITECTURES = {
    f"{name}ForCausalLM": f"DeRa{name}ForCausalLM" for name in ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Phi3")
}


def branched_architecture(base: str, architectures: Sequence[str] | None) -> str:
    """
    The class here of a base, by the `architectures` of its config.

    Raises:
        DeRaError: there is none.
    """
    name = (architectures or ["unknown"])[0]
    if name not in ARCHITECTURES:
        raise DeRaError(
            f"base={base!r} is a {name}, which can't be decoded inside vLLM; {', '.join(ARCHITECTURES)} can. "
            "`dera serve` without --engine vllm takes every base."
        )
    return ARCHITECTURES[name]
