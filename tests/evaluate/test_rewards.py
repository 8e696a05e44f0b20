"""Rewards from a user's file."""

import pytest

from dera_peft import DeRaError
from dera_peft.evaluate.rewards import load_reward, score

FILE = """
def length(prompts, completions, **columns):
    return [len(completion) for completion in completions]

def weighted(prompts, completions, weight, **columns):
    return [w * len(c) for w, c in zip(weight, completions)]

def broken(prompts, completions, **columns):
    raise KeyError("oops")

def short(prompts, completions, **columns):
    return [0.0]

def nan(prompts, completions, **columns):
    return [float("nan")] * len(completions)

number = 3
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "rewards.py").write_text(FILE)
    return tmp_path / "rewards.py"


def test_rewards_and_columns(file):
    assert score(load_reward(f"{file}:length"), ["a", "b"], ["xy", "xyz"]) == [2.0, 3.0]
    assert score(load_reward(f"{file}:weighted"), ["a", "b"], ["xy", "xyz"], {"weight": [10, 100]}) == [20.0, 300.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "'broken' raised KeyError"),
        ("short", "'short' gave 1 values for 2"),
        ("nan", "'nan' gave nan for the completion 'xy'"),
        ("weighted", "missing 1 required"),
    ],
)
def test_a_reward_that_fails_is_named(file, name, message):
    with pytest.raises(DeRaError, match=message):
        score(load_reward(f"{file}:{name}"), ["a", "b"], ["xy", "xyz"])


def test_what_is_not_a_reward(file):
    with pytest.raises(DeRaError, match="not a function"):
        load_reward(f"{file}:number")
    with pytest.raises(DeRaError, match="has no 'lenght'"):
        load_reward(f"{file}:lenght")
    with pytest.raises(DeRaError, match="there is no file"):
        load_reward("nowhere.py:length")
    with pytest.raises(DeRaError, match="does not name a Python object"):
        load_reward("length")
