"""Adapters on a mixture's experts and router, against PEFT's own two passes and two whole models."""

import copy

import pytest
import torch
from compatibility import BASES, EXPERT_KINDS
from tiny_bases import adapt, make_base
from two_models import TwoModels

from dera_peft import DeRaError, DeRaModel

IDS = torch.randint(3, 128, (4, 7), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
LAM = [0.0, 0.5, 1.0, 1.5]
WEIGHT = torch.tensor(LAM)[:, None, None]
NEW = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def base_of(model_type):
    return make_base(next(base for base in BASES if base.model_type == model_type))


def settings_of(name):
    return next(kind.settings for kind in EXPERT_KINDS if kind.base == name)


@torch.no_grad()
@pytest.mark.parametrize("kind", EXPERT_KINDS, ids=lambda kind: kind.name)
def test_parity(kind, tmp_path):
    base_of(kind.base).save_pretrained(tmp_path / "base")
    peft_model = adapt(base_of(kind.base), **kind.settings)
    peft_model.save_pretrained(tmp_path / "adapter")
    reference, aligned = base_of(kind.base), copy.deepcopy(peft_model).merge_and_unload().eval()
    inputs, real = {"input_ids": IDS, "attention_mask": MASK}, MASK.bool()
    z_aligned = peft_model(**inputs).logits
    with peft_model.disable_adapter():
        z_ref = peft_model(**inputs).logits
    assert (z_ref.argmax(-1) != z_aligned.argmax(-1))[real].sum() >= 4, "the branches must write other texts"
    model = DeRaModel.from_peft(peft_model)
    z = model(**inputs, lam=LAM).logits
    torch.testing.assert_close(z[real], ((1 - WEIGHT) * z_ref + WEIGHT * z_aligned)[real], atol=2e-4, rtol=1e-5)
    assert torch.equal(model(**inputs, lam=0).logits, z_ref)
    torch.testing.assert_close(model(**inputs, lam=1).logits, z_aligned, atol=1e-5, rtol=1e-5)

    mixture = TwoModels(reference, aligned, WEIGHT.repeat_interleave(3, dim=0))
    expected = mixture.generate(**inputs, num_beams=3, use_cache=False, **NEW)
    assert model.generate(**inputs, lam=LAM, num_beams=3, **NEW).tolist() == expected.tolist()
    expected = TwoModels(reference, aligned, WEIGHT).generate(**inputs, use_cache=False, **NEW)
    assert model.generate(**inputs, lam=LAM, cache_implementation="static", **NEW).tolist() == expected.tolist()
    with pytest.raises(DeRaError, match="unwrap"):
        DeRaModel.from_peft(peft_model)
    assert torch.equal(model.unwrap()(**inputs).logits, z_aligned), "PEFT's own forward is back"
    with pytest.raises(DeRaError, match="can't be scaled by λ"):
        DeRaModel.from_peft(peft_model, mixing="weights")

    loaded = DeRaModel.from_pretrained(tmp_path / "base", tmp_path / "adapter")
    torch.testing.assert_close(loaded(**inputs, lam=LAM).logits[real], z[real], atol=2e-4, rtol=1e-5)
    with pytest.raises(DeRaError, match="can't be scaled by λ"):
        loaded.export(0.5, tmp_path / "exported")
    loaded.save_pretrained(tmp_path / "saved")
    loaded = DeRaModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded(**inputs, lam=LAM).logits[real], z[real], atol=2e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("stacked", [True, False])
def test_several_adapters(name, stacked):
    """A reference of its own, and two aligned models, each with another share of every row."""
    peft_model = adapt(base_of(name), **settings_of(name))
    for seed, adapter in enumerate(("one", "two")):
        peft_model.add_adapter(adapter, peft_model.peft_config["default"])
        torch.manual_seed(5 + seed)
        for parameter_name, parameter in peft_model.named_parameters():
            if f"lora_B.{adapter}" in parameter_name:
                parameter.data.normal_(std=0.4)
    peft_model.eval()

    def logits(*adapters):
        peft_model.base_model.set_adapter(list(adapters))
        return peft_model(IDS).logits

    z_ref = logits("default")
    z = [logits("default", adapter) if stacked else logits(adapter) for adapter in ("one", "two")]
    lam = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.7, 0.6], [0.0, 1.0]])
    expected = (1 - lam.sum(1))[:, None, None] * z_ref + lam[:, 0, None, None] * z[0] + lam[:, 1, None, None] * z[1]
    assert min((z_ref - z[0]).abs().max(), (z[0] - z[1]).abs().max()) > 1
    model = DeRaModel.from_peft(peft_model, ["one", "two"], reference="default", stacked=stacked)
    torch.testing.assert_close(model(IDS, lam=lam).logits, expected, atol=2e-4, rtol=1e-5)


@torch.no_grad()
def test_only_the_rows_of_a_branch_are_computed():
    model = DeRaModel.from_peft(adapt(base_of("mixtral"), **settings_of("mixtral")))
    tokens = []
    experts = next(m for n, m in model.base.named_modules() if type(m).__name__ == "MixtralExperts")
    experts.register_forward_pre_hook(lambda _, args: tokens.append(len(args[0])))
    for lam, expected in (([0.0] * 4, [28]), (1.0, [28]), (LAM, [21, 21]), ([0.0, 0.0, 0.0, 1.0], [21, 7])):
        tokens.clear()
        model(IDS, lam=lam)
        assert tokens == expected


def test_gradients_reach_the_experts():
    peft_model = adapt(base_of("qwen3_moe"), **settings_of("qwen3_moe"))
    model = DeRaModel.from_peft(peft_model)
    model(IDS, labels=IDS, lam=0.5).loss.backward()
    gradients = [p.grad for n, p in peft_model.named_parameters() if "experts" in n and "lora_B" in n]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_a_parameter_of_few_bits_is_refused():
    peft_model = adapt(base_of("gpt_oss"), **settings_of("gpt_oss"))
    experts = next(m for m in peft_model.modules() if type(m).__name__ == "GptOssExperts")
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(DeRaError, match=r"0\.mlp\.experts: .*'down_proj', which is in float8_e4m3fn"):
        DeRaModel.from_peft(peft_model)
