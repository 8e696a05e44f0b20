"""
The server's engine against `generate` on every base of `compatibility.py`: what `make serve-check` runs.

    python tests/serve_check.py [--only jamba]

Of each base, with an adapter on its upper half: 16 requests of unlike lengths and λ, which join every second step, read
their prompts in chunks and are short of room. Each must have the tokens that one batched `generate` gives it, and at
least 12 of them must differ, or else nothing is shown.
"""

import argparse
import random
import time

import torch
from compatibility import BASES, VOCABULARY, Base
from tiny_bases import adapt, make_base
from tiny_models import make_tokenizer

from dera_peft import DeRaModel
from dera_peft.decoding.sampling import Sampling
from dera_peft.engine.padding import pad
from dera_peft.serve.engine import Engine
from dera_peft.serve.requests import GenerationRequest

LAMBDAS = [0.0, 0.5, 1.0, 1.5, -0.5]
MOST_NEW = 12
TIGHT = {"prefill_chunk": 4, "max_rows": 6, "max_tokens": 150, "prefix_tokens": 50}


def make_requests() -> list[GenerationRequest]:
    rng = random.Random(3)
    return [
        GenerationRequest(
            tuple(rng.choices(range(3, VOCABULARY), k=rng.randrange(1, 14))),
            LAMBDAS[i % len(LAMBDAS)],
            sampling=Sampling(temperature=0, max_new_tokens=rng.randrange(1, MOST_NEW + 1)),
            ignore_eos=True,
        )
        for i in range(16)
    ]


def generate(model: DeRaModel, requests: list[GenerationRequest]) -> list[list[int]]:
    """What one batched `generate` makes of them, `MOST_NEW` tokens each."""
    ids, mask = pad([request.prompt for request in requests], 0, left=True)
    options = {"do_sample": False, "max_new_tokens": MOST_NEW, "eos_token_id": None, "pad_token_id": 0}
    lam = [request.lam for request in requests]
    return model.generate(ids, attention_mask=mask, lam=lam, **options)[:, ids.shape[1] :].tolist()


def serve(model: DeRaModel, requests: list[GenerationRequest]) -> list[list[int]]:
    """What an engine makes of them as they join a running batch."""
    engine = Engine(model, make_tokenizer(), **TIGHT)
    handles = []
    for request in requests:
        handles.append(engine.submit(request))
        for _ in range(2):
            engine.step()
    while engine.step():
        pass
    return [handle.result(timeout=0).tokens for handle in handles]


def check(base: Base) -> str | None:
    """What is wrong with a base; None where the engine does what `generate` does."""
    requests = make_requests()
    model = DeRaModel.from_peft(adapt(make_base(base), target_modules=base.targets, layers_to_transform=[2, 3]))
    whole = generate(model, requests)
    if len(set(map(tuple, whole))) <= 12:
        return "its completions are too much alike to tell them apart"
    expected = [tokens[: one.sampling.max_new_tokens] for one, tokens in zip(requests, whole, strict=True)]
    wrong = [i for i, pair in enumerate(zip(serve(model, requests), expected, strict=True)) if pair[0] != pair[1]]
    return f"the requests {wrong} have other tokens than generate gives them" if wrong else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="BASE", help="check this model_type; can be repeated")
    only = parser.parse_args(arguments).only
    bases = [base for base in BASES if only is None or base.model_type in only]
    if not bases:
        parser.error(f"--only: no base is called {' or '.join(only)}")
    failed = 0
    for base in bases:
        start = time.monotonic()
        torch.manual_seed(0)
        try:
            problem = check(base)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        failed += problem is not None
        print(f"{base.model_type:14} {problem or 'ok'} ({time.monotonic() - start:.1f} s)", flush=True)
    print(f"{len(bases) - failed} of {len(bases)} bases are served as generate decodes them")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
