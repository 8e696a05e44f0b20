"""Random numbers by (seed, prompt, sample), and samples that follow the distribution."""

import pytest
import torch
from scipy import stats

from dera_peft import DeRaError
from dera_peft.decoding.sampling import Sampling
from dera_peft.decoding.warpers import logits_processor
from dera_peft.engine.noise import (
    GAMMA,
    MASK,
    GumbelMax,
    _signed,
    _splitmix64,
    gumbel_noise,
    row_key,
    splitmix64,
)

# the published first outputs of splitmix64 from seed 0 (Vigna's reference implementation)
SEED_0 = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]


def test_splitmix64_gives_its_published_numbers():
    states = [(step * GAMMA) & MASK for step in range(1, 5)]
    assert [splitmix64(state) for state in states] == SEED_0
    tensor = _splitmix64(torch.tensor([_signed(state) for state in states]))
    assert [value & MASK for value in tensor.tolist()] == SEED_0


def test_keys_differ_by_seed_prompt_and_sample():
    keys = {row_key(seed, prompt, sample) for seed in range(4) for prompt in range(50) for sample in range(50)}
    assert len(keys) == 4 * 50 * 50


def test_noise_is_standard_gumbel_and_independent_of_the_batch():
    keys = torch.tensor([_signed(row_key(0, prompt, 0)) for prompt in range(40)])
    noise = gumbel_noise(keys, step=3, vocabulary=500)
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 0.001
    assert torch.equal(gumbel_noise(keys[7:8], 3, 500)[0], noise[7])
    assert not torch.equal(gumbel_noise(keys, 4, 500), noise)
    rows = torch.corrcoef(noise)
    assert (rows - torch.eye(40)).abs().max() < 0.25, "rows are independent"


def test_the_largest_noise_is_precise():
    """Of a uniform float near 1 few bits are left; of the noise above 9, which decides most samples, none are lost."""
    keys = torch.tensor([_signed(row_key(1, prompt, 0)) for prompt in range(2000)])
    draws = (gumbel_noise(keys, step, 1000) for step in range(10))
    noise = torch.cat([draw[draw > 9] for draw in draws])
    assert len(noise.unique()) > 0.99 * len(noise), "no grid"
    assert stats.kstest((noise - 9).double().numpy(), "expon").pvalue > 0.001, "the tail is e^-x"


def test_samples_follow_the_softmax():
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf"), 0.5]).repeat(20_000, 1)
    keys = [row_key(0, prompt, 0) for prompt in range(20_000)]
    sampled = GumbelMax(keys, prompt_length=5)(torch.zeros(20_000, 6), scores)
    assert (sampled[:, 4] == float("-inf")).all()
    observed = torch.bincount(sampled.argmax(-1), minlength=6)[[0, 1, 2, 3, 5]]
    expected = scores[0, [0, 1, 2, 3, 5]].double().softmax(-1) * 20_000
    assert stats.chisquare(observed, expected).pvalue > 0.001


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot' must be a finite number"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5 must be an integer"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": 1.0}, "min_p=1.0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(DeRaError, match=message):
        Sampling(**settings)


def test_greedy_adds_nothing_and_every_setting_its_warper():
    assert len(logits_processor(Sampling(temperature=0.0), [1], 3, [0])) == 0
    warpers = logits_processor(
        Sampling(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2), [1], 3, [0]
    )
    assert [type(warper).__name__ for warper in warpers] == [
        "RepetitionPenaltyLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "GumbelMax",
    ]


def test_padding_is_no_text_to_the_repetition_penalty():
    """A row is penalised for its own tokens: with two tokens of padding as it is without."""
    scores = torch.tensor([[1.0, -1.0, 2.0, 0.5]])
    sampling = Sampling(temperature=0.0, repetition_penalty=2.0)
    alone = logits_processor(sampling, [1], 2, [0])(torch.tensor([[2, 1]]), scores.clone())
    padded = logits_processor(sampling, [1], 4, [2])(torch.tensor([[0, 0, 2, 1]]), scores.clone())
    assert alone.tolist() == padded.tolist() == [[1.0, -2.0, 1.0, 0.5]]
