"""A merge against the base with its adapter beside it, and adapters with added tokens against PEFT's own passes."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_bases import adapt
from tiny_models import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dera_peft import DeRaError, DeRaModel
from dera_peft.checkpoint import merging
from dera_peft.checkpoint.merging import check_same
from dera_peft.training.adapters import merge_and_save
from dera_peft.training.sft_model import SFTModel

IDS = torch.tensor([[5, 6, 7, 320, 321, 9, 8]])  # 320 and 321 are new


def make_base(folder: Path, tied: bool) -> Path:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[bool, Path]:
    """By whether the embeddings are tied to the head."""
    return {tied: make_base(tmp_path_factory.mktemp("base"), tied) for tied in (False, True)}


def load(base: Path, tokens: int | None = None):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if tokens is not None:
        model.resize_token_embeddings(tokens)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        (False, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        (True, {"target_modules": ["q_proj", "embed_tokens"]}),
        (True, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (True, {"target_modules": ["q_proj"], "trainable_token_indices": [4, 9]}),
        (True, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    ],
    ids=["untied", "tied, embeddings", "tied, head", "tied, tokens", "tied, both"],
)
def test_a_merge_is_the_base_with_its_adapter(tied, settings, bases, tmp_path):
    base = bases[tied]
    peft_model = adapt(load(base), **settings)
    peft_model.save_pretrained(tmp_path / "adapter")
    ids = IDS.clamp(max=300)
    expected = PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()(input_ids=ids).logits
    assert (expected - load(base)(ids).logits).abs().max() > 0.1
    model = SFTModel(base=str(base), adapter=str(tmp_path / "adapter"))
    merge_and_save(model, AutoTokenizer.from_pretrained(base), tmp_path / "merged")
    torch.testing.assert_close(load(tmp_path / "merged")(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_merge_that_is_another_model_is_not_saved(bases, tmp_path, monkeypatch):
    adapt(load(bases[False]), target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    model = SFTModel(base=str(bases[False]), adapter=str(tmp_path / "adapter"))
    monkeypatch.setattr("dera_peft.checkpoint.merging.merge", lambda peft_model: peft_model.unload())
    with pytest.raises(DeRaError, match="does not compute what the adapter does over its base"):
        merge_and_save(model, AutoTokenizer.from_pretrained(bases[False]), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_rounding_is_allowed_and_told_where_it_hides_the_adapter(caplog):
    expected = torch.full((1, 4, 8), 10.0)
    way_out = "Do this."
    check_same(expected, expected + 1e-3, expected - 1.0, torch.float32, "it", way_out)
    assert not caplog.text
    check_same(expected, expected + 0.1, expected - 0.05, torch.bfloat16, "it", way_out)
    assert "it loses most of the adapter's effect" in caplog.text
    for found in (expected + 0.1, expected * torch.nan):
        with pytest.raises(DeRaError, match=r"it does not compute.*Do this\."):
            check_same(expected, found, expected - 1.0, torch.float32, "it", way_out)


def test_the_tokens_that_are_compared_are_those_of_the_vocabulary(bases):
    tokens = merging.probe(load(bases[False]))[0].tolist()
    assert max(tokens) == 319
    assert len(set(tokens)) > 20


ADDED = {
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens and head": {"trainable_token_indices": {"embed_tokens": [320, 321]}, "modules_to_save": ["lm_head"]},
    "tokens, tied": {"trainable_token_indices": [320, 321]},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ADDED)
def test_added_tokens_against_pefts_own_passes(kind, bases, tmp_path):
    base = bases["tied" in kind]
    peft_model = adapt(load(base, 322), target_modules=["q_proj", "v_proj"], **ADDED[kind])
    aligned = peft_model(input_ids=IDS).logits
    with peft_model.disable_adapter():
        reference = peft_model(input_ids=IDS).logits
    assert (aligned - reference).abs().max() > 0.1
    peft_model.save_pretrained(tmp_path / "adapter")
    model = DeRaModel.from_pretrained(base, tmp_path / "adapter")
    for lam in (0.0, 0.4, 1.0):
        torch.testing.assert_close(
            model(IDS, lam=lam).logits, (1 - lam) * reference + lam * aligned, rtol=1e-4, atol=1e-4
        )
    model.save_pretrained(tmp_path / "saved")
    again = DeRaModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(IDS, lam=0.4).logits, model(IDS, lam=0.4).logits, rtol=0, atol=0)


@torch.no_grad()
def test_without_the_bases_new_rows_they_are_the_mean_of_the_others(bases, tmp_path):
    peft_model = adapt(load(bases[False], 322), target_modules=["q_proj"], **ADDED["modules_to_save"])
    aligned = peft_model(input_ids=IDS).logits
    peft_model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert not any("original" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    first, second = (DeRaModel.from_pretrained(bases[False], tmp_path / "adapter") for _ in range(2))
    torch.testing.assert_close(first(IDS, lam=1.0).logits, aligned, rtol=1e-4, atol=1e-4)
    assert torch.equal(first(IDS, lam=0.4).logits, second(IDS, lam=0.4).logits)
    plain, known = load(bases[False]), IDS[:, :3]
    torch.testing.assert_close(first(known, lam=0.0).logits[..., :320], plain(known).logits, rtol=1e-4, atol=1e-4)
    mean = plain.lm_head.weight.mean(0)
    torch.testing.assert_close(first.base.lm_head.original_module.weight[320:], mean.expand(2, -1))


def test_adapters_of_two_vocabularies_are_refused(bases, tmp_path):
    for name, tokens in (("one", 322), ("two", 323)):
        peft_model = adapt(load(bases[False], tokens), target_modules=["q_proj"], modules_to_save=["lm_head"])
        peft_model.save_pretrained(tmp_path / name)
    adapters = {name: tmp_path / name for name in ("one", "two")}
    with pytest.raises(DeRaError, match="was trained with 322 tokens and"):
        DeRaModel.from_pretrained(bases[False], adapters=adapters)
    adapt(load(bases[False]), target_modules=["q_proj"]).save_pretrained(tmp_path / "plain")
    model = DeRaModel.from_pretrained(bases[False], tmp_path / "plain")
    with pytest.raises(DeRaError, match="was trained with 322 tokens, and this model has 320"):
        model.add_adapter("other", tmp_path / "one")
