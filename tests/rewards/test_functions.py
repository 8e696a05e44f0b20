"""Rewards from a user's file, and how they are called."""

import asyncio
from fractions import Fraction
from functools import partial

import numpy
import pytest
import torch
from tiny_models import make_reward_model
from transformers import AutoTokenizer

from dera_peft import DeRaError
from dera_peft.rewards.calls import MAX_FAILURES, Failures
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

def mapping(prompts, completions, **columns):
    return {completion: 1.0 for completion in completions}

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
        ("nothing", "'nothing' returned a NoneType: it must return a list, an array or a tensor"),
        ("mapping", "'mapping' returned a dict: it must return a list, an array or a tensor"),
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
        "    return values\n"
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


@pytest.mark.parametrize(
    "values",
    [
        [1, None, 3.0], (1, None, 3.0), (value for value in [1, None, 3.0]),
        numpy.array([1, None, 3.0], dtype=object), [torch.tensor(1.0), None, numpy.float32(3)],
    ],
    ids=lambda values: type(values).__name__,
)  # fmt: skip
def test_what_holds_the_values(values):
    assert call_reward(lambda prompts, completions: values, ["p"] * 3, ["a", "b", "c"]) == [1.0, None, 3.0]


@pytest.mark.parametrize(
    "values", [numpy.array([1.0, 3.0]), torch.tensor([1.0, 3.0], dtype=torch.bfloat16).requires_grad_()]
)
def test_arrays_and_tensors(values):
    def later(prompts, completions):
        return values

    assert call_reward(later, ["p"] * 2, ["a", "b"]) == [1.0, 3.0]
    with pytest.raises(DeRaError, match="'later' gave 2 values for 3 completions: it must give one for each"):
        call_reward(later, ["p"] * 3, ["a", "b", "c"])
    table = values[:, None]
    shown = call_reward_or_mark(lambda prompts, completions: table, ["p"] * 2, ["a", "b"], {})
    assert [error for _, error in shown] == [
        f"the reward '<lambda>' gave [{value}] (list), which is not a finite number." for value in (1.0, 3.0)
    ]


class Waiting:
    """An asynchronous reward that keeps something which belongs to its event loop, as a client's connections do."""

    lock: asyncio.Lock | None = None

    async def __call__(self, prompts, completions, **columns):
        self.lock = self.lock or asyncio.Lock()
        async with self.lock:
            return await asyncio.gather(*map(self.score, completions))

    async def score(self, completion: str) -> float:
        loop = asyncio.get_running_loop()
        self.loop = vars(self).get("loop", loop)
        assert self.loop is loop, "one loop from call to call"
        await asyncio.sleep(0)
        if completion == "bad":
            raise ValueError("down")
        return float(len(completion))


def test_asynchronous_rewards():
    async def plain(prompts, completions, weight):
        await asyncio.sleep(0)
        return numpy.array(weight, dtype=float)

    waiting = Waiting()
    assert call_reward(plain, ["p"] * 2, ["a", "b"], {"weight": [1, 2]}) == [1.0, 2.0]
    assert call_reward(partial(plain, weight=[3]), ["p"], ["a"]) == [3.0]
    for _ in range(2):
        assert call_reward(waiting, ["p"] * 2, ["a", "bcd"]) == [1.0, 3.0]
    found = call_reward_or_mark(waiting, ["p"] * 2, ["a", "bad"], {})
    assert found[0] == (1.0, None)
    assert found[1][1].endswith("raised ValueError: down")

    async def in_a_notebook() -> list:
        return call_reward(waiting, ["p"], ["ab"])

    assert asyncio.run(in_a_notebook()) == [2.0]


USER, ANSWER = {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize("prompt", ["Rain?", [USER]], ids=["text", "chat"])
def test_it_is_called_as_by_grpo(prompt, monkeypatch):
    """What TRL's GRPOTrainer gives a reward of the same conversation, all but the training's state."""
    seen = []

    def reward(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **others):
        log_extra("x", [1])
        log_metric("x", 1.0)
        seen.append((prompts, completions, completion_ids, answer, trainer_state, others))
        return [1.0] * len(prompts)

    columns = {"answer": ["a", "b"], "kind": [1, 2]}
    inputs = [prompt] * 2, ["Yes.", "Yes."], columns
    assert call_reward(reward, *inputs, token_ids=[[5, 2], (6,)], chat=True) == [1.0, 1.0]
    assert seen.pop() == ([[USER]] * 2, [[ANSWER]] * 2, [[5, 2], [6]], ["a", "b"], None, {"kind": [1, 2]})
    call_reward(reward, *inputs, token_ids=[[5, 2], [6]])
    texts = prompt == "Rain?"
    assert seen.pop()[:2] == ([prompt] * 2, ["Yes."] * 2 if texts else [[ANSWER]] * 2)

    def plain(prompts, completions, answer, kind):
        return [1.0] * len(prompts)

    assert call_reward(plain, *inputs, token_ids=[[5, 2], [6]]) == [1.0, 1.0], "no more than it has parameters for"


def test_too_few_values_are_an_error_and_not_asked_for_one_by_one():
    calls = []

    def short(prompts, completions):
        calls.append(len(completions))
        return [1.0]

    with pytest.raises(DeRaError, match="'short' gave 1 values for 3 completions: it must give one for each"):
        call_reward_or_mark(short, ["p"] * 3, ["a", "b", "c"], {})
    assert calls == [3]


def test_one_that_fails_on_everything_is_stopped():
    calls = []

    def fails(prompts, completions):
        calls.append(completions)
        if "good" in completions and len(completions) == 1:
            return [1.0]
        raise ValueError("down")

    stopped = (
        rf"the reward 'fails' failed on each of the first {MAX_FAILURES} rows .* raised ValueError: down\. Mend it"
    )
    texts = ["bad"] * (3 * MAX_FAILURES)
    with pytest.raises(DeRaError, match=stopped):
        call_reward_or_mark(fails, texts, texts, {})
    assert len(calls) == 1 + MAX_FAILURES
    failures = Failures("the reward 'fails'")
    for _ in range(MAX_FAILURES - 1):
        call_reward_or_mark(fails, ["p"], ["bad"], {}, failures=failures)
    with pytest.raises(DeRaError, match=stopped):
        call_reward_or_mark(fails, ["p"], ["bad"], {}, failures=failures)
    texts[3] = "good"
    values = call_reward_or_mark(fails, texts, texts, {})
    assert [value for value, _ in values] == [1.0 if text == "good" else None for text in texts]
    never = call_reward_or_mark(fails, texts[4:], texts[4:], {}, failures=Failures("", has_worked=True))
    assert all(error for _, error in never)


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
