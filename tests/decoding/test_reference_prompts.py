"""Decoding and scoring where the reference reads prompts of its own, against two models, one sequence at a time."""

import pytest
import torch
from compatibility import BASES, VOCABULARY
from tiny_bases import make_base
from two_models import last_logits

from dera_peft import DeRaError
from dera_peft.decoding.batching import decode
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.decoding.scoring import score
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.plan import WITHOUT_ADAPTERS

LAMBDAS = [0.0, 0.5, 1.0, 3.0]
SAMPLING = Sampling(max_new_tokens=5, temperature=0)


class Numbers:
    """A tokenizer whose texts are numbers."""

    pad_token_id = 0

    def decode(self, token_ids, skip_special_tokens=False):
        return " ".join(map(str, token_ids))


@pytest.fixture(scope="module")
def base():
    model = make_base(BASES[0])
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def model(base):
    other = make_base(BASES[0])
    other.generation_config.eos_token_id = None
    return MixtureModel(other, WITHOUT_ADAPTERS)


def make_prompts(lengths: list[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


PROMPTS, REFERENCE = make_prompts([3, 9, 5], 1), make_prompts([8, 2, 5], 2)


@torch.no_grad()
def by_hand(base, prompt: list[int], reference: list[int], lam: float) -> list[int]:
    new: list[int] = []
    for _ in range(SAMPLING.max_new_tokens):
        z_aligned, z_ref = (
            last_logits(base, ids := torch.tensor([[*each, *new]]), torch.ones_like(ids))
            for each in (prompt, reference)
        )
        new.append(int(((1 - lam) * z_ref + lam * z_aligned).argmax()))
    return new


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("samples", [1, 2], ids=["each once", "shared prompts"])
def test_decode(base, model, batch_size, samples):
    requests = [
        Request(index, lam, sample) for index in range(3) for lam in LAMBDAS[: 2 * samples] for sample in range(samples)
    ]
    batches = decode(model, Numbers(), PROMPTS, requests, SAMPLING, batch_size, reference_prompts=REFERENCE)
    found = {each.request: each.tokens for batch in batches for each in batch}
    assert found == {r: by_hand(base, PROMPTS[r.index], REFERENCE[r.index], r.lam) for r in requests}
    assert len({tuple(tokens) for tokens in found.values()}) > 3


def test_a_sample_is_the_same_in_every_batch(model):
    requests = [Request(index, 2.0, sample) for index in range(3) for sample in range(2)]
    drawn = []
    for batch_size in (1, 6):
        sampling = Sampling(max_new_tokens=5, seed=3)
        batches = decode(model, Numbers(), PROMPTS, requests, sampling, batch_size, reference_prompts=REFERENCE)
        drawn.append({each.request: each.tokens for batch in batches for each in batch})
    assert drawn[0] == drawn[1]


@torch.no_grad()
def test_score(base, model):
    completions = make_prompts([4, 1, 6], 3)
    scored = score(model, PROMPTS, completions, LAMBDAS, top=2, reference_prompts=REFERENCE)
    for prompt, reference, completion, found in zip(PROMPTS, REFERENCE, completions, scored, strict=True):
        z_aligned, z_ref = (
            base(torch.tensor([[*each, *completion]])).logits[0, len(each) - 1 : -1] for each in (prompt, reference)
        )
        for place, lam in enumerate(LAMBDAS):
            log_p = ((1 - lam) * z_ref + lam * z_aligned).log_softmax(-1)
            expected = log_p.gather(-1, torch.tensor(completion)[:, None])[:, 0]
            kl = (log_p.exp() * (log_p - z_ref.log_softmax(-1))).sum(-1)
            torch.testing.assert_close(found.log_p[place], expected, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(found.kl[place], kl, atol=2e-4, rtol=1e-4)
        assert found.kl[-1].max() > 0.5
        assert found.best["reference"][0].tolist() == z_ref.topk(2).indices.tolist()
        assert found.best["aligned"][0].tolist() == z_aligned.topk(2).indices.tolist()


def test_what_is_missing(model):
    with pytest.raises(DeRaError, match="give reference_prompts"):
        score(model, PROMPTS, PROMPTS, [1.0])
    with pytest.raises(DeRaError, match=r"reference_prompts\[1\] is empty"):
        score(model, PROMPTS, PROMPTS, [1.0], reference_prompts=[[1], [], [2]])
    with pytest.raises(DeRaError, match="2 reference_prompts and 3 completions"):
        score(model, PROMPTS, PROMPTS, [1.0], reference_prompts=[[1], [2]])
    with pytest.raises(DeRaError, match="None where they do not"):
        next(decode(model, Numbers(), PROMPTS, [Request(0, 1.0)], SAMPLING))
