"""Bases whose rotary embeddings follow the longest position of a batch: each sequence is decoded as if alone."""

import copy

import pytest
import torch
from compatibility import COMMON, LINEAR, Base
from tiny_bases import adapt, make_base
from tiny_models import make_tokenizer
from transformers.cache_utils import DynamicCache

from dera_peft import DeRaModel
from dera_peft.decoding.batching import decode
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.decoding.scoring import score

LIMIT, NEW_TOKENS = 16, 6
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": LIMIT,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 8.0}
BASES = {
    "phi3": Base(
        "phi3",
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        {
            "sliding_window": None,
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": LIMIT,
            "max_position_embeddings": 128,
        },
        common=COMMON,
    ),
    "llama, longrope": Base("llama", LINEAR, {"rope_parameters": LONGROPE, "max_position_embeddings": 128}),
    "llama, dynamic": Base("llama", LINEAR, {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
}
# all below the limit; all above; and those that cross it while they are decoded
LENGTHS = [5, 12, 14, 14, 17, 30]
LAMBDAS = (0.0, 1.5)


def make(name):
    """The model, and the two whole ones that it mixes."""
    base = BASES[name]
    peft_model = adapt(make_base(base), target_modules=base.targets)
    aligned = copy.deepcopy(peft_model).merge_and_unload().eval()
    return DeRaModel.from_peft(peft_model), make_base(base), aligned


@torch.no_grad()
def decode_alone(models, name, prompt: list[int], lam: float) -> list[int]:
    """
    Greedy tokens of the mixture of two models, with a cache each. Phi-3 reads all anew where its embeddings change, so
    its have none. The models are copies: dynamic NTK remembers lengths.
    """
    models = copy.deepcopy(models)
    caches = [DynamicCache(config=model.config) for model in models]
    tokens, read = list(prompt), 0
    for _ in range(NEW_TOKENS):
        ids = torch.tensor([tokens])
        if name == "phi3":
            z = [model(ids, use_cache=False).logits[0, -1] for model in models]
        else:
            z = [model(ids[:, read:], past_key_values=c).logits[0, -1] for model, c in zip(models, caches, strict=True)]
        read = len(tokens)
        tokens.append(int(((1 - lam) * z[0] + lam * z[1]).argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 120, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.no_grad()
@pytest.mark.parametrize("name", BASES)
def test_decoding(name, prompts):
    model, *models = make(name)
    model.generation_config.eos_token_id = None
    expected = {
        (i, lam): decode_alone(models, name, prompt, lam) for i, prompt in enumerate(prompts) for lam in LAMBDAS
    }
    short = torch.tensor([prompts[0]])
    beside = torch.tensor([[0] * (30 - len(prompts[0])) + prompts[0], prompts[-1]])
    z = [models[0](ids, position_ids=(ids > 0).cumsum(-1) - 1).logits[0, -1] for ids in (short, beside)]
    if name != "llama, dynamic":  # where position ids are all that differs
        assert (z[0] - z[1]).abs().max() > 0.1
    requests = [Request(index, lam) for index in range(len(prompts)) for lam in LAMBDAS]
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0)
    for batch_size in (32, 1):
        found = {
            (completion.request.index, completion.request.lam): completion.tokens
            for batch in decode(model, make_tokenizer(), prompts, requests, sampling, batch_size)
            for completion in batch
        }
        assert found == expected


@torch.no_grad()
@pytest.mark.parametrize("name", BASES)
def test_scoring(name, prompts):
    """In one pass, as the base itself would read the whole sequence."""
    model, reference, aligned = make(name)
    completions = [[7, 8, 9], [10, 11]] * len(prompts)
    twice = [prompt for prompt in prompts for _ in range(2)]
    found = score(model, twice, completions, [0.0, 0.5, 1.0])
    for prompt, completion, scored in zip(twice, completions, found, strict=True):
        read = torch.tensor([[*prompt, *completion[:-1]]])
        z_ref, z_aligned = (copy.deepcopy(one)(read).logits[0, len(prompt) - 1 :] for one in (reference, aligned))
        for row, lam in enumerate((0.0, 0.5, 1.0)):
            log_p = ((1 - lam) * z_ref + lam * z_aligned).log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])
            torch.testing.assert_close(scored.log_p[row], log_p[:, 0], atol=2e-4, rtol=1e-4)
