"""`DeRaModel.forward` against two separately loaded models and the formula, in fp32."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, MixtralConfig
from two_models import TwoModels, load_two, position_ids

from dera_peft import DeRaError, DeRaModel
from dera_peft.engine.fork import fork_inputs
from dera_peft.engine.plan import BatchPlan, make_branches, read_lam

LAMBDAS = [-0.5, 0, 1 / 6, 0.5, 2 / 3, 1, 3]
PROMPTS = ["The old lighthouse", "A fox crossed the frozen river and", "Rain", "My sister repairs"]


@pytest.fixture(params=["tiny", "top", "stories"])
def setting(request):
    """(base, adapter) folders: adapted at all layers, at the top half, and a real trained model."""
    if request.param == "stories":
        return request.getfixturevalue("stories"), request.getfixturevalue("stories_adapter")
    return request.getfixturevalue("tiny_base"), request.getfixturevalue(f"{request.param}_adapter")


@pytest.fixture
def batch(setting):
    tokenizer = AutoTokenizer.from_pretrained(setting[0], padding_side="left")
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    assert (inputs.attention_mask == 0).any(), "the batch must be padded for the test to mean something"
    return {**inputs, "position_ids": position_ids(inputs.attention_mask)}


def count_rows(module: torch.nn.Module) -> list[int]:
    """Collects the number of rows of each call of `module`."""
    rows = []
    module.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    return rows


def assert_branches_differ(z_ref, z_aligned, mask):
    assert (z_ref - z_aligned)[mask].abs().max() > 1, "the branches must differ for the comparison to mean something"


@torch.no_grad()
def test_logits_are_the_mixture(setting, batch):
    reference, aligned = load_two(*setting)
    model = DeRaModel.from_pretrained(*setting)
    mask = batch["attention_mask"].bool()
    z_ref, z_aligned = reference(**batch).logits, aligned(**batch).logits
    assert_branches_differ(z_ref, z_aligned, mask)
    for lam in LAMBDAS:
        expected = (1 - lam) * z_ref + lam * z_aligned
        torch.testing.assert_close(model(**batch, lam=lam).logits[mask], expected[mask], atol=2e-4, rtol=1e-5)
    for lam in ([0.0, 0.5, 1.0, 3.0], [1.0, 1.0, 0.0, -0.5]):
        weight = torch.tensor(lam)[:, None, None]
        expected = (1 - weight) * z_ref + weight * z_aligned
        torch.testing.assert_close(model(**batch, lam=lam).logits[mask], expected[mask], atol=2e-4, rtol=1e-5)


@torch.no_grad()
def test_all_zero_is_the_base_and_all_one_the_adapted_model_bit_for_bit(setting, batch):
    base = AutoModelForCausalLM.from_pretrained(setting[0], dtype=torch.float32).eval()
    z_base = base(**batch).logits
    z_peft = PeftModel.from_pretrained(base, setting[1]).eval()(**batch).logits
    assert_branches_differ(z_base, z_peft, batch["attention_mask"].bool())
    model = DeRaModel.from_pretrained(*setting)
    assert torch.equal(model(**batch, lam=0).logits, z_base)
    assert torch.equal(model(**batch, lam=1).logits, z_peft)
    assert torch.equal(model(**batch).logits, z_peft), "the default is the model as trained"


@torch.no_grad()
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_output_branches(setting, batch, lam):
    reference, aligned = load_two(*setting)
    mask = batch["attention_mask"].bool()
    output = DeRaModel.from_pretrained(*setting)(**batch, lam=lam, output_branches=True)
    expected = {"reference": reference(**batch).logits, "aligned": aligned(**batch).logits}
    assert list(output.branch_logits) == ["reference", "aligned"]
    for name, logits in expected.items():
        torch.testing.assert_close(output.branch_logits[name][mask], logits[mask], atol=2e-4, rtol=1e-5)
    mixed = (1 - lam) * expected["reference"] + lam * expected["aligned"]
    torch.testing.assert_close(output.logits[mask], mixed[mask], atol=2e-4, rtol=1e-5)


def test_loss_is_the_mixtures(setting, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    lam = torch.tensor([0.0, 0.5, 1.0, 1.5])
    with torch.no_grad():
        logits = TwoModels(*load_two(*setting), lam[:, None, None])(batch["input_ids"], batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    model = DeRaModel.from_pretrained(*setting)
    torch.testing.assert_close(model(**batch, labels=labels, lam=lam).loss, expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_rows_of_weight_zero_are_not_computed(tiny_base, tiny_adapter, top_adapter):
    inputs = {"input_ids": torch.randint(3, 300, (4, 7), generator=torch.Generator().manual_seed(0))}
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter)
    bottom, top = (count_rows(model.base.model.layers[index]) for index in (0, 3))
    for lam in (0.0, 1.0, 0.5, [0.0, 0.5, 1.0, 1.0]):
        model(**inputs, lam=lam)
    assert bottom == top == [4, 4, 8, 5]
    model(**inputs, lam=0.0, output_branches=True)
    assert top[-1] == 8

    model = DeRaModel.from_pretrained(tiny_base, top_adapter)
    assert model.fork_layer == 2
    below, above = (count_rows(model.base.model.layers[index].mlp) for index in (1, 2))
    model(**inputs, lam=[0.0, 0.5, 1.0, 1.0])
    assert (below, above) == ([4], [5])
    cache = model(**inputs, lam=0.5, use_cache=True).past_key_values
    assert [layer.keys.shape[0] for layer in cache.layers] == [4, 4, 8, 8]


@torch.no_grad()
def test_the_join_before_the_head_equals_the_join_behind_it(tiny_model):
    seen = []
    tiny_model.base.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[0]))
    inputs = {"input_ids": torch.arange(3, 13).view(2, 5)}
    before = tiny_model(**inputs, lam=0.4).logits
    assert tiny_model.joins_before_head
    tiny_model.joins_before_head = False
    behind = tiny_model(**inputs, lam=0.4).logits
    assert seen == [2, 4]
    torch.testing.assert_close(before, behind, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_a_cache_is_only_read_by_the_branches_that_filled_it(tiny_model):
    ids = torch.arange(3, 15).view(2, 6)
    whole = tiny_model(ids, lam=0.5).logits[:, -1]
    cache = tiny_model(ids[:, :5], lam=0.5, use_cache=True).past_key_values
    torch.testing.assert_close(
        tiny_model(ids[:, 5:], lam=0.5, past_key_values=cache).logits[:, -1], whole, atol=1e-4, rtol=1e-5
    )
    cache = DynamicCache(config=tiny_model.config)
    tiny_model(ids[:, :5], lam=1.0, past_key_values=cache)
    with pytest.raises(DeRaError, match="past_key_values"):
        tiny_model(ids[:, 5:], lam=0.0, past_key_values=cache)


@torch.no_grad()
def test_a_plan_can_be_made_once_and_used_often(tiny_model):
    ids = torch.arange(3, 15).view(2, 6)
    plan = tiny_model.plan([0.0, 0.5], batch_size=2)
    assert torch.equal(tiny_model(ids, lam=plan).logits, tiny_model(ids, lam=[0.0, 0.5]).logits)
    with pytest.raises(DeRaError, match="planned for 2 sequences"):
        tiny_model(ids[:1], lam=plan)
    cache = tiny_model(ids[:, :5], lam=[0.5, 0.5], use_cache=True).past_key_values
    with pytest.raises(DeRaError, match="past_key_values"):
        tiny_model(ids[:, 5:], lam=plan, past_key_values=cache)


@torch.no_grad()
def test_wrapping_copies_nothing_and_unwrapping_restores_bit_for_bit(tiny_base, tiny_adapter):
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(base, tiny_adapter).eval()
    ids = torch.arange(3, 15).view(2, 6)
    before, state = peft_model(ids).logits, {name: p.data_ptr() for name, p in peft_model.named_parameters()}
    with peft_model.disable_adapter():
        off_before = peft_model(ids).logits
    assert not torch.equal(before, off_before)

    model = DeRaModel.from_peft(peft_model)
    assert {p.data_ptr() for p in model.parameters()} == set(state.values())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in peft_model.parameters())
    model(ids, lam=0.5)
    model.generate(ids, lam=0.5, max_new_tokens=3)

    assert model.unwrap() is peft_model
    assert {name: p.data_ptr() for name, p in peft_model.named_parameters()} == state
    assert torch.equal(peft_model(ids).logits, before)
    with peft_model.disable_adapter():
        assert torch.equal(peft_model(ids).logits, off_before)
    for call in (
        lambda: model(ids),
        lambda: model.generate(ids),
        model.unwrap,
        lambda: model.save_pretrained("nowhere"),
        lambda: model.export(0.5, "nowhere"),
        lambda: model.add_adapter("other", tiny_adapter),
    ):
        with pytest.raises(DeRaError, match=r"taken apart by unwrap\(\)"):
            call()


def test_outputs_that_only_branches_have_are_refused(tiny_model):
    ids = torch.arange(3, 9).view(1, 6)
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(DeRaError, match=name):
            tiny_model(ids, **{name: True})


def test_several_adapters_must_be_told_apart(tiny_base, tiny_adapter):
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(base, tiny_adapter)
    peft_model.load_adapter(tiny_adapter, adapter_name="other")
    with pytest.raises(DeRaError, match="other"):
        DeRaModel.from_peft(peft_model)
    with pytest.raises(DeRaError, match="'defautl'"):
        DeRaModel.from_peft(peft_model, adapter="defautl")
    assert DeRaModel.from_peft(peft_model, adapter="other").branches[1].adapters == ("other",)


@torch.no_grad()
def test_nf4_on_the_cpu_equals_two_passes_over_the_same_quantized_base(tiny_base, tiny_adapter):
    pytest.importorskip("bitsandbytes")
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, quantization="nf4", dtype=torch.float32)
    assert type(model.base.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    ids = torch.arange(3, 15).view(2, 6)
    mixed = {lam: model(ids, lam=lam).logits for lam in (0, 0.3, 1, 2)}
    full = DeRaModel.from_pretrained(tiny_base, tiny_adapter)(ids, lam=0).logits
    assert (mixed[0] - full).abs().max() > 1e-3, "the base must really be quantized"
    peft_model = model.unwrap()
    z_aligned = peft_model(ids).logits
    with peft_model.disable_adapter():
        z_ref = peft_model(ids).logits
    assert_branches_differ(z_ref, z_aligned, torch.ones_like(ids, dtype=torch.bool))
    for lam, logits in mixed.items():
        torch.testing.assert_close(logits, (1 - lam) * z_ref + lam * z_aligned, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_a_peft_model_is_wrapped_once_at_a_time(tiny_base, tiny_adapter):
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(base, tiny_adapter)
    with pytest.raises(DeRaError, match="default λ"):
        DeRaModel.from_peft(peft_model, lam=float("nan"))
    model = DeRaModel.from_peft(peft_model)
    ids = torch.arange(3, 15).view(2, 6)
    before = model(ids, lam=0.5).logits
    with pytest.raises(DeRaError, match="wrapped by a DeRaModel already"):
        DeRaModel.from_peft(peft_model)
    assert torch.equal(model(ids, lam=0.5).logits, before)
    model.unwrap()
    assert torch.equal(DeRaModel.from_peft(peft_model)(ids, lam=0.5).logits, before)


def test_a_copy_is_refused(tiny_model):
    with pytest.raises(DeRaError, match=r"can't be copied.*unwrap\(\)"):
        copy.deepcopy(tiny_model)


def test_lam_that_is_no_number(tiny_model):
    ids = torch.arange(3, 15).view(2, 6)
    for lam, message in (
        (1e39, "finite in float32"),
        ([0.5, -1e39], "finite in float32"),
        (float("nan"), "finite in float32"),
        (True, "not a truth value"),
        ([True, False], "not a truth value"),
        (torch.tensor([True, False]), "not a truth value"),
        ({"aligned": True}, "not a truth value"),
        ({}, "names no aligned branch"),
    ):
        with pytest.raises(DeRaError, match=message):
            tiny_model(ids, lam=lam)
    for lam in (1e39, {}, True):
        with pytest.raises(DeRaError, match="default λ"):
            DeRaModel.from_peft(tiny_model.peft_model, lam=lam)


def test_experts_are_switched_in_the_base():
    """On a GPU `generate` switches them for decoding."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config)
    model = DeRaModel.from_peft(get_peft_model(base, LoraConfig(target_modules=["q_proj"])))
    before = base.config._experts_implementation
    assert before != "eager"
    model.set_experts_implementation({"": "eager"})
    assert base.config._experts_implementation == "eager"
    assert model.get_experts_implementation() == {"": "eager"}


def test_a_flex_attention_mask_is_not_forked_in_silence():
    mask = create_block_mask(lambda b, h, query, key: query >= key, 2, None, 8, 8, device="cpu")
    branches = make_branches([], {"aligned": "a"})
    half, one = (BatchPlan(branches, read_lam(lam, 2, ["aligned"])) for lam in (0.5, 1.0))
    with pytest.raises(DeRaError, match="flex attention's masks can't be forked"):
        fork_inputs({"attention_mask": mask}, half, 1, [])
    assert fork_inputs({"attention_mask": mask}, one, 1, [])["attention_mask"] is mask
