"""λ in `generate` of a model that PEFT or transformers has put adapters into, by the folder custom_generate/."""

import copy
from pathlib import Path

import pytest
import torch
from compatibility import ENCODER_DECODERS
from peft import PeftModel
from tiny_bases import adapt, make_base
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from dera_peft import DeRaError, DeRaModel

ROOT = Path(__file__).resolve().parents[2]
DERA = {"custom_generate": str(ROOT), "trust_remote_code": True}
IDS = torch.arange(3, 27).view(3, 8)
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0
INPUTS = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def loaded(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


@pytest.fixture
def peft_model(loaded, tiny_adapter):
    return PeftModel.from_pretrained(copy.deepcopy(loaded), tiny_adapter).eval()


def state_of(model) -> dict:
    """All that a call could leave behind: tensors, what else the modules have, hooks included, and the two configs."""

    def described(value):
        if isinstance(value, torch.Tensor):
            return value.data_ptr(), value._version, value.requires_grad
        if isinstance(value, torch.nn.Module):
            return id(value)
        if isinstance(value, dict):
            return {key: described(each) for key, each in value.items()}
        return repr(value)

    return {
        "modules": {name: described(vars(module)) for name, module in model.named_modules()},
        "configs": (model.config.to_dict(), model.generation_config.to_dict()),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"generation_config": GenerationConfig(do_sample=True, top_k=20)},
        {"combine": "plausible:0.1"},
    ],
)
def test_tokens_are_those_of_dera_model(peft_model, tiny_model, options, monkeypatch):
    def load_again(*args, **kwargs):
        raise AssertionError("a model was loaded again")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", load_again)
    texts = []
    for lam in ([0.0, 0.5, 1.0], 2.0):
        made = []
        for generate, more in ((tiny_model.generate, {}), (peft_model.generate, DERA)):
            torch.manual_seed(5)
            made.append(generate(**INPUTS, **options, **more, lam=lam).tolist())
        assert made[0] == made[1]
        texts.append(made[0])
    assert texts[0] != texts[1]


def test_ends_are_the_base_and_the_adapter_by_peft_itself(peft_model):
    aligned = peft_model.generate(**INPUTS)
    with peft_model.disable_adapter():
        reference = peft_model.generate(**INPUTS)
    assert not torch.equal(aligned, reference)
    assert torch.equal(peft_model.generate(IDS, attention_mask=MASK, max_new_tokens=5, lam=0, **DERA), reference)
    assert torch.equal(peft_model.generate(**INPUTS, lam=1, **DERA), aligned)
    assert torch.equal(peft_model.generate(**INPUTS, **DERA), aligned), "as trained, unless λ is given"


def test_the_model_is_as_it_was_afterwards(peft_model):
    class Stop(Exception):
        pass

    def stop(ids, scores, **kwargs):
        raise Stop

    peft_model.generate(**INPUTS)  # after which PEFT itself leaves a method in its own model
    before, logits = state_of(peft_model), peft_model(IDS).logits
    peft_model.generate(**INPUTS, lam=0.5, **DERA)
    assert state_of(peft_model) == before
    for raised, wrong in (
        (Stop, {"stopping_criteria": [stop]}),
        (DeRaError, {"lam": [0.5]}),
        (ValueError, {"nonsense": 1}),
        (DeRaError, {"adapter_names": ["default", "__base__", "default"]}),
    ):
        with pytest.raises(raised):
            peft_model.generate(**{**INPUTS, "lam": 0.5, **wrong}, **DERA)
        assert state_of(peft_model) == before, wrong
    assert torch.equal(peft_model(IDS).logits, logits)


def test_adapters_that_transformers_has_loaded(loaded, tiny_base, tiny_adapter, top_adapter, tiny_model):
    model = copy.deepcopy(loaded)
    model.load_adapter(str(tiny_adapter))
    model.load_adapter(str(top_adapter), adapter_name="top")  # which is the active one from here on
    both = DeRaModel.from_pretrained(tiny_base, adapters={"default": tiny_adapter, "top": top_adapter})
    of_tiny, of_top = tiny_model.generate(**INPUTS, lam=0.5), both.generate(**INPUTS, lam={"top": 0.5})
    assert not torch.equal(of_top, of_tiny)
    before = state_of(model)
    assert torch.equal(model.generate(**INPUTS, lam=0.5, **DERA), of_top)
    assert torch.equal(model.generate(**INPUTS, lam=0.5, adapter="default", **DERA), of_tiny)
    lam = {"default": [0.2, 0.0, 1.0], "top": 0.4}
    of_both = model.generate(**INPUTS, lam=lam, adapter=["default", "top"], **DERA)
    assert torch.equal(of_both, both.generate(**INPUTS, lam=lam))
    assert state_of(model) == before

    wrapped = DeRaModel.from_peft(model, "default")  # what transformers has loaded can be wrapped, too
    assert torch.equal(wrapped.generate(**INPUTS, lam=0.5), of_tiny)
    with pytest.raises(DeRaError, match="without its PeftModel"):
        wrapped.save_pretrained("nowhere")
    assert wrapped.unwrap() is model

    model.set_adapter(["default", "top"])
    with pytest.raises(DeRaError, match=r"active are \['default', 'top'\]: say with adapter="):
        model.generate(**INPUTS, lam=0.5, **DERA)
    at_one = model.generate(**INPUTS, lam=1.0, reference="default", **DERA)
    assert torch.equal(at_one, model.generate(**INPUTS)), "the two on top of each other, as PEFT has them"
    at_zero = model.generate(**INPUTS, lam=0.0, reference="default", **DERA)
    assert torch.equal(at_zero, tiny_model.generate(**INPUTS, lam=1.0))
    assert not torch.equal(at_one, at_zero)


def test_a_repository_whose_own_generate_it_is(tiny_base, tiny_adapter, tiny_model, tmp_path):
    """transformers takes the function of a model's folder as the model's `generate`."""
    for file in tiny_base.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "custom_generate").symlink_to(ROOT / "custom_generate")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, trust_remote_code=True).eval()
    model.load_adapter(str(tiny_adapter))
    expected = tiny_model.generate(**INPUTS, lam=0.5)
    assert torch.equal(model.generate(IDS, attention_mask=MASK, max_new_tokens=5, lam=0.5), expected)


def test_an_encoder_decoder():
    base = next(base for base in ENCODER_DECODERS if base.model_type == "bart")
    peft_model = adapt(make_base(base), target_modules=base.targets, task_type="SEQ_2_SEQ_LM").eval()
    ids = IDS % 50 + 3
    texts = [peft_model.generate(input_ids=ids, max_new_tokens=5, lam=lam, **DERA) for lam in (0.0, 0.5, 1.0)]
    assert torch.equal(texts[2], peft_model.generate(input_ids=ids, max_new_tokens=5))
    assert not torch.equal(texts[0], texts[2])
    assert torch.equal(texts[1], DeRaModel.from_peft(peft_model).generate(ids, max_new_tokens=5, lam=0.5))


def test_what_has_no_lambda_is_refused(peft_model, loaded, tiny_model):
    def refused(model, message, **options):
        with pytest.raises(DeRaError, match=message):
            model.generate(**INPUTS, lam=0.5, **options, **DERA)

    refused(loaded, "has no layers with an adapter")
    refused(tiny_model, "leave custom_generate out")
    refused(peft_model, "adapter_names chooses", adapter_names=["default"] * 3)
    refused(peft_model, "'nobody' is not in", adapter="nobody")
    refused(peft_model, "assistant_model is not supported", assistant_model=loaded)
    with peft_model.disable_adapter():
        refused(peft_model, r"switched off \(disable_adapter\)")
    peft_model.merge_adapter()
    refused(peft_model, r"merged into the base is \['default'\]")
    peft_model.unmerge_adapter()
    wrapped = DeRaModel.from_peft(peft_model)
    refused(peft_model, r"unwrap\(\) that one first")
    wrapped.unwrap()
    refused(peft_model.unload(), "has no layers with an adapter")
    with pytest.raises(ValueError, match="custom generation code"):
        peft_model.generate(**INPUTS, lam=0.5, custom_generate=str(ROOT), trust_remote_code=False)


def test_active_dropout_is_told_of(peft_model, caplog):
    layer = next(module for module in peft_model.modules() if hasattr(module, "lora_dropout"))
    for is_training in (False, True):
        layer.lora_dropout["default"] = torch.nn.Dropout(0.5).train(is_training)
        peft_model.generate(**INPUTS, lam=0.5, **DERA)
        assert ("its dropout changes the logits" in caplog.text) is is_training
