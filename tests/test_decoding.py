"""Decoding many requests in batches."""

import pytest
import torch
from conftest import make_tokenizer
from scipy import stats

from dera_peft import DeRaError, decoding
from dera_peft.decoding import Request, decode
from dera_peft.prompts import encode, from_texts
from dera_peft.sampling import Sampling

TEXTS = ["The old lighthouse", "A fox crossed the frozen river and", "Rain", "My sister repairs"]
LAMBDAS = (0.0, 0.5, 1.0, 2.0)
REQUESTS = [Request(index, lam, sample) for index in range(4) for lam in LAMBDAS for sample in range(2)]


@pytest.fixture
def run(tiny_model):
    tokenizer = make_tokenizer()
    tokens = encode(from_texts(TEXTS), tokenizer, tiny_model.config, 12)

    def run(requests=REQUESTS, batch_size=16, **settings) -> dict[Request, list[int]]:
        sampling = Sampling(**{"max_new_tokens": 12, **settings})
        batches = decode(tiny_model, tokenizer, tokens, requests, sampling, batch_size)
        return {completion.request: completion.tokens for batch in batches for completion in batch}

    return run


def test_texts_do_not_depend_on_the_batch(run):
    together = run(batch_size=32)
    assert set(together) == set(REQUESTS)
    assert run(batch_size=3) == together
    assert run(REQUESTS[5:9]) == {request: together[request] for request in REQUESTS[5:9]}
    assert run(seed=1) != together
    assert together[Request(0, 0.5, 0)] != together[Request(0, 0.5, 1)], "samples differ"


def test_padding_is_no_text_to_the_repetition_penalty(tiny_model):
    """Padding with the very token that greedy decoding gives first, which a penalty on padding would forbid."""
    tokenizer = make_tokenizer()
    prompts = encode(from_texts(TEXTS), tokenizer, tiny_model.config, 12)

    def run(batch_size: int) -> dict[Request, list[int]]:
        sampling = Sampling(max_new_tokens=12, temperature=0.0, repetition_penalty=3.0)
        batches = decode(tiny_model, tokenizer, prompts, REQUESTS, sampling, batch_size)
        return {completion.request: completion.tokens for batch in batches for completion in batch}

    alone = run(1)
    shortest = REQUESTS[TEXTS.index("Rain") * 8]
    tokenizer.pad_token_id = alone[shortest][0]
    assert tokenizer.pad_token_id not in prompts[shortest.index], "else it is penalised without padding too"
    assert run(32) == alone


def test_lambdas_draw_the_same_numbers(run):
    """At temperature far above 1 the noise alone decides, and is the same for all λ."""
    hot = run(temperature=1e4)
    assert all(hot[Request(0, lam, 0)] == hot[Request(0, 0.0, 0)] for lam in LAMBDAS)


def test_greedy_equals_generate(run, tiny_model):
    tokenizer = make_tokenizer()
    found = run(temperature=0.0)
    ids = tokenizer(TEXTS[1], return_tensors="pt").input_ids
    for lam in LAMBDAS:
        expected = tiny_model.generate(ids, lam=lam, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert found[Request(1, lam, 0)] == found[Request(1, lam, 1)] == expected.tolist()


@torch.no_grad()
def test_first_tokens_follow_the_mixture(run, tiny_model):
    requests = [Request(0, 0.5, sample) for sample in range(4000)]
    first = [tokens[0] for tokens in run(requests, batch_size=1000, max_new_tokens=1).values()]
    ids = make_tokenizer()(TEXTS[0], return_tensors="pt").input_ids
    expected = tiny_model(ids, lam=0.5).logits[0, -1].softmax(-1).double() * len(first)
    observed = torch.bincount(torch.tensor(first), minlength=len(expected)).double()
    common = expected >= 5
    observed = torch.cat([observed[common], observed[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 0.001


def test_too_little_memory_halves_the_batch_and_says_so(run, monkeypatch, capsys):
    expected, real, sizes = run(), decoding._decode_batch, []

    def short_of_memory(model, tokenizer, prompts, batch, *args):
        if len(batch) > 5:
            raise torch.OutOfMemoryError("no")
        sizes.append(len(batch))
        return real(model, tokenizer, prompts, batch, *args)

    monkeypatch.setattr(decoding, "_decode_batch", short_of_memory)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    assert run() == expected
    assert set(sizes) == {4}
    assert "batch size of 4" in capsys.readouterr().err


def test_too_little_memory_for_one_is_an_error(run, monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(decoding, "_decode_batch", out_of_memory)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    with pytest.raises(DeRaError, match="out of memory for a single prompt"):
        run()
