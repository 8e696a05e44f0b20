"""Rewards from a user's file, and how they are called."""

from fractions import Fraction

import numpy
import pytest
import torch
from tiny_models import make_reward_model
from transformers import AutoTokenizer

from dera_peft import DeRaError
from dera_peft.rewards.functions import call_reward, call_reward_or_mark, load_reward, load_rewards, reward_fingerprint

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

def nothing(prompts, completions, **columns):
    pass

def tensor(prompts, completions, **columns):
    import torch
    return torch.zeros(len(completions))

def huge(prompts, completions, **columns):
    return [10**400] * len(completions)

def text(prompts, completions, **columns):
    return ["1.0"] * len(completions)

number = 3
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "rewards.py").write_text(FILE)
    return tmp_path / "rewards.py"


def test_rewards_and_columns(file):
    assert call_reward(load_reward(f"{file}:length"), ["a", "b"], ["xy", "xyz"]) == [2.0, 3.0]
    assert call_reward(load_reward(f"{file}:weighted"), ["a", "b"], ["xy", "xyz"], {"weight": [10, 100]}) == [
        20.0,
        300.0,
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "'broken' raised KeyError"),
        ("short", "'short' gave 1 values for 2"),
        ("nan", "'nan' gave nan .float., which is not a finite number, for the completion 'xy'"),
        ("nothing", "'nothing' returned a NoneType: it must return a list of numbers"),
        ("tensor", "'tensor' returned a Tensor: it must return a list of numbers"),
        ("huge", "'huge' gave 1000.* .int., which is not a finite number"),
        ("text", "'text' gave 1.0 .str., which is not a finite number"),
        ("weighted", "missing 1 required"),
    ],
)
def test_a_reward_that_fails_is_named(file, name, message):
    with pytest.raises(DeRaError, match=message):
        call_reward(load_reward(f"{file}:{name}"), ["a", "b"], ["xy", "xyz"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1.0), (Fraction(1, 2), 0.5), (numpy.float32(0.5), 0.5), (numpy.float64(0.5), 0.5),
        (numpy.int64(-2), -2.0), (numpy.bool_(True), 1.0), (numpy.array(0.5), 0.5), (torch.tensor(0.5), 0.5),
        (torch.tensor(3), 3.0), (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5), (None, None),
    ],
)  # fmt: skip
def test_numbers_of_other_libraries(value, expected):
    def reward(prompts, completions):
        return [value]

    (found,) = call_reward(reward, ["p"], ["c"])
    assert (found, type(found)) == (expected, type(expected))
    assert call_reward_or_mark(reward, ["p"], ["c"], {}) == [(expected, None)]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (numpy.float32("nan"), "nan (float)"), (torch.tensor(float("inf")), "inf (float)"),
        (numpy.array([1.0]), "[1.] (ndarray)"), (1j, "1j (complex)"), (numpy.str_("1"), "1 (str)"),
    ],
)  # fmt: skip
def test_what_is_no_number(value, shown):
    fault = f"the reward 'reward' gave {shown}, which is not a finite number."

    def reward(prompts, completions):
        return [value]

    assert call_reward_or_mark(reward, ["p"], ["c"], {}) == [(None, fault)]


def test_rows_on_which_a_reward_fails_do_not_take_the_others_along(tmp_path):
    (tmp_path / "picky.py").write_text(
        "def picky(prompts, completions, answer, **columns):\n"
        "    if 'bad' in completions: raise KeyError('oops')\n"
        "    values = [float('nan') if c == 'nan' else None if c == 'none' else float(a)"
        " for c, a in zip(completions, answer)]\n"
        "    return values[1:] if 'short' in completions else values\n"
    )
    picky = load_reward(f"{tmp_path}/picky.py:picky")
    raised = "the reward 'picky' raised KeyError: 'oops'"
    nan = "the reward 'picky' gave nan (float), which is not a finite number."
    assert call_reward_or_mark(picky, ["p"] * 3, ["a", "nan", "none"], {"answer": [1, 2, 3]}) == [
        (1.0, None), (None, nan), (None, None),
    ]  # fmt: skip
    assert call_reward_or_mark(picky, ["p"] * 4, ["a", "bad", "nan", "b"], {"answer": [1, 2, 3, 4]}) == [
        (1.0, None), (None, raised), (None, nan), (4.0, None),
    ]  # fmt: skip
    short = "the reward 'picky' gave 0 values for 1 completions."
    assert call_reward_or_mark(picky, ["p"] * 2, ["short", "b"], {"answer": [1, 2]}) == [(None, short), (2.0, None)]


def test_several_rewards_have_names_of_their_own(file, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(FILE)

    def mine(prompts, completions, **columns):
        return [0.0] * len(completions)

    rewards = load_rewards([f"{file}:weighted", "length", mine, "distinct-2"])
    assert [reward.name for reward in rewards] == ["weighted", "length", "mine", "distinct-2"]
    assert [reward.metric is None for reward in rewards] == [True, False, True, False]
    assert len({reward.fingerprint for reward in rewards}) == 4
    twice = load_rewards([f"{file}:weighted", f"{other}:weighted"])
    assert [reward.name for reward in twice] == [f"{file}:weighted", f"{other}:weighted"]
    with pytest.raises(DeRaError, match="two of them are called"):
        load_rewards([mine, mine])


def test_what_is_not_a_reward(file):
    with pytest.raises(DeRaError, match="not a function"):
        load_reward(f"{file}:number")
    with pytest.raises(DeRaError, match="has no 'lenght'"):
        load_reward(f"{file}:lenght")
    with pytest.raises(DeRaError, match="there is no file"):
        load_reward("nowhere.py:length")
    with pytest.raises(DeRaError, match="does not name a Python object"):
        load_reward("rewards.py:no name")
    with pytest.raises(DeRaError, match=r"reward='no-such' is neither a function, .* nor built in \(length, implicit"):
        load_rewards(["no-such"])
    with pytest.raises(DeRaError, match="no such folder"):
        load_reward("./length")


def test_fingerprints_of_rewards(file, tmp_path, tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    before = reward_fingerprint(f"{file}:length")
    file.write_text(FILE + "\n")
    assert reward_fingerprint(f"{file}:length") != before
    one = reward_fingerprint(str(make_reward_model(tmp_path / "one", tokenizer)))
    assert one != reward_fingerprint(str(make_reward_model(tmp_path / "two", tokenizer, labels=2)))
    assert reward_fingerprint("some-org/reward-model") == "some-org/reward-model"
