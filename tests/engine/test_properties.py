"""Whatever the batch, its padding, λ, the adapters and their layers: the engine is the formula over separate models."""

import copy
import functools

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from two_models import position_ids

from dera_peft import DeRaModel

LAYERS, VOCABULARY = 3, 64
PLACES = [["q_proj", "v_proj"], ["up_proj", "down_proj"], ["q_proj", "o_proj", "gate_proj"], ["lm_head"]]
LAMBDAS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-1.0, 2.0, width=16))
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "derandomize": True}


@functools.cache
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


@st.composite
def adapters(draw) -> list[LoraConfig]:
    """One to three adapters, each on some modules of some layers."""
    configs = []
    for _ in range(draw(st.integers(1, 3))):
        places = draw(st.sampled_from(PLACES))
        layers = draw(st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=LAYERS, unique=True))
        configs.append(
            LoraConfig(
                r=draw(st.integers(1, 4)),
                lora_alpha=draw(st.integers(1, 8)),
                target_modules=places,
                layers_to_transform=None if places == ["lm_head"] else sorted(layers),
                use_dora=draw(st.booleans()),
                task_type="CAUSAL_LM",
            )
        )
    return configs


@st.composite
def batches(draw) -> dict:
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    for row, length in enumerate(lengths):
        ids[row, max(lengths) - length :] = torch.randint(3, VOCABULARY, (length,), generator=generator)
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}


def build(configs: list[LoraConfig]) -> tuple[DeRaModel, list]:
    """The engine with all adapters, and K+1 separate models."""
    peft_model: PeftModel | None = None
    separate = [base()]
    for index, config in enumerate(configs):
        alone = get_peft_model(copy.deepcopy(base()), config, adapter_name=f"a{index}")
        torch.manual_seed(index + 1)
        for name, parameter in alone.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
        if peft_model is None:
            peft_model = get_peft_model(copy.deepcopy(base()), config, adapter_name="a0")
        else:
            peft_model.add_adapter(f"a{index}", config)
        own = {name: value for name, value in alone.state_dict().items() if f".a{index}." in name}
        assert own
        assert not peft_model.load_state_dict(own, strict=False).unexpected_keys
        separate.append(alone.merge_and_unload().eval())
    return DeRaModel.from_peft(peft_model.eval(), list(peft_model.peft_config)), separate


@torch.no_grad()
@settings(max_examples=25, **COMMON)
@given(adapters(), batches(), st.data())
def test_the_engine_is_the_formula(configs, batch, data):
    model, separate = build(configs)
    rows, real = batch["input_ids"].shape[0], batch["attention_mask"].bool()
    lam = torch.tensor([[data.draw(LAMBDAS) for _ in configs] for _ in range(rows)])
    weights = torch.cat([1 - lam.sum(1, keepdim=True), lam], dim=1)
    parts = torch.stack([plain(**batch).logits for plain in separate], dim=-1)  # [B, S, V, K+1]
    expected = (parts * weights[:, None, None, :]).sum(-1)
    found = model(**batch, lam=lam).logits
    torch.testing.assert_close(found[real], expected[real], atol=2e-4, rtol=1e-4)
    plan = model.plan(lam, rows)
    assert plan.num_rows == int((lam.double() != 0).sum() + ((1 - lam.double().sum(1)).abs() >= 1e-6).sum())

    cached = (
        model(**{name: value[:, :-1] for name, value in batch.items()}, lam=plan, use_cache=True)
        if (batch["input_ids"].shape[1] > 1)
        else None
    )
    if cached is not None:  # the last token over a cache of the ones before it
        last = {name: value[:, -1:] for name, value in batch.items() if name != "attention_mask"}
        step = model(
            **last, attention_mask=batch["attention_mask"], lam=plan, past_key_values=cached.past_key_values
        ).logits
        torch.testing.assert_close(step[:, -1], expected[:, -1], atol=2e-4, rtol=1e-4)


@torch.no_grad()
@settings(max_examples=15, **COMMON)
@given(adapters(), batches(), st.data())
def test_rows_of_lam_zero_are_the_base(configs, batch, data):
    model, _ = build(configs)
    rows, real = batch["input_ids"].shape[0], batch["attention_mask"].bool()
    z_base = base()(**batch).logits
    assert torch.equal(model(**batch, lam=torch.zeros(rows, len(configs))).logits, z_base)
    zero = torch.tensor([data.draw(st.booleans()) for _ in range(rows)])
    lam = torch.where(zero[:, None], torch.zeros(rows, len(configs)), torch.full((rows, len(configs)), 0.7))
    found = model(**batch, lam=lam).logits
    # another number of rows rounds differently
    torch.testing.assert_close(found[zero][real[zero]], z_base[zero][real[zero]], atol=1e-5, rtol=1e-5)
