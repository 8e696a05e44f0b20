"""
How far token-level DeRa is from the exact mixture, by λ, in nats:

    python examples/exact_mixture.py --adapter runs/tiny/dpo --prompts configs/tiny/world.py:held_out_prompts

Along a completion that DeRa draws token by token, its log Z_t add up to log(π* / π_token) + log Z. So
KL(π_token ‖ π*) = log Z - E[Σ_t log Z_t]. The mean is that of samples with one particle, and Z that of samples with
many, whose exp(log_z) has no bias.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from dera_peft import DeRaModel
from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.batching import decode
from dera_peft.decoding.prompts import encode, read_prompts
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling

NORMAL_95 = 1.96


def log_zs(
    model: DeRaModel,
    tokenizer,
    tokens: Sequence[Sequence[int]],
    lambdas: Sequence[float],
    samples: int,
    particles: int,
    sampling: Sampling,
) -> Mapping[float, torch.Tensor]:
    """`log_z` of each sample of each prompt, by λ: `[prompts, samples]`."""
    requests = [
        Request(prompt, lam, sample) for prompt in range(len(tokens)) for lam in lambdas for sample in range(samples)
    ]
    found: dict[float, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for batch in decode(model, tokenizer, tokens, requests, sampling, batch_size=128, particles=particles):
        for each in batch:
            found[each.request.lam][each.request.index].append(each.exact.log_z)
    return {lam: torch.tensor([found[lam][prompt] for prompt in range(len(tokens))]) for lam in lambdas}


def distances(
    model: DeRaModel,
    tokenizer,
    tokens: Sequence[Sequence[int]],
    lambdas: Sequence[float],
    samples: int = 4,
    particles: int = 32,
    max_new_tokens: int = 60,
) -> dict[float, tuple[float, float, float]]:
    """
    By λ: KL(token-level ‖ exact) of a completion, the half-width of its 95 % interval over the prompts, and the spread
    (standard deviation) of log Z between samples of one prompt.
    """
    settings = Sampling(max_new_tokens=max_new_tokens)
    one = log_zs(model, tokenizer, tokens, lambdas, samples, 1, settings)
    others = Sampling(max_new_tokens=max_new_tokens, seed=1)  # or the first particle would be the sample above
    many = log_zs(model, tokenizer, tokens, lambdas, samples, particles, others)
    result = {}
    for lam in lambdas:
        log_z = many[lam].logsumexp(1) - math.log(samples)
        kl = log_z - one[lam].mean(1)  # [prompts]
        result[lam] = (kl.mean().item(), NORMAL_95 * kl.std().item() / len(kl) ** 0.5, many[lam].std(1).mean().item())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="runs/tiny/dpo")
    parser.add_argument("--prompts", default="configs/tiny/world.py:held_out_prompts")
    parser.add_argument("--max-prompts", type=int, default=32)
    parser.add_argument("--lambdas", type=float, nargs="+", default=[-0.5, 0.5, 1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=60)
    given = parser.parse_args()
    source = ModelSource(adapter=given.adapter)
    prompts, tokenizer = read_prompts(given.prompts, limit=given.max_prompts), source.tokenizer()
    tokens = encode(prompts, tokenizer, source.config, given.max_new_tokens)
    found = distances(
        DeRaModel.from_source(source), tokenizer, tokens, given.lambdas, given.samples, given.particles,
        given.max_new_tokens,
    )  # fmt: skip
    print(f"{len(prompts)} prompts, {given.samples} samples, {given.particles} particles; nats a completion")
    print("     λ   KL(token-level ‖ exact)   spread of log Z")
    for lam, (kl, half_width, spread) in found.items():
        print(f"{lam:6g}   {kl:8.3f} ± {half_width:.3f}        {spread:8.3f}")


if __name__ == "__main__":
    main()
