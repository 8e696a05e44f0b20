"""Samples of the exact mixture, against a model whose completions can be listed, and against whole passes."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from compatibility import BASES, ENCODER_DECODERS, LINEAR
from peft import LoraConfig, get_peft_model
from tiny_bases import adapt, make_base
from tiny_models import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from dera_peft import DeRaError, DeRaModel
from dera_peft.engine.exact import sample_exact
from dera_peft.engine.noise import row_key
from dera_peft.engine.padding import pad
from dera_peft.user_code import load_object

ROOT = Path(__file__).parents[2]
VOCABULARY, END, LIMIT = 4, 3, 4
PROMPT = [1, 2, 1]
SAMPLES = 1500
# what can be drawn: completions with the end token, and those of the limit's length
COMPLETIONS = [
    tokens
    for length in range(1, LIMIT + 1)
    for tokens in itertools.product(range(VOCABULARY), repeat=length)
    if END not in tokens[:-1] and (tokens[-1] == END or length == LIMIT)
]


class Listed:
    """A model of four tokens with two adapters, and the log-probabilities `[C]` and `[C, T, V]` of all completions."""

    @torch.no_grad()
    def __init__(self):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=32,
            initializer_range=0.7,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=0,
        )
        modules = ["q_proj", "v_proj", "up_proj", "down_proj"]
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM")
        peft_model = get_peft_model(LlamaForCausalLM(config).eval(), lora, "one")
        peft_model.add_adapter("two", lora)
        torch.manual_seed(1)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.4)
        self.peft_model = peft_model.eval()
        ids = torch.tensor([[*PROMPT, *tokens, *[0] * (LIMIT - len(tokens))] for tokens in COMPLETIONS])
        self.log_p = {}
        for name in ("one", "two"):
            peft_model.set_adapter(name)
            self.log_p[name] = self.read(ids)
        with peft_model.disable_adapter():
            self.log_p["reference"] = self.read(ids)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        attention = torch.ones_like(ids)
        logits = self.peft_model(ids, attention_mask=attention).logits[:, len(PROMPT) - 1 : -1]
        return logits.double().log_softmax(-1)

    def of_completions(self, log_p: torch.Tensor) -> torch.Tensor:
        sums = [sum(log_p[place, t, v] for t, v in enumerate(tokens)) for place, tokens in enumerate(COMPLETIONS)]
        return torch.stack(sums)

    def mixed(self, lam: dict[str, float]) -> torch.Tensor:
        """`[C, T, V]`, log Π_k p_k^w_k, which is not normalized."""
        weights = {**lam, "reference": 1 - sum(lam.values())}
        return sum(weights[name] * self.log_p[name] for name in weights)


@pytest.fixture(scope="module")
def listed():
    return Listed()


def frequencies(samples) -> torch.Tensor:
    places = {tokens: place for place, tokens in enumerate(COMPLETIONS)}
    drawn = torch.tensor([places[tuple(sample.tokens)] for sample in samples])
    return torch.bincount(drawn, minlength=len(COMPLETIONS)) / len(samples)


def distance(p: torch.Tensor, q: torch.Tensor) -> float:
    """Total variation."""
    return (p - q).abs().sum().item() / 2


@pytest.mark.parametrize(
    ("lam", "are_uneven"), [({"one": 1.7}, True), ({"one": -0.7}, False), ({"one": 0.9, "two": 0.9}, True)], ids=str
)
def test_samples_follow_the_exact_mixture_and_log_z_has_no_bias(listed, lam, are_uneven):
    mixed = listed.mixed(lam)
    unnormalized = listed.of_completions(mixed)
    log_z, exact = unnormalized.logsumexp(0).item(), unnormalized.softmax(0)
    by_token = listed.of_completions(mixed.log_softmax(-1)).exp()
    assert by_token.sum().item() == pytest.approx(1, abs=1e-5), "every completion is listed"
    torch.manual_seed(0)
    drawn = [torch.bincount(torch.multinomial(exact, SAMPLES, True), minlength=len(exact)) for _ in range(400)]
    floor = sorted(distance(counts / SAMPLES, exact) for counts in drawn)
    assert distance(by_token, exact) > 1.5 * floor[-1], "token by token is measurably something else"

    model = DeRaModel.from_peft(listed.peft_model, list(lam))
    try:
        prompts, keys = torch.tensor([PROMPT] * SAMPLES), [row_key(0, place, 0) for place in range(SAMPLES)]
        one, sixteen = (sample_exact(model, prompts, n, keys, lam=lam, max_new_tokens=LIMIT) for n in (1, 16))
    finally:
        model.unwrap()
    assert any(sample.resamplings for sample in sixteen) == are_uneven

    assert distance(frequencies(sixteen), exact) < floor[-4], "99 % of as many exact samples"
    assert distance(frequencies(one), exact) > floor[-1]
    for samples in (one, sixteen):
        ratios = torch.tensor([math.exp(sample.log_z - log_z) for sample in samples])
        assert ratios.mean().item() == pytest.approx(1, abs=4 * ratios.std().item() / SAMPLES**0.5)
    # of one particle the log Z_t are added up along token-level samples: KL(token-level || exact) is what they lack
    lacks = torch.tensor([log_z - sample.log_z for sample in one], dtype=torch.float64)
    kl = (by_token * (by_token.log() - exact.log())).sum().item()
    assert lacks.mean().item() == pytest.approx(kl, abs=4 * lacks.std().item() / SAMPLES**0.5)
    # the errors that single runs estimate are those that many runs have
    estimates = torch.tensor([sample.log_z_error**2 for sample in sixteen]).mean().sqrt().item()
    spread = torch.tensor([sample.log_z for sample in sixteen]).std().item()
    assert estimates == pytest.approx(spread, rel=0.25)


def test_the_example_measures_how_far_token_level_is_from_exact(listed):
    """20 prompts that happen to be the same."""
    distances = load_object(f"{ROOT}/examples/exact_mixture.py:distances")
    mixed = listed.mixed({"one": 1.7})
    by_token = listed.of_completions(mixed.log_softmax(-1))
    kl = (by_token.exp() * (by_token - listed.of_completions(mixed).log_softmax(0))).sum().item()
    model = DeRaModel.from_peft(listed.peft_model, "one")
    try:
        found = distances(model, make_tokenizer(), [PROMPT] * 20, [1.0, 1.7], 30, 8, LIMIT)
    finally:
        model.unwrap()
    assert found[1.0] == (0, 0, 0)
    estimate, half_width, spread = found[1.7]
    assert 0 < half_width < kl / 4
    assert estimate == pytest.approx(kl, abs=2 * half_width)
    assert 0 < spread < 1


# -- models with caches, prompts and branches of other kinds -----------------------------------------------------------

TEXTS = [[5, 9, 17, 23, 31], [40, 8], [11, 12, 13, 14, 15, 16, 17, 18]]
LAMBDAS = [1.8, -0.6, 1.0]


def base_of(name: str):
    return next(base for base in [*BASES, *ENCODER_DECODERS] if base.model_type == name)


def load(name: str):
    base = base_of(name)
    task = {"task_type": "SEQ_2_SEQ_LM"} if base in ENCODER_DECODERS else {}
    return adapt(make_base(base), target_modules=base.targets, **task)


@pytest.fixture(scope="module")
def llama():
    """Forked at its third layer of four."""
    return adapt(make_base(base_of("llama")), target_modules=LINEAR, layers_to_transform=[2, 3])


def draw(peft_model, particles: int, texts=TEXTS, lam=LAMBDAS, places=(0, 1, 2), **options):
    model = DeRaModel.from_peft(peft_model)
    try:
        ids, mask = pad(texts, 0, left=not model.config.is_encoder_decoder)
        keys = [row_key(3, place, 0) for place in places]
        options = {
            "attention_mask": mask,
            "lam": lam,
            "max_new_tokens": 8,
            "eos_token_id": list(range(2, 20)),
            **options,
        }
        return sample_exact(model, ids, particles, keys, **options)
    finally:
        model.unwrap()


def rounded(samples):
    return [
        (each.tokens, round(each.log_z, 3), round(each.effective_size, 2), each.resamplings, each.ancestors)
        for each in samples
    ]


@torch.no_grad()
def test_log_z_of_one_particle_is_the_sum_of_whole_passes_normalizers(llama):
    """Two passes of PEFT's model over the whole of prompt and completion; padding, λ of each and ends are DeRa's."""
    samples = draw(llama, 1)
    assert {len(sample.tokens) for sample in samples} != {8}, "or none has ended"
    for text, lam, sample in zip(TEXTS, LAMBDAS, samples, strict=True):
        ids = torch.tensor([[*text, *sample.tokens[:-1]]])
        aligned = llama(ids).logits[0, len(text) - 1 :].double().log_softmax(-1)
        with llama.disable_adapter():
            reference = llama(ids).logits[0, len(text) - 1 :].double().log_softmax(-1)
        expected = ((1 - lam) * reference + lam * aligned).logsumexp(-1)
        assert len(expected) == len(sample.tokens)
        assert sample.log_z == pytest.approx(expected.sum().item(), abs=1e-4)
        assert (sample.log_z_error, sample.effective_size, sample.resamplings) == (None, 1, 0)


def test_a_prompt_does_not_depend_on_its_batch(llama):
    together = draw(llama, 8)
    assert any(sample.resamplings for sample in together), "or no cache was reordered"
    assert draw(llama, 8) == together
    for place in range(3):
        alone = draw(llama, 8, [TEXTS[place]], LAMBDAS[place], [place])
        assert rounded(alone) == rounded(together[place : place + 1])
    assert draw(llama, 8, places=(1, 2, 3)) != together


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_at_both_ends_of_lam_token_level_is_exact(llama, lam):
    for sample in draw(llama, 4, lam=lam):
        assert (sample.log_z, sample.log_z_error, sample.effective_size) == (0, 0, 4)
        assert (sample.resamplings, sample.ancestors, sample.particles_wanted) == (0, 4, 4)


@pytest.mark.parametrize("lam", [0.5, 2.5, -1.0])
def test_the_sign_of_log_z(llama, lam):
    """By Hölder's inequality."""
    assert all((sample.log_z < 0) == (0 < lam < 1) for sample in draw(llama, 4, lam=lam))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma4_text", "bamba", "t5", "bart"])
def test_rows_of_every_kind_of_cache_follow_the_particles(name):
    """Without a cache all is computed anew from the tokens of each particle."""
    peft_model = load(name)
    options = {"max_new_tokens": 6, "eos_token_id": 2, "lam": [4.0, -3.0, 0.5]}
    cached = draw(peft_model, 6, **options)
    assert any(sample.resamplings for sample in cached), "or no cache was reordered"
    if name != "bamba":  # its state is its cache
        assert rounded(draw(peft_model, 6, use_cache=False, **options)) == rounded(cached)
    if name in ("llama", "gemma2"):
        assert rounded(draw(peft_model, 6, cache_implementation="static", **options)) == rounded(cached)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 0}, "particles=0 must be an integer of at least 1"),
        ({"particles": 2.0}, "particles=2.0"),
        ({"temperature": 0.7}, "temperature=0.7: the exact mixture is sampled at temperature 1"),
        ({"top_k": 50}, "top_k=50"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"min_p": 0.1}, "min_p=0.1"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"num_return_sequences": 2}, "num_return_sequences=2"),
        ({"do_sample": False}, "do_sample=False"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2"),
        ({"streamer": object()}, "streamer="),
        ({"logits_processor": [None]}, "logits_processor="),
        ({"generation_config": object()}, "generation_config="),
        ({"capture": True}, "capture=True"),
        ({"lam": [0.5, 1.0]}, "lam has shape"),
        ({"combine": "jsd"}, "combine='jsd'"),
        ({"lambda_schedule": {0: 2.0}}, "lambda_schedule="),
    ],
)
def test_what_would_draw_from_something_else_is_refused_by_name(llama, options, message):
    model = DeRaModel.from_peft(llama)
    try:
        with pytest.raises(DeRaError, match=message):
            model.sample_exact(torch.tensor([[5, 6]]), **{"particles": 2, "max_new_tokens": 2, **options})
    finally:
        model.unwrap()


def test_weights_that_are_mixed_have_no_branches(llama):
    model = DeRaModel.from_peft(llama, mixing="weights")
    try:
        with pytest.raises(DeRaError, match="mixing='weights'"):
            model.sample_exact(torch.tensor([[5, 6]]), particles=2)
    finally:
        model.unwrap()


def test_a_model_samples_by_its_own_defaults_and_says_when_particles_are_too_few(tiny_model, caplog):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    tiny_model.generation_config.update(temperature=0.3, top_p=0.5, do_sample=True)  # of which it takes nothing
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "do_sample": True, "num_beams": 1}
    samples = tiny_model.sample_exact(ids, particles=4, lam=3.0, seed=1, max_new_tokens=12, **neutral)
    assert samples == tiny_model.sample_exact(ids, particles=4, lam=3.0, seed=1, max_new_tokens=12)
    assert samples != tiny_model.sample_exact(ids, particles=4, lam=3.0, seed=2, max_new_tokens=12)
    wanted = max(sample.particles_wanted for sample in samples)
    assert wanted > 4
    assert f"about {wanted} particles" in caplog.text
    for sample in samples:  # of all that descend from one ancestor the error is 1, and the distance half of its square
        assert sample.kl == pytest.approx(sample.log_z_error**2 / 2)
        assert sample.particles_wanted == 4 or sample.particles_wanted >= 4 * sample.kl / 0.1
    caplog.clear()
    assert len(tiny_model.sample_exact(ids, particles=4, max_new_tokens=3)) == 2, "at the model's own λ, 1"
    assert not caplog.text
