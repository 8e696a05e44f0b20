"""λ of one adapter and of several, as texts and settings say them."""

import json
import pickle

import numpy as np
import pytest

from dera_peft import DeRaError
from dera_peft.decoding.lambdas import NamedLambda, covering, for_adapters, read_lambda, read_lambdas, unique
from dera_peft.decoding.rows import ScoredRow, from_json, to_line

ADAPTERS = ["helpful", "harmless"]
POINT = NamedLambda({"helpful": 0.7, "harmless": 0.3})


def test_a_point_is_a_key_that_equals_what_it_says():
    assert POINT == {"harmless": 0.3, "helpful": 0.7} == dict(POINT)
    assert len({POINT, NamedLambda({"harmless": 0.3, "helpful": 0.7})}) == 1
    assert len({POINT, NamedLambda({"helpful": 0.7}), NamedLambda({"helpful": 0.3, "harmless": 0.7})}) == 3
    assert (f"{POINT:g}", str(POINT), repr(POINT)) == (
        "helpful=0.7,harmless=0.3", "helpful=0.7,harmless=0.3", "{'helpful': 0.7, 'harmless': 0.3}",
    )  # fmt: skip
    assert str(NamedLambda({"a": 1 / 3})) == f"a={1 / 3}", "no digit is lost"
    assert str(NamedLambda({"a": -0.0})) == "a=0.0"
    assert pickle.loads(pickle.dumps(POINT)) == POINT
    with pytest.raises(TypeError):
        POINT["helpful"] = 1.0


def test_a_row_has_it_as_an_object():
    values = {"run": "0", "prompt_index": 0, "prompt": "a", "completion": "b", "num_tokens": 1, "log_p": -1.0}
    row = ScoredRow(lam=POINT, per_token=-1.0, perplexity=2.7, kl=0.0, **values)
    line = json.loads(to_line(row))
    assert line["lambda"] == {"helpful": 0.7, "harmless": 0.3}
    assert from_json(ScoredRow, line) == row
    for wrong in ({}, {"helpful": "much"}, {"helpful": float("nan")}, {"helpful": None}):
        with pytest.raises(TypeError):
            from_json(ScoredRow, line | {"lambda": wrong})


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["0,0.5", "1"], [0.0, 0.5, 1.0]),
        (["helpful=0.7,harmless=0.3"], [POINT]),
        (["helpful=1", " harmless = -0.5 , helpful=1e-1"], [{"helpful": 1.0}, {"harmless": -0.5, "helpful": 0.1}]),
        (["0", "helpful=1"], [0.0, {"helpful": 1.0}]),  # whether that fits, the model tells
    ],
)
def test_the_command_line(texts, expected):
    assert read_lambdas(texts) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("helpful=0.7,0.3", "'helpful=0.7,0.3': '0.3' is not of the form name=λ"),
        ("0.5,helpful=1", "'0.5' is not of the form name=λ"),
        ("=0.5", "'=0.5' is not of the form name=λ"),
        ("helpful=0.7,helpful=0.3", "names 'helpful' twice"),
        ("helpful=", "'helpful=': '' is not a number"),
        ("helpful=nan", "'nan' is not finite in fp32"),
        ("helpful=1e39", "'1e39' is not finite in fp32"),
        ("helpful=0,harmless=inf", "'inf' is not finite in fp32"),
        ("0,,1", "'0,,1': '' is not a number; write 0,0.5,1 for one adapter; for several name=λ,name=λ"),
    ],
)
def test_what_a_command_line_can_not_mean(text, message):
    with pytest.raises(DeRaError) as caught:
        read_lambdas([text])
    assert message in str(caught.value)


def test_one_is_one():
    assert read_lambda(["0.6"]) == 0.6
    assert read_lambda(["helpful=0.7,harmless=0.3"]) == POINT
    with pytest.raises(DeRaError, match="'0 1' is 2 λ, and one is wanted"):
        read_lambda(["0", "1"])


def test_names_with_lists_are_all_combinations():
    grid = unique([{"helpful": np.array([0, 0.5]), "harmless": (1, -0.0, 1.0)}, 2.0])
    assert grid == (
        {"helpful": 0.0, "harmless": 1.0}, {"helpful": 0.0, "harmless": 0.0},
        {"helpful": 0.5, "harmless": 1.0}, {"helpful": 0.5, "harmless": 0.0}, 2.0,
    )  # fmt: skip


def test_of_a_models_own_adapters():
    assert for_adapters([0.5, 0.5, 1], ["aligned"]) == (0.5, 1.0)
    assert for_adapters([{"aligned": 0.5}], ["aligned"]) == (0.5,)
    points = for_adapters([{"harmless": 0.3}, POINT, {"harmless": 0.3, "helpful": 0.0}], ADAPTERS)
    assert [list(point.items()) for point in points] == [
        [("helpful", 0.0), ("harmless", 0.3)], [("helpful", 0.7), ("harmless", 0.3)],
    ]  # fmt: skip
    for lam, message in (
        ({"helpfull": 1.0}, "λ is given for 'helpfull', which is not an aligned adapter of this model; do you mean "),
        (0.5, "p.jsonl, line 1: λ=0.5 is one number, and the model has several aligned adapters, ['helpful', 'harmle"),
        (0.0, "as helpful=0,harmless=0"),
    ):
        with pytest.raises(DeRaError) as caught:
            for_adapters([lam], ADAPTERS, "p.jsonl, line 1")
        assert message in str(caught.value)
    with pytest.raises(DeRaError, match="'helpful', which is not an aligned adapter of this model; there are aligned"):
        for_adapters([{"helpful": 1.0}], ["aligned"])


def test_a_lambda_that_needs_all_branches_of_several():
    def of(*values):
        return covering([NamedLambda(dict(zip("abc", each, strict=True))) for each in values])

    assert covering([0.3, 0.3]) == 0.3
    assert covering([0.0, 1.0]) == 0.5
    assert covering([0.0, 0.0]) == 0.0
    assert of((1, 0, 0), (0, 1, 0)) == {"a": 0.5, "b": 0.5, "c": 0.0}, "neither needs the reference"
    assert of((1, 0, 0), (0, 0, 0)) == {"a": 0.5, "b": 0.0, "c": 0.0}
    assert of((1, 0, 0), (0, 0, 0.5)) == {"a": 1 / 3, "b": 0.0, "c": 1 / 3}
