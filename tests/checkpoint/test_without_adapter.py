"""A base without an adapter: two branches that are the same, until they are given prompts of their own."""

import pytest
import torch
from captured import watch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dera_peft import DeRaError, DeRaModel
from dera_peft.cli.info import describe_model
from dera_peft.decoding.batching import decode
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.plan import WITHOUT_ADAPTERS

PROMPTS = ["The old lighthouse", "A fox crossed the frozen river and", "Rain"]


@pytest.fixture(scope="module")
def base(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def alone(tiny_base):
    return DeRaModel.from_pretrained(tiny_base, dtype="float32")


@pytest.fixture(scope="module")
def batch(tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base, padding_side="left")
    return tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)


def test_it_decodes_as_the_base_does(base, alone, batch):
    rows = []
    alone.base.get_input_embeddings().register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        expected, found = [], []
        for model, texts in ((base, expected), (alone, found)):
            torch.manual_seed(0)
            texts += model.generate(**batch, max_new_tokens=8, pad_token_id=0, **options).tolist()
        assert found == expected
    assert max(rows) == 9, "a sequence has one row: with 3 beams 9"
    torch.testing.assert_close(alone(**batch).logits, base(**batch).logits)


def test_its_steps_are_captured(base, tiny_base, batch):
    model = MixtureModel(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval(), WITHOUT_ADAPTERS)
    recorder = watch(model, torch.device("cpu"))
    expected = base.generate(**batch, max_new_tokens=8, pad_token_id=0, eos_token_id=None)
    tokens = model.generate(**batch, max_new_tokens=8, pad_token_id=0, eos_token_id=None, capture=True)
    assert recorder.replays
    assert tokens.tolist() == expected.tolist()


def test_it_decodes_requests_without_lambda(tiny_base, base, alone):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base, padding_side="left")
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    requests = [Request(index, None, sample) for index in range(3) for sample in range(2)]
    sampling = Sampling(max_new_tokens=8)
    texts = []
    for model in (base, alone):
        batches = decode(model, tokenizer, prompts, requests, sampling)
        texts.append({each.request: each.tokens for batch in batches for each in batch})
    assert texts[0] == texts[1]
    with pytest.raises(DeRaError, match="None where they do not"):
        next(decode(alone, tokenizer, prompts, [Request(0, 1.0)], sampling))


def test_a_lambda_says_what_is_missing(alone, batch):
    for call in (
        lambda: alone.generate(**batch, lam=1.0, max_new_tokens=1),
        lambda: alone(**batch, lam=0.5),
        lambda: alone(**batch, output_branches=True),
    ):
        with pytest.raises(DeRaError, match="give the reference's prompt too, or load the model with an adapter"):
            call()


def test_what_needs_an_adapter_is_refused(alone, tiny_base, tiny_adapter, tmp_path):
    for call in (
        lambda: alone.save_pretrained(tmp_path),
        lambda: alone.export(1.0, tmp_path / "export"),
        lambda: alone.add_adapter("more", tiny_adapter),
    ):
        with pytest.raises(DeRaError, match="this model has none: load the base with one"):
            call()
    with pytest.raises(DeRaError, match="'aligned' is the only aligned branch"):
        alone.remove_adapter("aligned")
    with pytest.raises(DeRaError, match="has no adapter"):
        _ = alone.peft_model
    with pytest.raises(DeRaError, match="scales the weights of adapters, and this model has none"):
        DeRaModel.from_pretrained(tiny_base, mixing="weights")
    with pytest.raises(DeRaError, match="pass it as the adapter"):
        DeRaModel.from_pretrained(tiny_adapter)


def test_what_it_is(alone, tiny_base):
    assert alone.record.adapters == {}
    assert alone.record.branches == {"reference": [], "aligned": []}
    assert not alone.branches_differ
    assert "aligned={'aligned': []}" in repr(alone)
    facts = describe_model(alone)
    assert facts["adapter_parameters"] == 0
    assert facts["fork_layer"] == 0
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert MixtureModel(model, WITHOUT_ADAPTERS).unwrap() is model
