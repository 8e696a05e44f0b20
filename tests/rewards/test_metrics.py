"""The built-in rewards, on numbers worked out by hand."""

import math

import pytest

from dera_peft import DeRaError
from dera_peft.rewards.metrics import Measured, perplexity_of, read_metric


def value(name: str, beta: float | None = None, **measured) -> float | None:
    return read_metric(name, beta)(Measured(**{"text": "", "tokens": [], **measured}))


def test_of_the_tokens():
    assert value("length", tokens=[5, 6, 5]) == 3
    # 1 2 1 2 1 2: of its three 4-grams 1212, 2121, 1212 one stood there before; of its six tokens two are different
    assert value("repetition", tokens=[1, 2, 1, 2, 1, 2]) == pytest.approx(1 / 3)
    assert value("distinct-1", tokens=[1, 2, 1, 2, 1, 2]) == pytest.approx(2 / 6)
    assert value("distinct-2", tokens=[1, 2, 1, 2, 1, 2]) == pytest.approx(2 / 5)
    assert value("repetition", tokens=[1, 1, 1]) == 0, "too short to repeat four"
    assert value("distinct-3", tokens=[1, 1]) is None


def test_of_the_branches():
    # (-2 - -5)·0.5; 4 tokens of together -2 nats
    assert value("implicit", beta=0.5, log_ref=-5.0, log_aligned=-2.0) == 1.5
    assert value("perplexity", log_ref=-2.0, length=4) == pytest.approx(math.exp(0.5))
    assert value("implicit", beta=0.5, log_ref=-5.0) is None, "a further model's, which has another aligned model"
    assert value("perplexity", log_ref=0.0, length=0) is None, "nothing was written"
    with pytest.raises(DeRaError, match="'implicit' needs the β of the training"):
        read_metric("implicit")


@pytest.mark.parametrize(
    ("answer", "expected"), [("Paris", 1), (" Paris\n", 1), ("paris", 0), (["Rome", "Paris"], 1), ([], 0), (None, None)]
)
def test_of_a_reference_answer(answer, expected):
    assert value("exact_match:answer", text="\nParis ", columns={"answer": answer}) == expected


def test_numbers_and_other_columns():
    assert value("exact_match:n", text="42", columns={"n": 42}) == 1
    assert value("exact_match:n", text="42", columns={}) is None


@pytest.mark.parametrize("name", ["org/lenght", "./lenght", "perplexity.py:perplexity", "gpt2", "reward-model"])
def test_what_is_no_metric(name):
    assert read_metric(name, 1.0) is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lenght", "'length'"), ("Length", "'length'"), ("perplexety", "'perplexity'"),
        ("distinct-0", "'distinct-n', with n from 1 to 9,"), ("distinct", "'distinct-n', with n from 1 to 9,"),
        ("exact_match", "'exact_match:COLUMN'"), ("exact-match:answer", "'exact_match:COLUMN'"),
    ],
)  # fmt: skip
def test_a_slip_of_the_pen_is_told(name, meant):
    with pytest.raises(DeRaError) as raised:
        read_metric(name, 1.0)
    assert str(raised.value).startswith(f"reward={name!r} is not built in; {meant} is. Built in are length, implicit,")


def test_a_folder_may_be_called_like_a_metric(tmp_path, monkeypatch):
    (tmp_path / "lengths").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_metric("lengths") is None


def test_the_perplexity_of_an_impossible_text_is_finite():
    assert perplexity_of(-6.0, 3) == pytest.approx(7.389056)
    assert math.isfinite(perplexity_of(-math.inf, 3))
