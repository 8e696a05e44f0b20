"""Completions of a server: the rows of a model in this process, and servers that are not what they should be."""

import json
import threading
from pathlib import Path

import httpx2
import pytest
from served import Gone, running, standin
from tiny_models import make_adapter

from dera_peft.cli.generate import GenerateSettings, generate
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.engine.noise import row_key, seed_of
from dera_peft.errors import DeRaError
from dera_peft.evaluate import SweepConfig, sweep
from dera_peft.evaluate.check import check
from dera_peft.remote import endpoint
from dera_peft.remote.forms import read_completion
from dera_peft.serve.server import make_service
from dera_peft.serve.settings import ServeSettings

TEXTS = ["Rain fell on the market", "A fox crossed", "My sister", "The old lighthouse keeper counted"]
LAMBDAS = (0.0, 1 / 3, 1.5, -0.25)


@pytest.fixture
def model(tiny_base, tiny_adapter) -> dict:
    return {"base": str(tiny_base), "adapter": str(tiny_adapter)}


@pytest.fixture
def rows(tmp_path, model):
    """Runs `dera generate`; returns its rows, in the order of prompts, λ and samples."""
    made = []

    def rows(**settings) -> list[dict]:
        made.append(settings.pop("output", None) or tmp_path / f"{len(made)}.jsonl")
        settings = {"prompt": TEXTS, "lambdas": LAMBDAS, "max_new_tokens": 12, **model, **settings}
        generate(GenerateSettings(**settings, output=made[-1]))
        return read(made[-1])

    return rows


def read(file: Path) -> list[dict]:
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(found, key=lambda row: (row["prompt_index"], str(row["lambda"]), row["sample"]))


def texts_by_lambda(rows: list[dict]) -> set:
    return {tuple(row["token_ids"]) for row in rows}


def test_a_seed_that_draws_as_any_prompt_and_sample():
    for seed, prompt, sample in [(0, 0, 0), (7, 3, 1), (2**64 - 1, 10**6, 63)]:
        key = row_key(seed, prompt, sample)
        assert row_key(seed_of(key), 0, 0) == key


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"samples": 3, "max_new_tokens": 40, "seed": 5},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "concurrency": 3},
        {"lambdas": (2.0, 3.0), "combine": "plausible:0.2", "temperature": 0.0},
        {"lambdas": (), "lambda_schedule": {0: 2.0, 5: 0.1}, "temperature": 0.0},
    ],
    ids=["greedy", "sampled", "warped", "rule", "schedule"],
)
def test_rows_are_those_of_the_model_in_this_process(rows, remote_server, settings):
    there = rows(endpoint=f"{remote_server.url}/v1/", **settings)
    here = rows(**{name: value for name, value in settings.items() if name != "concurrency"})
    assert len({tuple(row["token_ids"]) for row in here}) > len(TEXTS), "λ, samples or places change nothing"
    assert there == here
    if settings.get("samples") == 3:
        assert {row["finish_reason"] for row in here} == {"eos", "length"}
    if "combine" in settings or "lambda_schedule" in settings:
        assert all(len(row["token_lambda"]) == len(row["token_ids"]) for row in here)


def test_several_adapters_and_a_base_alone(rows, tiny_base, tiny_adapter, top_adapter):
    adapters = {"kind": str(tiny_adapter), "brief": str(top_adapter)}
    lambdas = ({"kind": 0.5, "brief": 1.25}, {"kind": 0.0, "brief": 0.0}, {"kind": 1 / 3, "brief": -0.5})
    several = {"adapter": None, "adapters": adapters, "lambdas": lambdas, "prompt": TEXTS[:2], "temperature": 0.0}
    settings = ServeSettings(base=str(tiny_base), adapter=tuple(f"{name}={path}" for name, path in adapters.items()))
    with running(make_service(settings), settings) as server:
        there = rows(endpoint=server.url, **several)
        with pytest.raises(DeRaError, match="serves another model than .*: it has the branches"):
            rows(endpoint=server.url)
    assert there == rows(**several)
    assert len({tuple(row["token_ids"]) for row in there}) > 2
    alone = {"adapter": None, "lambdas": (), "prompt": TEXTS[:2]}
    settings = ServeSettings(base=str(tiny_base))
    with running(make_service(settings), settings) as server:
        assert rows(endpoint=server.url, **alone) == rows(**alone)
