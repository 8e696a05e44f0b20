"""Decoding many requests in batches."""

import pytest
import torch
from compatibility import BASES
from scipy import stats
from tiny_bases import adapt, make_base
from tiny_models import make_tokenizer
from transformers import AutoModelForCausalLM

from dera_peft import DeRaError, DeRaModel
from dera_peft.decoding import batching
from dera_peft.decoding.batching import decode
from dera_peft.decoding.prompts import encode, from_texts
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.engine.prefill import can_be_shared

TEXTS = ["The old lighthouse", "A fox crossed the frozen river and", "Rain", "My sister repairs"]
LAMBDAS = (0.0, 0.5, 1.0, 2.0)
REQUESTS = [Request(index, lam, sample) for index in range(4) for lam in LAMBDAS for sample in range(2)]

FEW = [Request(index, lam, sample) for index in (0, 1, 2) for lam in (0.5, 1.0) for sample in range(2)]


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
        batches = decode(tiny_model, tokenizer, prompts, REQUESTS[::2], sampling, batch_size)
        return {completion.request: completion.tokens for batch in batches for completion in batch}

    alone = run(1)
    shortest = REQUESTS[TEXTS.index("Rain") * 8]
    tokenizer.pad_token_id = alone[shortest][0]
    assert tokenizer.pad_token_id not in prompts[shortest.index], "else it is penalised without padding too"
    assert run(32) == alone


def test_the_bases_generation_config_changes_no_draws(run, tiny_model, caplog):
    plain = run()
    assert not caplog.text
    text = max(plain.values(), key=len)
    config = tiny_model.generation_config
    config.bad_words_ids, config.no_repeat_ngram_size, config.min_new_tokens = [[text[0]]], 1, 12
    try:
        assert run() == plain
    finally:
        config.bad_words_ids = config.no_repeat_ngram_size = config.min_new_tokens = None
    said = caplog.text
    modes = {
        "do_sample": True,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "penalty_alpha": 0.6,
        "num_beams": 3,
    }
    modes |= {"prompt_lookup_num_tokens": 3, "dola_layers": "low", "num_beam_groups": 3, "token_healing": True}
    before = {name: getattr(config, name) for name in modes}
    try:
        for name, value in modes.items():
            setattr(config, name, value)
            assert run() == plain, name
            assert name == "do_sample" or f"{name}={value!r}" in caplog.text
    finally:
        config.update(**before)
    config.num_return_sequences = 2  # for which it would have to sample, or to have beams
    try:
        with pytest.raises(DeRaError, match=r"generation config .* not valid: .*num_return_sequences"):
            run()
    finally:
        config.num_return_sequences = None
    assert "the base's generation config sets min_new_tokens=12, no_repeat_ngram_size=1, bad_words_ids=" in said


def test_samples_of_the_exact_mixture_do_not_depend_on_the_batch(tiny_model):
    def draw(requests=REQUESTS[::2], batch_size=32, **options):
        batches = decode(tiny_model, make_tokenizer(), tokens, requests, sampling, batch_size, **options)
        completions = [each for batch in batches for each in batch]
        return {each.request: (each.tokens, each.exact) for each in completions}

    sampling = Sampling(max_new_tokens=12)
    tokens = encode(from_texts(TEXTS), make_tokenizer(), tiny_model.config, 12)
    plain = draw()
    assert all(exact is None for _, exact in plain.values())
    alone = draw(particles=1)
    assert {request: found for request, (found, _) in alone.items()} == {r: found for r, (found, _) in plain.items()}
    together = draw(particles=4)
    assert any(exact.resamplings for _, exact in together.values())
    for batch_size, requests in ((1, REQUESTS[::2]), (9, REQUESTS[2:9:2])):
        for request, (found, exact) in draw(requests, batch_size, particles=4).items():
            expected = together[request][1]
            assert found == together[request][0]
            assert exact.log_z == pytest.approx(expected.log_z, abs=1e-3)
            assert (exact.resamplings, exact.ancestors) == (expected.resamplings, expected.ancestors)
    for request, (_, exact) in together.items():
        assert exact.log_z == 0 if request.lam in (0, 1) else exact.log_z != 0
    assert {request: found for request, (found, _) in together.items()} != {r: found for r, (found, _) in plain.items()}


def test_particles_count_as_completions_that_are_decoded_at_once(tiny_model):
    tokens = encode(from_texts(TEXTS), make_tokenizer(), tiny_model.config, 2)
    inputs = tiny_model, make_tokenizer(), tokens, REQUESTS, Sampling(max_new_tokens=2)
    assert max(len(batch) for batch in decode(*inputs, 12, particles=4)) == 3
    assert {len(batch) for batch in decode(*inputs, 3, particles=4)} == {1}, "one at least"
    for batch in decode(*inputs, 100, batch_tokens=100, particles=4):
        held = 4 * sum(max(len(tokens[each.request.index]) for each in batch) + 2 for _ in batch)
        assert len(batch) == 1 or held <= 100


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 5}, {"repetition_penalty": 1.1}], ids=str)
def test_particles_are_drawn_from_the_mixture_as_it_is(tiny_model, settings):
    (name,) = settings
    with pytest.raises(DeRaError, match=f"{name}={settings[name]:g}: the exact mixture is sampled at temperature 1"):
        list(decode(tiny_model, make_tokenizer(), [[5, 6]], [Request(0, 0.5)], Sampling(**settings), particles=2))
    with pytest.raises(DeRaError, match="the exact mixture is of λ alone; leave combine out"):
        list(decode(tiny_model, make_tokenizer(), [[5, 6]], [Request(0, 0.5, 0, "jsd")], Sampling(), particles=2))


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


def decode_all(model, requests, batch_size=7, **options) -> dict[Request, list[int]]:
    tokenizer = make_tokenizer()
    prompts = [*encode(from_texts(TEXTS), tokenizer, model.config, 12), [9]]
    batches = decode(model, tokenizer, prompts, requests, Sampling(max_new_tokens=4), batch_size, **options)
    return {completion.request: completion.tokens for batch in batches for completion in batch}


def count_tokens(model) -> list[int]:
    """The tokens that each pass of the last layer computes, in all rows."""
    counts: list[int] = []
    layers = model.base.model.layers if isinstance(model, DeRaModel) else model.model.layers
    layers[-1].register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[:2].numel()))
    return counts


@pytest.mark.parametrize("kind", ["tiny", "top", "weights", "plain"])
def test_a_prompt_is_computed_once_for_all_of_its_requests(kind, request, tiny_base, tiny_adapter, monkeypatch):
    """The texts are those of a prefill in each batch; the last prompt's one token, and a lone request, are not kept."""
    if kind == "plain":
        model = AutoModelForCausalLM.from_pretrained(tiny_base)
    elif kind == "top":
        model = DeRaModel.from_pretrained(tiny_base, request.getfixturevalue("top_adapter"))
    else:
        model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, mixing="weights" if kind == "weights" else "logits")
    lambdas = (None,) if kind == "plain" else LAMBDAS
    requests = [Request(index, lam, sample) for index in (0, 1, 3, 4) for lam in lambdas for sample in range(4)]
    requests.append(Request(2, lambdas[-1]))
    counts = count_tokens(model)
    shared = decode_all(model, requests)
    prompt_tokens = sum(count for count in counts if count > 2 * 7)  # the other passes are of one token a row
    assert decode_all(model, requests, batch_tokens=200) == shared, "in groups of few prompts"

    monkeypatch.setattr(batching, "can_be_shared", lambda model: False)
    counts.clear()
    assert decode_all(model, requests) == shared
    assert prompt_tokens < 0.5 * sum(count for count in counts if count > 2 * 7)
    assert len(set(map(tuple, shared.values()))) > len(requests) // 3


def test_each_branch_of_a_prompt_is_computed_once(tiny_model):
    """Three prompts of which one needs both branches, one the reference and one the aligned model alone."""
    requests = [
        *(Request(0, lam, sample) for lam in LAMBDAS for sample in range(5)),
        *(Request(1, 0.0, sample) for sample in range(20)),
        *(Request(3, 1.0, sample) for sample in range(20)),
    ]
    counts = count_tokens(tiny_model)
    sizes = []
    real = batching._decode_batch

    def decode_batch(*args):
        sizes.append(sum(counts))
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "_decode_batch", decode_batch)
        decode_all(tiny_model, requests)
    longest = max(len(ids) for ids in encode(from_texts(TEXTS), make_tokenizer(), tiny_model.config, 12))
    assert sizes[0] == counts[0] == 4 * longest, "four rows, and nothing else before the first batch"
    assert max(counts[1:]) <= 2 * 7, "a token a row from there on"


@pytest.mark.parametrize("setting", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_without_a_cache_that_can_be_shared(tiny_model, setting):
    expected = decode_all(tiny_model, FEW)
    assert can_be_shared(tiny_model)
    for name, value in setting.items():
        setattr(tiny_model.generation_config, name, value)
    assert not can_be_shared(tiny_model)
    assert decode_all(tiny_model, FEW) == expected


@pytest.mark.parametrize("kind", ["bloom", "deepseek_v3", "gpt2", "mistral", "jamba"])
def test_other_bases(kind):
    """ALiBi, latent attention, absolute positions; a sliding window and a recurrent state, which are not shared."""
    base = next(base for base in BASES if base.model_type == kind)
    model = DeRaModel.from_peft(adapt(make_base(base), target_modules=base.targets, layers_to_transform=[2, 3]))
    prompts = [[5, 6, 7, 8, 9, 10, 11], [9, 10, 3], [12]]
    requests = [Request(index, lam, sample) for index in range(3) for lam in LAMBDAS for sample in range(2)]

    def run() -> dict[Request, list[int]]:
        batches = decode(model, make_tokenizer(), prompts, requests, Sampling(max_new_tokens=5), 7)
        return {completion.request: completion.tokens for batch in batches for completion in batch}

    assert can_be_shared(model) == (kind not in ("mistral", "jamba"))
    shared = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "can_be_shared", lambda model: False)
        assert run() == shared


def test_a_batch_holds_no_more_tokens_than_its_budget(tiny_model, monkeypatch):
    expected, real, sizes = decode_all(tiny_model, FEW), batching._decode_batch, []

    def record(model, tokenizer, prompts, batch, *args):
        sizes.append((len(batch), max(prompts.length(request.index) for request in batch)))
        return real(model, tokenizer, prompts, batch, *args)

    monkeypatch.setattr(batching, "_decode_batch", record)
    assert decode_all(tiny_model, FEW, batch_tokens=70) == expected
    assert all(size * (length + 4) <= 70 for size, length in sizes)
    assert sizes[0][0] < max(sizes)[0], "more of the shorter ones"
    sizes.clear()
    assert decode_all(tiny_model, FEW, batch_tokens=1) == expected
    assert {size for size, _ in sizes} == {1}


def test_too_little_memory_halves_the_tokens_and_says_so(tiny_model, monkeypatch, caplog):
    expected, real, sizes = decode_all(tiny_model, FEW), batching._decode_batch, []

    def short_of_memory(model, tokenizer, prompts, batch, *args):
        if len(batch) > 5:
            raise torch.OutOfMemoryError("no")
        sizes.append(len(batch))
        return real(model, tokenizer, prompts, batch, *args)

    monkeypatch.setattr(batching, "_decode_batch", short_of_memory)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    assert decode_all(tiny_model, FEW) == expected
    assert max(sizes) > 2
    assert "out of memory: going on with half as many tokens at once" in caplog.text


def test_too_little_memory_to_keep_prompts(tiny_model, monkeypatch):
    expected = decode_all(tiny_model, FEW)

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(batching, "Prefill", out_of_memory)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    assert decode_all(tiny_model, FEW) == expected


def test_a_request_has_a_lambda_where_the_model_has(tiny_model):
    for model, lam in ((tiny_model, None), (tiny_model.base, 0.5)):
        with pytest.raises(DeRaError, match=f"lam={lam}.*a request has a λ where"):
            next(decode(model, make_tokenizer(), [[5]], [Request(0, lam)], Sampling(), 1))


def test_too_little_memory_for_one_is_an_error(run, monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(batching, "_decode_batch", out_of_memory)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    with pytest.raises(DeRaError, match="out of memory for a single prompt"):
        run()
