"""bitsandbytes' 4-bit layers, which it packs for inference on some CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from dera_peft.errors import DeRaError

PACKS = "support_avx512bf16_for_cpu"  # of a bitsandbytes Linear4bit, by which it is told: importing the library is slow


def keep_trainable(model: nn.Module) -> None:
    """
    Keeps bitsandbytes from packing the 4-bit weights of a model that is trained.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 packs the weight of a `Linear4bit` in its first forward in evaluation
    mode, for a kernel that computes in bf16 and has no backward. From then on no gradient passes through the layer, in
    training mode either, and nothing says so. Unpacked, the layer computes as on any other CPU.

    Raises:
        DeRaError: the model has parameters that are trained, and a weight that is packed already. The library's way
            back rounds the quantization's scales anew (and gets them wrong without double quantization).
    """
    layers = [(name, module) for name, module in model.named_modules() if PACKS in vars(module)]
    # where nothing is trained no gradient is needed, and decoding with packed weights is right
    if any(parameter.requires_grad for parameter in model.parameters()):
        for name, layer in layers:
            if _is_packed(layer):
                raise DeRaError(
                    f"{name!r} can't be trained through: bitsandbytes packed its 4-bit weight for inference when the "
                    "model was evaluated. Load the model anew, and wrap it before the first evaluation; to decode "
                    "alone, call requires_grad_(False) on it first."
                )
    for _, layer in layers:
        setattr(layer, PACKS, False)


@contextmanager
def keep_packed(model: nn.Module) -> Iterator[None]:
    """
    Packed 4-bit weights as they are, while PEFT reads the `state_dict` of a model to save or load an adapter.

    bitsandbytes would unpack them for it, and pack them again at the next forward, with other scales than before.
    """
    layers = [module for module in model.modules() if PACKS in vars(module) and _is_packed(module)]
    packed = [vars(layer.weight)["quant_state"] for layer in layers]
    for state in packed:
        state.packing_format_for_cpu = False
    try:
        yield
    finally:
        for state in packed:
            state.packing_format_for_cpu = True


def _is_packed(layer: nn.Module) -> bool:
    state = vars(layer.weight).get("quant_state")
    return state is not None and vars(state).get("packing_format_for_cpu", False)
