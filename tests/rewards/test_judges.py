"""Judges of pairs: whom they are asked about, in which order, and what their faults leave."""

import numpy
import pytest
import torch
from tiny_models import make_reward_model, make_tokenizer

from dera_peft import DeRaError
from dera_peft.rewards.calls import MAX_FAILURES
from dera_peft.rewards.functions import call_reward, load_reward
from dera_peft.rewards.judges import NamedJudge, is_swapped, judge_or_mark, load_judge

KEYS = [("λ", index) for index in range(40)]


def judge_of(function) -> NamedJudge:
    return NamedJudge(function.__name__, "x", function)


def verdicts(function, completions, others) -> list:
    prompts = [f"p{row}" for row in range(len(completions))]
    return judge_or_mark(judge_of(function), prompts, completions, others, KEYS[: len(completions)])


def test_a_judge_of_what_is_said_is_right_in_either_place():
    def longer(prompts, pairs):
        return [-1 if len(a) == len(b) else 0 if len(a) > len(b) else 1 for a, b in pairs]

    assert {is_swapped(key) for key in KEYS[:8]} == {True, False}
    assert verdicts(longer, ["aa"] * 8, ["b"] * 8) == [(1, None)] * 8
    assert verdicts(longer, ["a"] * 8, ["bb"] * 8) == [(-1, None)] * 8
    assert verdicts(longer, ["a"], ["b"]) == [(0, None)]


def test_a_judge_that_likes_a_place_finds_no_winner():
    asked = []

    def first(prompts, pairs):
        asked.append((prompts, pairs))
        return [0] * len(pairs)

    found = [verdict for verdict, _ in verdicts(first, ["a"] * 40, ["b"] * 40)]
    assert 10 < found.count(1) < 30
    assert found.count(1) + found.count(-1) == 40
    assert found == [verdict for verdict, _ in verdicts(first, ["a"] * 40, ["b"] * 40)], "the same order in every run"
    assert asked[0] == asked[1]
    assert asked[0][0][:2] == ["p0", "p1"]


def test_the_same_text_is_a_tie_without_asking():
    def never(prompts, pairs):
        assert pairs == [["a", "b"]] or pairs == [["b", "a"]]
        return [0]

    assert verdicts(never, ["same", "a"], ["same", "b"])[0] == (0, None)


def test_where_it_fails_the_other_pairs_are_judged():
    def fails(prompts, pairs):
        if any("bad" in pair for pair in pairs):
            raise ValueError("no idea")
        return [0 if a == "a" else 1 for a, b in pairs]

    assert verdicts(fails, ["a", "bad", "a"], ["b", "b", "b"]) == [
        (1, None),
        (None, "the judge 'fails' raised ValueError: no idea"),
        (1, None),
    ]
    none = "which is none of the integers 0, 1 and -1"
    for answer, shown in ((2, "2 (int)"), (True, "True (bool)"), (1.0, "1.0 (float)"), ("1", "1 (str)")):
        (found,) = verdicts(lambda prompts, pairs, answer=answer: [answer], ["a"], ["b"])
        assert found == (None, f"the judge '<lambda>' gave {shown}, {none}")
    with pytest.raises(DeRaError, match="the judge '<lambda>' gave 0 values for 1 pairs"):
        verdicts(lambda prompts, pairs: [], ["a"], ["b"])
    with pytest.raises(DeRaError, match="returned a NoneType"):
        verdicts(lambda prompts, pairs: None, ["a"], ["b"])

    def never(prompts, pairs):
        raise ValueError("down")

    with pytest.raises(DeRaError, match=f"the judge 'never' failed on each of the first {MAX_FAILURES} rows"):
        verdicts(never, ["a"] * 40, ["b"] * 40)


@pytest.mark.parametrize("scalar", [int, numpy.int64, numpy.int8, numpy.array, torch.tensor])
def test_verdicts_of_other_libraries(scalar):
    def longer(prompts, pairs):
        return [scalar(-1 if len(a) == len(b) else 0 if len(a) > len(b) else 1) for a, b in pairs]

    async def asynchronous(prompts, pairs):
        return numpy.array(longer(prompts, pairs), dtype=object)

    found = verdicts(longer, ["aa", "a", "a"], ["b", "bb", "b"])
    assert found == verdicts(asynchronous, ["aa", "a", "a"], ["b", "bb", "b"])
    assert found == [(1, None), (-1, None), (0, None)]
    assert {type(verdict) for verdict, _ in found} == {int}


def test_a_reward_model_prefers_what_it_scores_higher(tmp_path):
    folder = str(make_reward_model(tmp_path / "model", make_tokenizer()))
    prompts, completions, others = ["Rain", "A fox"], [" fell.", " crossed."], [" and bread.", " rivers, at night."]
    model = load_reward(folder)
    first, second = call_reward(model, prompts, completions), call_reward(model, prompts, others)
    expected = [(1 if a > b else -1, None) for a, b in zip(first, second, strict=True)]
    judge = load_judge(folder)
    assert judge.name == "model"
    assert judge_or_mark(judge, prompts, completions, others, KEYS[:2]) == expected
    assert judge_or_mark(judge, prompts, others, completions, KEYS[:2]) == [(-verdict, None) for verdict, _ in expected]


def test_what_is_not_a_judge(tmp_path):
    with pytest.raises(DeRaError, match="there is no file"):
        load_judge("nowhere.py:judge")
    (tmp_path / "judge.py").write_text("judge = 3\n")
    with pytest.raises(DeRaError, match="not a function"):
        load_judge(f"{tmp_path}/judge.py:judge")
