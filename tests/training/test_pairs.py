"""Pairs from scored completions, worked out by hand."""

import itertools
import math
from dataclasses import replace

import pytest
from rich.console import Console

from dera_peft.decoding.rows import RewardedRow
from dera_peft.training.pairs import (
    ALIKE,
    ALL,
    BEST_WORST,
    EMPTY,
    IDENTICAL,
    TOO_LONG,
    UNFINISHED,
    UNSCORED,
    make_pairs,
    outcome_table,
)


def rows(index: int, *completions: tuple, prompt="p") -> list[RewardedRow]:
    """(text, reward) or (text, reward, finish) each."""
    return [
        RewardedRow("run", index, prompt, {}, None, sample, text, 3, finish, [5, 6, 2], 2, reward)
        for sample, (text, reward, finish) in enumerate((*c, "eos")[:3] for c in completions)
    ]


def chosen_over_rejected(pairs: list[dict]) -> list[tuple]:
    return [(pair["chosen"], pair["rejected"]) for pair in pairs]


def test_the_best_against_the_worst():
    pairs, outcomes = make_pairs(rows(0, ("b", 2.0), ("c", 3.0), ("a", 1.0)), BEST_WORST, 0.0)
    assert pairs == [{"prompt": "p", "chosen": "c", "rejected": "a", "chosen_reward": 3.0, "rejected_reward": 1.0}]
    assert outcomes == {1: 1}


def test_every_two_with_a_margin():
    group = rows(0, ("b", 2.0), ("c", 3.5), ("a", 1.0), ("b again", 2.0))
    pairs, outcomes = make_pairs(group, ALL, 0.0)
    assert sorted(chosen_over_rejected(pairs)) == [
        ("b", "a"), ("b again", "a"), ("c", "a"), ("c", "b"), ("c", "b again")
    ]  # fmt: skip
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    assert outcomes == {5: 1}
    # by more than the margin: 3.5 - 2.0 is just that, 2.0 - 1.0 is less
    pairs, _ = make_pairs(group, ALL, 1.5)
    assert chosen_over_rejected(pairs) == [("c", "a")]
    assert make_pairs(group, ALL, 2.5) == ([], {ALIKE: 1})


def test_why_a_prompt_gives_no_pair():
    groups = [
        rows(0, ("a", 1.0), ("b", 2.0, "length"), ("c", 3.0, "length")),
        rows(1, ("a", 1.0), ("b", None), ("c", None)),
        rows(2, ("a", 1.0), ("a", 2.0)),  # a reward may be random, as a judge's
        rows(3, ("a", 1.0), ("b", 1.0)),
        rows(4, ("a", 1.0), ("b", 2.0)),
        rows(5, ("a", 1.0), (" ", 2.0)),
        rows(6, ("a", 1.0), ("b", 2.0), ("", 0.0), ("", 3.0)),
    ]
    for pairs in (BEST_WORST, ALL):
        made, outcomes = make_pairs(list(itertools.chain(*groups)), pairs, 0.0)
        assert chosen_over_rejected(made) == [("b", "a")] * 2
        assert outcomes == {UNFINISHED: 2, UNSCORED: 1, IDENTICAL: 1, ALIKE: 1, 1: 2}


def test_one_text_is_never_set_against_itself():
    pairs, _ = make_pairs(rows(0, ("a", 1.0), ("a", 3.0), ("b", 2.0)), ALL, 0.0)
    assert chosen_over_rejected(pairs) == [("b", "a"), ("a", "b")]


def test_labels_drawn_by_bradley_and_terry():
    """With rewards that differ by 1 and T = 0.5 the better one is chosen in σ(2) = 0.881 of the pairs."""
    many = list(itertools.chain(*(rows(index, ("a", 0.0), ("b", 1.0)) for index in range(4000))))
    drawn, outcomes = make_pairs(many, ALL, 0.0, label_temperature=0.5, seed=1)
    assert outcomes == {1: 4000}
    better = [pair["chosen_reward"] > pair["rejected_reward"] for pair in drawn]
    assert sum(better) / 4000 == pytest.approx(1 / (1 + math.exp(-2)), abs=0.015)  # 3 standard errors
    assert all(
        (pair["chosen"], pair["rejected"]) == (("b", "a") if b else ("a", "b"))
        for pair, b in zip(drawn, better, strict=True)
    )
    assert drawn == make_pairs(many, ALL, 0.0, label_temperature=0.5, seed=1)[0]
    assert drawn != make_pairs(many, ALL, 0.0, label_temperature=0.5, seed=2)[0]
    assert drawn[1000:] == make_pairs(many[2000:], ALL, 0.0, label_temperature=0.5, seed=1)[0], "each pair has its own"


def test_pairs_of_a_chat_are_messages():
    chat = [{"role": "user", "content": "hi"}]
    (pair,), _ = make_pairs(rows(0, ("a", 1.0), ("b", 2.0), prompt=chat), BEST_WORST, 0.0)
    assert pair["prompt"] == chat
    assert pair["chosen"] == [{"role": "assistant", "content": "b"}]
    assert pair["rejected"] == [{"role": "assistant", "content": "a"}]


def test_a_pair_has_what_its_prompt_was_rendered_with():
    """A text as the user message that it was; system, tools and arguments of the template."""
    columns = {"system": "Be kind.", "tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "gay"}, "other": 1}
    group = [replace(row, columns=columns) for row in rows(0, ("a", 1.0), ("b", 2.0), prompt="hi")]
    (pair,), _ = make_pairs(group, BEST_WORST, 0.0, chat=True)
    assert pair == {
        "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "a"}],
        "chosen_reward": 2.0, "rejected_reward": 1.0, "tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "gay"},
    }  # fmt: skip
    (pair,), _ = make_pairs(group, BEST_WORST, 0.0)
    assert (pair["prompt"], pair["chosen"]) == ("Be kind.\n\nhi", "b")


def test_the_table_counts_every_prompt():
    _, outcomes = make_pairs([*rows(0, ("a", 1.0), ("b", 2.0)), *rows(1, ("a", 1.0), ("b", 1.0))], BEST_WORST, 0.0)
    outcomes[TOO_LONG] = 2
    outcomes[EMPTY] = 0
    console = Console(width=120)
    with console.capture() as captured:
        console.print(outcome_table(outcomes))
    lines = [" ".join(line.split()) for line in captured.get().splitlines()]
    assert lines == [
        "prompts share gave",
        "1 25.0% 1 pair",
        f"2 50.0% no pair: {TOO_LONG}",
        f"1 25.0% no pair: {ALIKE}",
        "4 in all",
    ]
