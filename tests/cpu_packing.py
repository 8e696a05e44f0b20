"""bitsandbytes as it is on a CPU with AVX512-BF16, on any CPU."""

import pytest
import torch


def force_cpu_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    4-bit layers that are made from here on pack their weights, by the library's own code, and packed ones multiply in
    bf16 without a backward. On a CPU with AVX512-BF16 nothing is changed: the library's own kernel runs.
    """
    functional = pytest.importorskip("bitsandbytes.functional")
    if functional.has_avx512bf16():
        return
    monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: True)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    monkeypatch.setattr("bitsandbytes.functional.gemv_4bit", _packed_product)


@torch.no_grad()
def _packed_product(x: torch.Tensor, packed: torch.Tensor, out=None, *, state) -> torch.Tensor:
    """x·W^T of a packed weight `[N, K/2]`: 32 outputs a block, whose codes lie in the two halves of 32 bytes."""
    num_outputs, num_inputs = state.shape
    codes = torch.stack([packed.view(-1, 32) & 0xF, packed.view(-1, 32) >> 4], dim=1)
    codes = codes.view(num_outputs // 32, num_inputs // 2, 32, 2).transpose(1, 2).reshape(num_outputs, num_inputs)
    scales = state.absmax.float().T.repeat_interleave(state.blocksize, dim=1)  # [N, K]
    weight = (state.code[codes.long()] * scales).bfloat16()
    return (x.bfloat16() @ weight.T).to(x.dtype)
