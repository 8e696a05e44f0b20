"""`DeRaModel.generate` against two whole models decoded without a cache, in fp32."""

import pytest
import torch
from scipy import stats
from transformers import (
    AutoTokenizer,
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TextStreamer,
    pipeline,
)
from two_models import TwoModels, decode_by_hand, load_two

from dera_peft import DeRaError, DeRaModel

PROMPTS = ["The old lighthouse", "A fox crossed the frozen river and", "Rain", "My sister repairs"]
LAM = [0.0, 0.5, 1.0, 1.5]
STEPS = 16


class Setting:
    """One model both ways: `model` is DeRa's, `mixture` the two whole models with the batch's λ."""

    def __init__(self, base, adapter):
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        self.inputs = self.tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
        assert (self.inputs.attention_mask == 0).any()
        self.reference, self.aligned = load_two(base, adapter)
        self.model = DeRaModel.from_pretrained(base, adapter)
        greedy = [self.by_hand([lam] * 4)[1].tolist() for lam in (0.0, 1.0)]
        assert greedy[0] != greedy[1], "the branches must decode other texts for a comparison to mean something"

    def mixture(self, lam=LAM, expand=1) -> TwoModels:
        return TwoModels(self.reference, self.aligned, torch.tensor(lam).repeat_interleave(expand)[:, None, None])

    def by_hand(self, lam=LAM, **kwargs) -> torch.Tensor:
        return decode_by_hand(self.mixture(lam), **self.inputs, steps=STEPS, **kwargs)

    def generate(self, lam=LAM, **kwargs) -> torch.Tensor:
        """The new tokens; an end token ends nothing, so that all rows have the same length."""
        kwargs = {"max_new_tokens": STEPS, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, **kwargs}
        return self.model.generate(**self.inputs, lam=lam, **kwargs)[:, self.inputs.input_ids.shape[1] :]

    def generate_with_two_models(self, lam=LAM, expand=1, **kwargs) -> torch.Tensor:
        kwargs = {"max_new_tokens": STEPS, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, **kwargs}
        sequences = self.mixture(lam, expand).generate(**self.inputs, use_cache=False, **kwargs)
        return sequences[:, self.inputs.input_ids.shape[1] :]


@pytest.fixture(scope="module", params=["tiny", "top", "stories"])
def setting(request):
    if request.param == "stories":
        return Setting(request.getfixturevalue("stories"), request.getfixturevalue("stories_adapter"))
    return Setting(request.getfixturevalue("tiny_base"), request.getfixturevalue(f"{request.param}_adapter"))


def test_greedy(setting):
    assert setting.generate().tolist() == setting.by_hand().tolist()


@pytest.mark.parametrize("lam", [-0.5, 0, 1 / 6, 2 / 3, 1, 3])
def test_greedy_at_one_lam_for_all(setting, lam):
    assert setting.generate(lam).tolist() == setting.by_hand([lam] * 4).tolist()


def test_sampling_with_a_seed(setting):
    torch.manual_seed(7)
    expected = setting.by_hand(sample=True)
    torch.manual_seed(7)
    assert setting.generate(do_sample=True, top_k=0).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({"num_beams": 4}, id="beams"),
        pytest.param({"num_beams": 4, "num_return_sequences": 3}, id="beams, several returned"),
        pytest.param({"num_beams": 3, "do_sample": True, "top_k": 20, "temperature": 0.7}, id="beam sampling"),
        pytest.param({"num_return_sequences": 3, "do_sample": True, "top_p": 0.9}, id="return sequences"),
    ],
)
def test_expanded_batches(setting, kwargs):
    expand = kwargs.get("num_beams", kwargs.get("num_return_sequences"))
    torch.manual_seed(3)
    expected = setting.generate_with_two_models(expand=expand, **kwargs)
    torch.manual_seed(3)
    assert setting.generate(**kwargs).tolist() == expected.tolist()


def test_beams_of_each_prompt_alone(setting):
    """Padding and the rows of the other λ change nothing: each prompt decoded by two models with no padding at all."""
    together = setting.generate(num_beams=4)
    for index, prompt in enumerate(PROMPTS):
        inputs = setting.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        alone = setting.mixture([LAM[index]]).generate(
            **inputs,
            num_beams=4,
            max_new_tokens=STEPS,
            eos_token_id=None,
            pad_token_id=0,
            do_sample=False,
            use_cache=False,
        )
        assert together[index].tolist() == alone[0, inputs.input_ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "kwargs", [{"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 3}], ids=str
)
def test_caches(setting, kwargs):
    assert setting.generate(**kwargs).tolist() == setting.by_hand().tolist()


@pytest.mark.parametrize("setting", ["tiny", "top"], indirect=True)  # fork at the input, and above
def test_the_decode_step_is_one_graph_for_every_lam(setting):
    """Compiled with a static cache: no break in the graph, and another λ with the same rows compiles nothing anew."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(backend=count, fullgraph=True, mode=None)
    config._compile_all_devices = True
    for lam in ([0.0, 0.5, 1.0, 1.5], [0.0, 0.7, 1.0, -1.0]):
        found = setting.generate(lam, cache_implementation="static", compile_config=config)
        assert found.tolist() == setting.by_hand(lam).tolist()
        assert len(graphs) == 1


@pytest.mark.parametrize("setting", ["top"], indirect=True)  # rows of both numbers
def test_a_prefill_in_compiled_chunks_finds_its_static_cache_made(setting, monkeypatch):
    """Made in a compiled region, its buffers would not be known to be static, and a CUDA graph could not use them."""
    torch._dynamo.reset()
    config = CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True
    prepare, rows = setting.model._prepare_static_cache, []

    def seen(*args, **kwargs):
        cache = prepare(*args, **kwargs)
        rows.extend(layer.keys.shape[0] if layer.is_initialized else None for layer in cache.layers)
        return cache

    monkeypatch.setattr(setting.model, "_prepare_static_cache", seen)
    chunk = -(-setting.inputs.input_ids.shape[1] // 2)  # each shape is compiled
    found = setting.generate(cache_implementation="static", prefill_chunk_size=chunk, compile_config=config)
    assert found.tolist() == setting.by_hand().tolist()
    fork = setting.model.fork_layer  # λ = 0, 0.5, 1, 1.5: six rows
    assert rows == [4] * fork + [6] * (len(rows) - fork)


def test_static_cache_with_beams(setting):
    expected = setting.generate_with_two_models(expand=3, num_beams=3)
    assert setting.generate(num_beams=3, cache_implementation="static").tolist() == expected.tolist()


def test_prompt_lookup(setting):
    ids = setting.tokenizer("Rain fell. Rain fell. Rain", return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    for lam in (0.0, 0.5, 1.5):
        expected = decode_by_hand(setting.mixture([lam]), ids, mask, STEPS)
        found = setting.model.generate(
            ids,
            attention_mask=mask,
            lam=lam,
            prompt_lookup_num_tokens=3,
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=None,
        )
        assert found[:, ids.shape[1] :].tolist() == expected.tolist()


def test_streamer(setting, capsys):
    ids = setting.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    tokens = setting.model.generate(
        ids,
        lam=0.5,
        streamer=TextStreamer(setting.tokenizer, skip_prompt=True),
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
    )[0, ids.shape[1] :]
    assert capsys.readouterr().out.strip() == setting.tokenizer.decode(tokens).strip()


def test_stop_strings(setting):
    ids = setting.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    expected = decode_by_hand(setting.mixture([0.5]), ids, torch.ones_like(ids), STEPS)[0].tolist()
    position, stop = next(
        (index, text)
        for index, token in enumerate(expected)
        if (text := setting.tokenizer.decode(token).strip()).isascii() and text
    )
    found = setting.model.generate(
        ids,
        lam=0.5,
        stop_strings=[stop],
        tokenizer=setting.tokenizer,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
    )[0, ids.shape[1] :].tolist()
    assert found == expected[: position + 1]


def test_a_banned_token_stays_away(setting):
    banned = setting.by_hand()[:, 0].tolist()
    ban = LogitsProcessorList([SuppressTokensLogitsProcessor(banned)])
    found = setting.generate(logits_processor=ban)
    assert found.tolist() == setting.generate_with_two_models(logits_processor=ban).tolist()
    assert not set(found.flatten().tolist()) & set(banned)


def test_pipeline(setting):
    generate = pipeline("text-generation", model=setting.model, tokenizer=setting.tokenizer)
    texts = generate(PROMPTS[:1], lam=0.5, max_new_tokens=STEPS, do_sample=False, return_full_text=False)
    ids = setting.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    expected = setting.mixture([0.5]).generate(ids, max_new_tokens=STEPS, do_sample=False, use_cache=False)
    decoded = setting.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert texts[0][0]["generated_text"].strip() == decoded.strip()


def test_lam_as_it_may_be_written(setting):
    expected = setting.generate(0.5).tolist()
    for lam in (torch.tensor(0.5), [0.5] * 4, torch.tensor([0.5] * 4), torch.full((4, 1), 0.5), {"aligned": 0.5}):
        assert setting.generate(lam).tolist() == expected


def test_lam_from_the_generation_config(setting):
    config = GenerationConfig(max_new_tokens=STEPS, do_sample=False, lam=0.5)
    half, zero = (
        setting.model.generate(**setting.inputs, lam=lam, max_new_tokens=STEPS, do_sample=False).tolist()
        for lam in (0.5, 0.0)
    )
    assert half != zero
    assert setting.model.generate(**setting.inputs, generation_config=config).tolist() == half
    assert setting.model.generate(**setting.inputs, generation_config=config, lam=0.0).tolist() == zero, (
        "the argument wins"
    )


def test_defaults(tiny_base, tiny_adapter):
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter, lam=0.5)
    ids = torch.arange(3, 9).view(1, 6)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    half, zero = (model.generate(ids, lam=lam, **kwargs).tolist() for lam in (0.5, 0.0))
    assert half != zero
    assert model.generate(ids, **kwargs).tolist() == half
    model.generation_config.lam = 0.0
    assert model.generate(ids, **kwargs).tolist() == zero


@pytest.mark.parametrize("lam", [[0.5, 1.0], [0.5] * 8, [0.5] * 5])
def test_the_wrong_number_of_lambdas_is_an_error_also_when_it_divides_the_beams(setting, lam):
    with pytest.raises(DeRaError, match=rf"lam has shape \[{len(lam)}, 1\].*\[4, 1\]"):
        setting.generate(lam, num_beams=2)


def test_a_mistyped_argument_is_an_error(setting):
    with pytest.raises(ValueError, match="lamb"):
        setting.generate(lamb=0.5)


@torch.no_grad()
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_five_rows_for_0_half_1_1(setting, kwargs):
    """Prefill and every step: as many rows as the λ need, below and above the fork."""
    model, beams = setting.model, kwargs.get("num_beams", 1)
    rows: list[list[int]] = []
    handles = []
    for layer in (model.base.model.layers[0].mlp, model.base.model.layers[-1].mlp):
        calls: list[int] = []
        rows.append(calls)
        handles.append(
            layer.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(args[0].shape[0]))
        )
    for lam, branch_rows in (([0.0, 0.5, 1.0, 1.0], 5), ([0.0] * 4, 4), (1, 4), (0.5, 8)):
        for calls in rows:
            calls.clear()
        setting.generate(lam, **kwargs)
        assert rows[0] == [(4 if model.fork_layer > 0 else branch_rows) * beams] * STEPS
        assert rows[1] == [branch_rows * beams] * STEPS
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_first_token_frequencies(setting):
    """20,000 samples against softmax(z_λ) of the two models."""
    ids = setting.tokenizer(PROMPTS[2], return_tensors="pt").input_ids
    exact = setting.mixture([0.6])(ids).logits[0, -1].softmax(-1).double()
    at_0, at_1 = (setting.mixture([lam])(ids).logits[0, -1].softmax(-1) for lam in (0.0, 1.0))
    assert min((exact - p).abs().sum() for p in (at_0, at_1)) > 0.1, "the mixture must differ from both ends"
    torch.manual_seed(0)
    tokens = torch.cat(
        [
            setting.model.generate(ids, lam=0.6, do_sample=True, top_k=0, max_new_tokens=1, num_return_sequences=2000)[
                :, -1
            ]
            for _ in range(10)
        ]
    )
    observed = torch.bincount(tokens, minlength=len(exact)).double()
    expected = exact * len(tokens)
    common = expected >= 5  # the rest in one cell, as the chi-square approximation wants
    observed = torch.cat([observed[common], observed[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    p_value = stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue
    assert p_value > 0.001


def test_what_would_decode_without_lam_is_refused(setting):
    with pytest.raises(DeRaError, match="assistant_model"):
        setting.generate(assistant_model=setting.reference)
    assert setting.generate(guidance_scale=1.0).tolist() == setting.generate().tolist()
