"""Captured steps of many architectures and kinds of adapters, bit for bit as eager ones over the same static cache."""

from dataclasses import replace

import pytest
import torch
from captured import LAM, OPTIONS, assert_bit_equal, padded, watch
from compatibility import BASES, EXPERT_KINDS, KINDS, LINEAR
from tiny_bases import adapt, make_base

from dera_peft import DeRaModel

STAY_EAGER = ("mpt", "jamba", "bamba", "qwen3_next", "lfm2")
CAPTURED = [base for base in BASES if base.model_type not in STAY_EAGER and not base.settings.get("alibi")]
# the others run on a GPU alone: for the stand-in they are as these are
ON_CPU = ("gemma2", "gpt2", "opt", "bloom", "deepseek_v3", "mixtral")
KINDS_ON_CPU = ("DoRA", "`lora_bias`", "DoRA on the embeddings", "an adapter on the head")
TRAINABLE_TOKENS = "`trainable_token_indices`"


def each(values, on_cpu):
    """The values as parameters, of which all but those for which `on_cpu` holds need a GPU."""
    return [pytest.param(value, marks=() if on_cpu(value) else pytest.mark.gpu) for value in values]


@pytest.mark.parametrize(
    "base",
    each(CAPTURED, lambda base: base.model_type in ON_CPU),
    ids=lambda base: f"{base.model_type} {base.note}".strip(),
)
def test_base(base, device):
    model = DeRaModel.from_peft(adapt(make_base(base), target_modules=base.targets))
    recorder = watch(model, device)
    assert_bit_equal(model, **padded(device), lam=LAM)
    if base.model_type == "falcon" and device.type == "cuda":
        assert recorder.recordings == 0  # its heads are picked by a list, which each step copies to the device
    else:
        assert (recorder.recordings, recorder.replays) == (1, 9)


@pytest.mark.parametrize(
    "kind",
    each((kind for kind in KINDS if kind.base == "llama"), lambda kind: kind.name in KINDS_ON_CPU),
    ids=lambda kind: kind.name,
)
def test_adapter(kind, device):
    base = next(base for base in BASES if base.model_type == "llama")
    model = DeRaModel.from_peft(adapt(make_base(base), **{"target_modules": LINEAR, **kind.settings}))
    recorder = watch(model, device)
    assert_bit_equal(model, **padded(device), lam=LAM)
    if kind.name == TRAINABLE_TOKENS and device.type == "cuda":
        assert recorder.recordings == 0  # PEFT makes their indices on the host in each forward pass
    else:
        assert (recorder.recordings, recorder.replays) == (1, 9)


@pytest.mark.parametrize(
    "kind",
    each((kind for kind in EXPERT_KINDS if kind.base not in STAY_EAGER), lambda kind: kind.base == "mixtral"),
    ids=lambda kind: kind.name,
)
def test_experts(kind, device):
    """Each branch's tokens have experts and routers of their own."""
    base = next(base for base in BASES if base.model_type == kind.base)
    model = DeRaModel.from_peft(adapt(make_base(base), **kind.settings))
    recorder = watch(model, device)
    assert_bit_equal(model, **padded(device), lam=LAM)
    assert recorder.replays


@pytest.mark.parametrize("name", each(["mistral", "gpt_oss", "gemma3_text"], lambda name: name != "gemma3_text"))
def test_a_window_that_fills_while_it_decodes(name, device):
    """Of 12 tokens, the prompt's 6 and the first 6 new ones: then the same step rolls the window, in another graph."""
    base = next(base for base in BASES if base.model_type == name)
    base = replace(base, settings={**base.settings, "sliding_window": 12})
    model = DeRaModel.from_peft(adapt(make_base(base), target_modules=base.targets))
    recorder, inputs = watch(model, device), padded(device)
    options = {**OPTIONS, "max_new_tokens": 16}
    tokens = assert_bit_equal(model, **inputs, **options, lam=LAM)
    assert (recorder.recordings, recorder.replays) == (2, 15 - 2 * 2)
    again = assert_bit_equal(model, **inputs, **options, lam=[0.0, 0.4, 1.0, 1.2])
    assert (recorder.recordings, recorder.replays) == (2, 11 + 15)
    assert again.tolist() != tokens.tolist()
    eager = model.generate(**inputs, **options, lam=LAM, capture=False)
    assert tokens.tolist() == eager.tolist(), "as over a cache that grows"

    # a cache that is returned goes on, also behind a full window
    half = model.generate(**inputs, **options, lam=LAM, capture=True, return_dict_in_generate=True)
    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(4, 16)], dim=1)
    rest = {**options, "attention_mask": mask, "past_key_values": half.past_key_values, "lam": LAM}
    whole = model.generate(**inputs, **{**options, "max_new_tokens": 32}, lam=LAM, capture=False)
    assert model.generate(half.sequences, **rest, capture=False).tolist() == whole.tolist()
