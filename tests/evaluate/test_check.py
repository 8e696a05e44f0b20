"""The quick check: what it says of an adapter that does nothing, and of one under which text falls apart."""

import pytest
from tiny_models import make_adapter

from dera_peft.evaluate.check import Check, CheckedLambda, _mark_fallen_apart, check
from dera_peft.evaluate.config import SweepConfig

PROMPTS = ["Rain fell on the market", "A fox crossed the river", "My sister repairs"]


def look(base, adapter, **settings) -> Check:
    return check(SweepConfig(prompts=PROMPTS, base=str(base), adapter=str(adapter), max_new_tokens=12, **settings))


def test_an_adapter_that_does_nothing_is_found_out(tiny_base, tmp_path):
    found = look(tiny_base, make_adapter(tiny_base, tmp_path, scale=0.0))
    assert not found.responds
    assert {each.same for each in found.lambdas} == {1.0}
    assert found.text().startswith("The adapter does not respond to λ: at λ=1 its next-token distributions are ")


def test_it_responds_and_the_table_is_of_the_completions(tiny_base, tiny_adapter):
    found = look(tiny_base, tiny_adapter, lambdas=[0, 0.25, 1])
    assert [each.lam for each in found.lambdas] == [0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8]
    assert (found.prompts, found.tokens) == (3, 12)
    zero, quarter, *_, last = found.lambdas
    assert (zero.kl_per_token, zero.same) == (0, 1)
    assert 0 < quarter.kl_per_token < found.kl_per_token < last.kl_per_token
    assert last.perplexity > zero.perplexity
    assert found.text().startswith("The adapter responds to λ: at λ=1")


def checked(lam: float, perplexity: float, repetition: float = 0.0) -> CheckedLambda:
    return CheckedLambda(lam, 0.1 * abs(lam), perplexity, repetition, 0.0)


@pytest.mark.parametrize(
    ("others", "broken", "words"),
    [
        # against 2 at λ=1, the worse one: 8 is four times that, and not more
        ([checked(2, 8.0), checked(4, 8.1)], [4], "Text falls apart from λ=4 on: sweep up to about λ=2."),
        ([checked(2, 2.0, 0.34), checked(4, 2.0, 0.36)], [4], "Text falls apart from λ=4 on"),
        ([checked(-1, 30.0), checked(2, 3.0)], [-1], "Below 0 it falls apart from λ=-1 on."),
        ([checked(-1, 3.0), checked(2, 3.0)], [], "Text holds together at every λ that was tried, from -1 to 2."),
    ],
)
def test_where_text_falls_apart(others, broken, words):
    found = sorted([checked(0, 1.5, 0.1), checked(1, 2.0), *others], key=lambda each: each.lam)
    judged = _mark_fallen_apart(found)
    assert [each.lam for each in judged if each.falls_apart] == broken
    assert words in Check(judged, 3, 12).text()
