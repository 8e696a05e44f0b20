"""Several aligned adapters, reference adapters, and mixing of weights, against separate models."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tiny_models import make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer
from two_models import position_ids

from dera_peft import DeRaError, DeRaModel
from dera_peft.checkpoint.source import ModelSource

IDS = torch.arange(3, 27).view(4, 6)
PROMPTS = ["The old lighthouse", "A fox crossed the frozen river and", "Rain", "My sister repairs"]
NEW = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def adapters(tiny_base, tiny_adapter, top_adapter, tmp_path_factory) -> dict:
    """Three adapters: one on all layers, one on the upper half, and one that stands for SFT."""
    sft = make_adapter(tiny_base, tmp_path_factory.mktemp("sft"), seed=7)
    return {"helpful": tiny_adapter, "harmless": top_adapter, "sft": sft}


def logits(base, *adapters, ids=IDS):
    """Of a model of its own: the base with adapters merged into it, one after the other."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval()(ids).logits


def count_rows(module) -> list[int]:
    rows = []
    module.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    return rows


WEIGHTS = torch.tensor([[0.7, 0.2], [0.7, 0.9], [0.0, 0.5], [0.0, 0.0]])


@torch.no_grad()
def test_two_aligned_adapters_against_three_models(tiny_base, adapters):
    sources = {name: adapters[name] for name in ("helpful", "harmless")}
    model = DeRaModel.from_pretrained(tiny_base, adapters=sources)
    assert model.aligned == ["helpful", "harmless"]
    z_ref, z_helpful, z_harmless = (logits(tiny_base, *a) for a in ((), (sources["helpful"],), (sources["harmless"],)))
    assert min((z_ref - z_helpful).abs().max(), (z_helpful - z_harmless).abs().max()) > 1
    h, s = (WEIGHTS[:, k, None, None] for k in (0, 1))
    expected = (1 - h - s) * z_ref + h * z_helpful + s * z_harmless
    rows = count_rows(model.base.model.layers[3])
    by_name = {"helpful": WEIGHTS[:, 0].tolist(), "harmless": WEIGHTS[:, 1].tolist()}
    for lam in (WEIGHTS, by_name):
        torch.testing.assert_close(model(IDS, lam=lam).logits, expected, atol=2e-4, rtol=1e-5)
    # (0.7, 0.2) and (0.7, 0.9) run three branches each, (0, 0.5) two, (0, 0) the reference alone
    assert rows == [9, 9]
    output = model(IDS, lam={"helpful": 0.3}, output_branches=True)
    for name, z in (("reference", z_ref), ("helpful", z_helpful), ("harmless", z_harmless)):
        torch.testing.assert_close(output.branch_logits[name], z, atol=2e-4, rtol=1e-5)


@torch.no_grad()
def test_two_aligned_adapters_generate(tiny_base, adapters):
    """Cached, padded, ragged, with beams; against whole sequences without a cache through the same weights."""
    sources = {name: adapters[name] for name in ("helpful", "harmless")}
    model = DeRaModel.from_pretrained(tiny_base, adapters=sources)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base, padding_side="left")
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    cached = model.generate(**inputs, lam=WEIGHTS, num_beams=3, **NEW)
    assert cached.tolist() == model.generate(**inputs, lam=WEIGHTS, num_beams=3, use_cache=False, **NEW).tolist()
    ends = [
        model.generate(**inputs, lam=lam, **NEW).tolist() for lam in ({"helpful": 0}, {"helpful": 1}, {"harmless": 1})
    ]
    assert ends[0] != ends[1] != ends[2] != ends[0]
    start, tokens = inputs.input_ids.shape[1], inputs.input_ids
    greedy = model.generate(**inputs, lam=WEIGHTS, **NEW)
    mask = torch.cat([inputs.attention_mask, torch.ones(4, 8, dtype=torch.long)], 1)
    parts = []
    for used in ((), (sources["helpful"],), (sources["harmless"],)):
        plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        for adapter in used:
            plain = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
        parts.append(plain.eval()(greedy, attention_mask=mask, position_ids=position_ids(mask)).logits)
    h, s = (WEIGHTS[:, k, None, None] for k in (0, 1))
    mixed = (1 - h - s) * parts[0] + h * parts[1] + s * parts[2]
    assert mixed[:, start - 1 : -1].argmax(-1).tolist() == greedy[:, tokens.shape[1] :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("stacked", [True, False])
def test_reference_adapters(tiny_base, adapters, stacked):
    model = DeRaModel.from_pretrained(tiny_base, adapters["harmless"], reference=adapters["sft"], stacked=stacked)
    z_ref = logits(tiny_base, adapters["sft"])
    under = [adapters["sft"]] if stacked else []
    z_aligned = logits(tiny_base, *under, adapters["harmless"])
    assert (z_ref - z_aligned).abs().max() > 1
    assert model.fork_layer == (2 if stacked else 0)
    for lam in (0.0, 0.4, 1.0):
        expected = (1 - lam) * z_ref + lam * z_aligned
        torch.testing.assert_close(model(IDS, lam=lam).logits, expected, atol=2e-4, rtol=1e-5)


@torch.no_grad()
def test_several_reference_adapters_from_a_peft_model(tiny_base, adapters):
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(base, adapters["sft"], adapter_name="sft")
    for name in ("helpful", "harmless"):
        peft_model.load_adapter(adapters[name], adapter_name=name)
    model = DeRaModel.from_peft(peft_model, "harmless", reference=["sft", "helpful"])
    z_ref = logits(tiny_base, adapters["sft"], adapters["helpful"])
    z_aligned = logits(tiny_base, adapters["sft"], adapters["helpful"], adapters["harmless"])
    torch.testing.assert_close(model(IDS, lam=0.4).logits, 0.6 * z_ref + 0.4 * z_aligned, atol=2e-4, rtol=1e-5)
    model.unwrap()
    both = DeRaModel.from_peft(peft_model, ["helpful", "harmless"], reference="sft")
    assert both.adapters == {"reference": ("sft",), "helpful": ("sft", "helpful"), "harmless": ("sft", "harmless")}


@torch.no_grad()
def test_adapters_come_and_go_on_a_live_model(tiny_base, adapters):
    model = DeRaModel.from_pretrained(tiny_base, adapters={"harmless": adapters["harmless"]})
    before = model(IDS, lam=0.4).logits
    assert model.fork_layer == 2
    model.add_adapter("helpful", adapters["helpful"])
    assert model.fork_layer == 0
    lam = {"harmless": 0.4, "helpful": 0.3}
    expected = DeRaModel.from_pretrained(
        tiny_base, adapters={name: adapters[name] for name in ("harmless", "helpful")}
    )(IDS, lam=lam).logits
    assert torch.equal(model(IDS, lam=lam).logits, expected)
    with pytest.raises(DeRaError, match="'helpful' is taken"):
        model.add_adapter("helpful", adapters["helpful"])
    model.remove_adapter("helpful")
    assert model.adapters == {"reference": (), "harmless": ("harmless",)}
    assert "helpful" not in model.peft_model.peft_config
    assert torch.equal(model(IDS, lam=0.4).logits, before)
    with pytest.raises(DeRaError, match="only aligned branch"):
        model.remove_adapter("harmless")
    with pytest.raises(DeRaError, match="'helpfull' is not an aligned branch"):
        model.remove_adapter("helpfull")


def test_the_choice_to_join_behind_the_head_outlasts_other_adapters(tiny_base, adapters, tmp_path):
    model = DeRaModel.from_pretrained(tiny_base, adapters["harmless"])
    model.joins_before_head = False
    model.add_adapter("helpful", adapters["helpful"])
    assert not model.joins_before_head
    model.remove_adapter("helpful")
    assert not model.joins_before_head
    model.joins_before_head = True
    model.add_adapter("helpful", adapters["helpful"])
    assert model.joins_before_head
    on_head = make_adapter(tiny_base, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    model.add_adapter("head", on_head)
    assert not model.joins_before_head, "the branches' heads differ"


def test_lam_that_does_not_fit_the_adapters(tiny_base, adapters):
    model = DeRaModel.from_pretrained(tiny_base, adapters={name: adapters[name] for name in ("helpful", "harmless")})
    for lam, message in (
        ({"helpfull": 0.5}, "'helpfull'"),
        (0.5, "2 aligned branches"),
        ([0.1, 0.2, 0.3, 0.4], "2 aligned branches"),
        (torch.zeros(4, 3), r"shape \[4, 3\].*\[4, 2\]"),
        (torch.zeros(3, 2), r"shape \[3, 2\].*\[4, 2\]"),
        ({"helpful": [0.1, 0.2]}, r"shape \[2, 1\].*\[4, 1\]"),
    ):
        with pytest.raises(DeRaError, match=message):
            model(IDS, lam=lam)
    assert model.lam == {"helpful": 0.5, "harmless": 0.5}
    with pytest.raises(DeRaError, match="'other'"):
        DeRaModel.from_pretrained(tiny_base, adapters={"helpful": adapters["helpful"]}, lam={"other": 1.0})


def test_arguments_that_contradict_each_other(tiny_base, adapters):
    for kwargs, message in (
        ({"adapter": adapters["sft"], "adapters": {"a": adapters["sft"]}}, "not both"),
        ({"adapter": adapters["sft"], "adapters": {"a": adapters["sft"]}}, f"adapter='{adapters['sft']}' or adapters="),
        ({"reference": adapters["sft"]}, "needs the aligned adapter"),
        ({"adapters": {"reference": adapters["sft"]}}, "'reference'"),
        ({"adapters": {"a.b": adapters["sft"]}}, "'a.b'"),
        ({"adapters": {}}, "no aligned adapter"),
        ({"adapter": adapters["sft"], "reference": "./none"}, "reference='./none'"),
        ({"adapter": adapters["sft"], "mixing": "logit"}, "mixing='logit'"),
    ):
        with pytest.raises(DeRaError, match=message):
            DeRaModel.from_pretrained(tiny_base, **kwargs)


@torch.no_grad()
def test_several_adapters_are_saved_and_loaded(tiny_base, adapters, tmp_path):
    names = {name: adapters[name] for name in ("helpful", "harmless")}
    model = DeRaModel.from_pretrained(
        tiny_base, adapters=names, reference=adapters["sft"], lam={"helpful": 0.5, "harmless": 0.25}
    )
    model.save_pretrained(tmp_path / "saved")
    again = DeRaModel.from_pretrained(tmp_path / "saved")
    assert again.lam == model.lam
    assert again.adapters == model.adapters
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def scaled(base, factors: dict, ids=IDS):
    """Of a plain model whose weights are W + Σ f·s·BA."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter, factor in factors.items():
        peft_model = PeftModel.from_pretrained(model, adapter)
        for module in peft_model.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] *= factor
        model = peft_model.merge_and_unload()
    return model.eval()(ids).logits


@torch.no_grad()
def test_mixing_weights_against_models_with_scaled_weights(tiny_base, adapters):
    model = DeRaModel.from_pretrained(tiny_base, adapters["helpful"], mixing="weights")
    rows = count_rows(model.base.model.layers[0])
    lam = [0.0, 0.5, 1.0, 1.5]
    found = model(IDS, lam=lam).logits
    assert rows == [4], "one row a sequence"
    for row, value in enumerate(lam):
        expected = scaled(tiny_base, {adapters["helpful"]: value}, IDS[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected, atol=2e-4, rtol=1e-5)
    logits_mixed = DeRaModel.from_pretrained(tiny_base, adapters["helpful"])(IDS, lam=lam).logits
    assert (found - logits_mixed)[1].abs().max() > 0.5, "weights are another mixture than logits"
    assert torch.equal(model(IDS, lam=0).logits, logits(tiny_base))
    cached = model.generate(IDS, lam=lam, num_beams=3, **NEW)
    assert cached.tolist() == model.generate(IDS, lam=lam, num_beams=3, use_cache=False, **NEW).tolist()
    with pytest.raises(DeRaError, match="no branches"):
        model(IDS, lam=0.5, output_branches=True)


@torch.no_grad()
def test_mixing_weights_of_several_adapters_over_a_reference(tiny_base, adapters):
    names = {name: adapters[name] for name in ("helpful", "harmless")}
    model = DeRaModel.from_pretrained(tiny_base, adapters=names, reference=adapters["sft"], mixing="weights")
    found = model(IDS, lam=WEIGHTS).logits
    for row, (helpful, harmless) in enumerate(WEIGHTS.tolist()):
        factors = {adapters["sft"]: 1.0, adapters["helpful"]: helpful, adapters["harmless"]: harmless}
        expected = scaled(tiny_base, factors, IDS[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected, atol=2e-4, rtol=1e-5)


@torch.no_grad()
def test_a_cache_filled_by_other_weights_is_refused(tiny_base, adapters):
    model = DeRaModel.from_pretrained(tiny_base, adapters["helpful"], mixing="weights")
    cache = model(IDS[:, :5], lam=0.5, use_cache=True).past_key_values
    with pytest.raises(DeRaError, match="past_key_values"):
        model(IDS[:, 5:], lam=0.6, past_key_values=cache)


@torch.no_grad()
def test_an_adapter_that_is_refused_leaves_the_model_as_it_was(tiny_base, tiny_adapter, tmp_path):
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, mixing="weights")
    before = model(IDS, lam=0.4).logits
    dora = make_adapter(tiny_base, tmp_path / "dora", use_dora=True)
    for adapter, message in ((dora, "can't be scaled"), (tmp_path, "without an adapter_config.json")):
        with pytest.raises(DeRaError, match=message):
            model.add_adapter("other", adapter)
        assert list(model.peft_model.peft_config) == ["default"]
        assert torch.equal(model(IDS, lam=0.4).logits, before)


def test_records_say_which_base_and_which_reference(tiny_base, tiny_adapter, top_adapter, stories, tmp_path):
    """Adapters with a dera.json need no base, must be of one base, and say what they were trained against."""
    for name, adapter in (("one", tiny_adapter), ("two", top_adapter)):
        DeRaModel.from_pretrained(tiny_base, adapter).save_pretrained(tmp_path / name)
    sources = {name: tmp_path / name for name in ("one", "two")}
    model = DeRaModel.from_pretrained(adapters=sources)
    assert model.adapters == {"reference": (), "one": ("one",), "two": ("two",)}
    stacked = DeRaModel.from_pretrained(tiny_base, top_adapter, reference=tiny_adapter)
    stacked.save_pretrained(tmp_path / "stacked")
    with pytest.raises(DeRaError, match="name them with reference="):
        DeRaModel.from_pretrained(adapters={"a": tmp_path / "stacked"})
    record = tmp_path / "two" / "dera.json"
    values = json.loads(record.read_text())
    record.write_text(json.dumps({**values, "base": str(stories), "base_fingerprint": "another"}))
    with pytest.raises(DeRaError, match="'two' is of another base"):
        DeRaModel.from_pretrained(adapters=sources)


@pytest.fixture(scope="module")
def recorded(tiny_base, adapters, tmp_path_factory) -> dict:
    """Adapters with the records that trainings leave: SFT, DPO on top of it, and DPO that goes on from a copy of it."""
    folder = tmp_path_factory.mktemp("recorded")
    DeRaModel.from_pretrained(tiny_base, adapters["sft"]).save_pretrained(folder / "sft")
    for name, stacked in (("stacked", True), ("continued", False)):
        model = DeRaModel.from_pretrained(
            tiny_base, adapters={name: adapters["harmless"]}, reference=folder / "sft", stacked=stacked, lam=0.6
        )
        model.save_pretrained(folder / name)
    return {name: folder / name for name in ("sft", "stacked", "continued")}


@torch.no_grad()
def test_a_record_says_whether_the_adapter_replaces_the_references(tiny_base, adapters, recorded):
    for name in ("stacked", "continued"):
        model = DeRaModel.from_pretrained(tiny_base, recorded[name], reference=recorded["sft"])
        under = ("reference_1",) if name == "stacked" else ()
        assert model.adapters == {"reference": ("reference_1",), "aligned": (*under, "aligned")}
        assert model.lam == 0.6, "as the record says"
        z_aligned = logits(tiny_base, *([recorded["sft"]] if under else []), adapters["harmless"])
        torch.testing.assert_close(model(IDS, lam=1.0).logits, z_aligned, atol=2e-4, rtol=1e-5)
        with pytest.raises(DeRaError, match=f"stacked={name != 'stacked'}: by its record"):
            DeRaModel.from_pretrained(tiny_base, recorded[name], reference=recorded["sft"], stacked=name != "stacked")
        with pytest.raises(DeRaError, match="with other weights"):
            DeRaModel.from_pretrained(tiny_base, recorded[name], reference=adapters["helpful"])
    with pytest.raises(DeRaError, match="trained against the base alone"):
        DeRaModel.from_pretrained(tiny_base, recorded["sft"], reference=adapters["helpful"])
    for name in ("stacked", "continued"):  # the record's own reference, without reference=
        for source in ({"adapter": recorded[name]}, {"base": recorded[name]}):
            with pytest.raises(DeRaError, match=f"stacked={name != 'stacked'}: by its record {next(iter(source))}="):
                DeRaModel.from_pretrained(**source, stacked=name != "stacked")
            assert ModelSource.read(**source, stacked=name == "stacked").resolve().branches["reference"]
    DeRaModel.from_pretrained(tiny_base, recorded["sft"], stacked=False)  # there is nothing to contradict
    both = {"a": recorded["stacked"], "b": recorded["continued"]}
    with pytest.raises(DeRaError, match=r"\['a'\] come on top.*add_adapter"):
        DeRaModel.from_pretrained(tiny_base, adapters=both, reference=recorded["sft"])


def other_base(recorded_folder, folder):
    """A copy of a recorded adapter, of a base with other weights."""
    shutil.copytree(recorded_folder, folder)
    values = json.loads((folder / "dera.json").read_text())
    (folder / "dera.json").write_text(json.dumps({**values, "base_fingerprint": "another"}))
    return folder


def test_a_reference_of_another_base_is_refused(tiny_base, adapters, recorded, tmp_path):
    other = other_base(recorded["sft"], tmp_path / "other")
    with pytest.raises(DeRaError, match="is not the base that the adapter was trained on"):
        DeRaModel.from_pretrained(tiny_base, adapters["harmless"], reference=other)
    with pytest.raises(DeRaError, match="'reference_1' is of another base"):
        DeRaModel.from_pretrained(tiny_base, recorded["stacked"], reference=other)


def test_an_adapter_that_is_added_must_agree_with_the_model(tiny_base, adapters, recorded, tmp_path):
    model = DeRaModel.from_pretrained(tiny_base, adapters["helpful"], reference=recorded["sft"])
    for name in ("stacked", "continued"):
        model.add_adapter(name, recorded[name])
        under = ("reference_1",) if name == "stacked" else ()
        assert model.adapters[name] == (*under, name)
    for adapter, stacked, message in (
        (recorded["stacked"], False, "stacked=False: by its record"),
        (recorded["sft"], None, "trained against the base alone"),
        (other_base(recorded["stacked"], tmp_path / "other"), None, "is not the base that the adapter was trained on"),
    ):
        with pytest.raises(DeRaError, match=message):
            model.add_adapter("other", adapter, stacked=stacked)
    plain = DeRaModel.from_pretrained(tiny_base, adapters["helpful"])
    with pytest.raises(DeRaError, match="name them with reference="):
        plain.add_adapter("other", recorded["stacked"])
    with pytest.raises(DeRaError, match="with other weights"):
        DeRaModel.from_pretrained(tiny_base, adapters["helpful"], reference=adapters["harmless"]).add_adapter(
            "other", recorded["stacked"]
        )


def test_two_adapters_of_a_branch_that_replace_one_module_are_refused(tiny_base, tiny_adapter, tmp_path):
    for kind, module in (
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"trainable_token_indices": [5]}, "model.embed_tokens"),
    ):
        one, two = (make_adapter(tiny_base, tmp_path / f"{module}{seed}", seed=seed, **kind) for seed in (1, 2))
        with pytest.raises(DeRaError, match=rf"{module}: the adapters \['reference_1', 'aligned'\] of the branch"):
            DeRaModel.from_pretrained(tiny_base, two, reference=one)
    one, two = (tmp_path / f"lm_head{seed}" for seed in (1, 2))
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, reference=one)
    before = model(IDS, lam=0.5).logits
    with pytest.raises(DeRaError, match="lm_head: the adapters"):
        model.add_adapter("two", two)
    assert torch.equal(model(IDS, lam=0.5).logits, before)
    model.add_adapter("two", two, stacked=False)


@torch.no_grad()
def test_what_is_mixed_is_saved(tiny_base, adapters, tmp_path):
    model = DeRaModel.from_pretrained(tiny_base, adapters["helpful"], mixing="weights")
    model.save_pretrained(tmp_path / "saved")
    again = DeRaModel.from_pretrained(tmp_path / "saved")
    assert again.mixing == "weights"
    assert torch.equal(again(IDS, lam=0.5).logits, model(IDS, lam=0.5).logits)
    by_logits = DeRaModel.from_pretrained(tmp_path / "saved", mixing="logits")
    assert (by_logits(IDS, lam=0.5).logits - model(IDS, lam=0.5).logits).abs().max() > 0.5
