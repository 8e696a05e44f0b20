"""KV caches other than the dynamic one, and prefill in chunks, against two PEFT models that have such a cache each."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.cache_utils import QuantizedCache

from dera_peft import DeRaModel

IDS = torch.arange(3, 33).view(2, 15)
LAM = [0.5, 1.5]
NEW = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# 8 bits: with fewer, HQQ stops its search for scales by the error over the whole batch, and rows see each other
QUANTIZED = {"backend": "hqq", "nbits": 8, "residual_length": 4, "q_group_size": 16, "axis_key": 1, "axis_value": 1}


@torch.no_grad()
def decode_two(base, adapter, make_cache) -> list[list[int]]:
    """Greedy tokens of the mixture of two models, each with a cache of its own."""
    models = [AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval() for _ in range(2)]
    models[1] = PeftModel.from_pretrained(models[1], adapter).eval()
    caches = [make_cache(models[0].config) for _ in models]
    lam = torch.tensor(LAM)[:, None]
    tokens, found = IDS, []
    for _ in range(NEW["max_new_tokens"]):
        z_ref, z_aligned = (
            model(tokens, past_key_values=cache).logits[:, -1] for model, cache in zip(models, caches, strict=True)
        )
        assert (z_ref - z_aligned).abs().max() > 1
        tokens = ((1 - lam) * z_ref + lam * z_aligned).argmax(-1, keepdim=True)
        found.append(tokens)
    return torch.cat(found, dim=1).tolist()


def test_a_quantized_cache(tiny_base, tiny_adapter):
    pytest.importorskip("hqq")
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter)
    output = model.generate(
        IDS, lam=LAM, cache_implementation="quantized", cache_config=QUANTIZED, return_dict_in_generate=True, **NEW
    )
    assert isinstance(output.past_key_values, QuantizedCache)
    expected = decode_two(tiny_base, tiny_adapter, lambda config: QuantizedCache(config=config, **QUANTIZED))
    assert output.sequences[:, IDS.shape[1] :].tolist() == expected
    coarse = model.generate(
        IDS, lam=LAM, cache_implementation="quantized", cache_config={**QUANTIZED, "nbits": 1}, **NEW
    )
    assert coarse.tolist() != output.sequences.tolist(), "its precision must matter"


@pytest.mark.parametrize("chunk", [1, 4, 15])
def test_prefill_in_chunks(tiny_base, tiny_adapter, chunk):
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter)
    lengths = []
    model.base.get_input_embeddings().register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    tokens = model.generate(IDS, lam=LAM, prefill_chunk_size=chunk, **NEW)
    assert max(lengths) == chunk
    assert tokens.tolist() == model.generate(IDS, lam=LAM, **NEW).tolist()


def test_no_mask_is_made_for_a_batch_without_padding(tiny_base, top_adapter):
    """Attention is then causal by itself, and a long prompt needs no `[R, 1, S, S]`, below the fork or above."""
    model = DeRaModel.from_pretrained(tiny_base, top_adapter)
    masks = []
    for layer in model.base.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    with torch.no_grad():
        model(IDS, attention_mask=torch.ones_like(IDS), lam=LAM, logits_to_keep=1)
    assert masks == [None] * 4


@pytest.mark.gpu
def test_an_offloaded_cache(tiny_base, tiny_adapter):
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter).to("cuda")
    ids = IDS.to("cuda")
    tokens = model.generate(ids, lam=LAM, cache_implementation="offloaded", **NEW)
    assert tokens.tolist() == model.generate(ids, lam=LAM, **NEW).tolist()
