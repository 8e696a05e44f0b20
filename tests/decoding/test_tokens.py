"""What a tokenizer adds to a prompt, and tokens that the base has no row for."""

import pytest
import torch
from compatibility import ENCODER_DECODERS
from tiny_bases import adapt, make_base
from tiny_models import make_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, T5Config
from two_models import TwoModels, load_two

from dera_peft import DeRaError, DeRaModel
from dera_peft.decoding.batching import decode
from dera_peft.decoding.prompts import encode, from_texts
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.decoding.scoring import score

TEXTS = ["The old lighthouse", "A fox crossed the frozen river and"]
BASE, FAR = 320, 5000  # rows of the tiny base, and a token beyond them


def closing_tokenizer(kind: str):
    """A tokenizer that puts </s> behind a text, and <s> before it."""
    tokenizer = make_tokenizer()
    if kind == "post-processor":
        special = [("<s>", 1), ("</s>", 2)]
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
        tokenizer.eos_token = "<pad>"  # a processor keeps its own end token where the tokenizer's is changed later
    else:
        tokenizer.add_bos_token = tokenizer.add_eos_token = True
    return tokenizer


@pytest.mark.parametrize("kind", ["post-processor", "add_eos_token"])
def test_no_prompt_is_closed(kind, tmp_path):
    closing_tokenizer(kind).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    own = tokenizer("A fox", add_special_tokens=False)["input_ids"]
    assert tokenizer("A fox")["input_ids"] == [1, *own, 2]
    assert encode(from_texts(["A fox", "A fox</s>"]), tokenizer, LlamaConfig(), 8) == [[1, *own], [1, *own, 2]]
    assert encode(from_texts(["A fox"]), tokenizer, T5Config(), 8) == [[1, *own, 2]], "an encoder's input stays closed"


def padded(side: str) -> dict[str, torch.Tensor]:
    """A batch that a tokenizer pads with a token of its own, beyond the base's rows."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = None, side
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    assert batch["input_ids"].max() == tokenizer.pad_token_id == BASE
    return dict(batch)


def test_padding_may_be_a_token_without_a_row(tiny_base, tiny_adapter, tiny_model):
    tokenizer = make_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    tiny_model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 6, "do_sample": False, "lam": 0.5}
    alone = [tiny_model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]
    assert alone[0] != alone[1]
    left = padded("left")
    width = left["input_ids"].shape[1]
    for how in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        found = tiny_model.generate(**left, **options, **how)
        assert found[:, width:].tolist() == alone
        assert torch.equal(found[:, :width], left["input_ids"]), "the prompt comes back as it was given"
    # one of two sequences ends, and is filled up with the same token
    end = next(token for token in alone[0][:-1] if token not in alone[1])
    found = tiny_model.generate(**left, **options, eos_token_id=end, pad_token_id=BASE)[:, width:].tolist()
    length = alone[0].index(end) + 1
    assert (found[0][:length], found[1]) == (alone[0][:length], alone[1])
    assert set(found[0][length:]) <= {end}

    right = padded("right")
    labels = right["input_ids"].masked_fill(right["attention_mask"] == 0, -100)
    mixture = TwoModels(*load_two(tiny_base, tiny_adapter), lam=0.5)
    with torch.no_grad():
        output = tiny_model(**right, labels=labels, lam=0.5)
        each = [mixture(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in prompts]
    losses = torch.cat([-log_p[range(len(ids) - 1), ids[1:]] for log_p, ids in zip(each, prompts, strict=True)])
    assert output.loss.item() == pytest.approx(losses.mean().item(), abs=1e-5)

    class Padding:
        """The base's tokenizer with another padding token."""

        pad_token_id = FAR
        decode = tokenizer.decode

    requests = [Request(index, 0.5) for index in (0, 1)]
    batches = decode(tiny_model, Padding(), prompts, requests, Sampling(max_new_tokens=6, temperature=0.0), 2)
    assert {each.request.index: each.tokens for batch in batches for each in batch} == dict(enumerate(alone))


def test_padding_of_an_encoder():
    base = next(base for base in ENCODER_DECODERS if base.model_type == "t5")
    model = DeRaModel.from_peft(adapt(make_base(base), target_modules=base.targets, task_type="SEQ_2_SEQ_LM"))
    prompts, rows = [[5, 6, 7, 8], [9, 10]], model.get_input_embeddings().weight.shape[0]
    options = {"max_new_tokens": 4, "do_sample": False, "lam": 0.5, "eos_token_id": None}
    alone = [model.generate(torch.tensor([ids]), **options)[0].tolist() for ids in prompts]
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, rows, rows]])
    mask = (ids < rows).long()
    assert model.generate(ids, attention_mask=mask, **options).tolist() == alone
    labels = torch.tensor([[4, 5], [6, -100]])
    clean = ids.masked_fill(mask == 0, 0)
    expected = model(clean, attention_mask=mask, labels=labels, lam=0.5).loss
    assert model(ids, attention_mask=mask, labels=labels, lam=0.5).loss == expected


def test_tokens_without_a_row_are_named(tiny_model, tiny_base):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    (prompt,) = encode(from_texts(["<|im_start|>user<|im_end|>"]), tokenizer, tiny_model.config, 4)
    named = rf"the base has no row for the tokens '<\|im_start\|>' \({BASE}\), '<\|im_end\|>' \({BASE + 1}\): its embed"
    for model, lam in ((tiny_model, 0.5), (AutoModelForCausalLM.from_pretrained(tiny_base), None)):
        with pytest.raises(DeRaError, match=named):
            next(decode(model, tokenizer, [prompt], [Request(0, lam)], Sampling(), 1))
    with pytest.raises(DeRaError, match=f"has no row for the tokens {BASE}, {BASE + 1}: its embedding has {BASE}"):
        tiny_model.generate(torch.tensor([prompt]), lam=0.5)
    with pytest.raises(DeRaError, match=f"has no row for the token {FAR}"):
        score(tiny_model, [[5]], [[6, FAR]], 0.5)
    with pytest.raises(DeRaError, match="has no row for the token -1"):
        score(tiny_model, [[-1]], [[6]], 0.5)
