"""The λ that a sweep decodes at, which others are compared with, and what lies between them."""

import pytest

from dera_peft import DeRaError
from dera_peft.decoding.lambdas import NamedLambda
from dera_peft.evaluate import SweepConfig
from dera_peft.evaluate.points import anchor_name, anchors, fine_grid, is_between, neighbours, simplex, sweep_lambdas

TWO, THREE = ["helpful", "harmless"], ["a", "b", "c"]


def points(*values: tuple[float, ...], names=TWO) -> list[NamedLambda]:
    return [NamedLambda(dict(zip(names, each, strict=True))) for each in values]


def of(names, **keys) -> list:
    config = SweepConfig(prompts=["a"], **keys)
    found = sweep_lambdas(names, config.lambdas, config.simplex, config.simplex_total)
    return [tuple(lam.values()) if isinstance(lam, NamedLambda) else lam for lam in found]


def test_the_fine_grid_holds_the_lambdas_and_points_between():
    assert fine_grid([1, 0]) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert fine_grid([0.3]) == [0.3]
    many = [index / 7 for index in range(40)]
    assert set(many) < set(fine_grid(many))
    assert len(fine_grid(many)) <= 81


def test_the_fine_grid_of_points():
    corners = points((0, 0), (1, 0), (0, 1), (1, 1))
    assert sorted(tuple(lam.values()) for lam in fine_grid(corners)) == sorted(
        {(a, b) for a in (0, 1) for b in (0, 0.2, 0.4, 0.6, 0.8, 1)}
        | {(a, b) for b in (0, 1) for a in (0, 0.2, 0.4, 0.6, 0.8, 1)}
    ), "along the sides, not across"
    assert len(neighbours(simplex(THREE, 4))) == 30, "of a triangle with 4 steps a side"
    assert len(fine_grid(simplex(THREE, 4))) == 15 + 2 * 30, "as many as 81 points allow"
    assert [*map(len, fine_grid(corners))] == [2] * 20
    assert fine_grid(simplex(THREE, 12)) == sorted(simplex(THREE, 12)), "91 points leave no room"
    middle, low, high = points((0.25, 0.5), (0, 0), (0.5, 1))
    assert is_between(middle, low, high)
    assert not any(is_between(lam, low, high) for lam in points((0.25, 0.51), (0, 0), (1, 2)))


def test_of_one_adapter():
    assert of(["aligned"]) == [0, 0.25, 0.5, 0.75, 1, 1.5, 2]
    assert of(["aligned"], lambdas=[2, {"aligned": 0.5}]) == [2, 0.5]
    with pytest.raises(DeRaError, match="simplex=4: it divides a sum among several adapters, and there is one"):
        of(["aligned"], simplex=4)
    with pytest.raises(DeRaError, match="lambdas: λ is given for 'helpful', which is not an aligned adapter"):
        of(["aligned"], lambdas=[{"helpful": 1}])


def test_of_several_adapters():
    quarters = [(0, 1), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1, 0)]
    assert of(TWO) == of(TWO, simplex=4) == [(0, 0), *quarters]
    assert of(TWO, simplex=2, simplex_total=3) == [(0, 0), (0, 3), (1.5, 1.5), (3, 0)]
    assert of(TWO, lambdas=[{"harmless": 1}, {"helpful": 2}], simplex=1) == [(0, 1), (2, 0), (1, 0)]
    grid = {"harmless": [0, 0.5], "helpful": [0, 0.5, 1]}
    assert sorted(of(TWO, lambdas=grid)) == sorted((a, b) for a in (0, 0.5, 1) for b in (0, 0.5))
    assert len(of(THREE, simplex=4)) == 1 + 15
    assert all(abs(sum(each) - 1) < 1e-12 for each in of(THREE, simplex=7)[1:])
    with pytest.raises(DeRaError, match="lambdas: λ=1 is one number, and the model has several aligned adapters"):
        of(TWO, lambdas=[0, 1][1:])
    with pytest.raises(DeRaError, match="simplex=99: of 3 adapters these are more than 2000 points"):
        of(THREE, simplex=99)
    for keys, message in (
        ({"simplex": 0}, "simplex=0 must be an integer of at least 1"),
        ({"simplex": 2, "simplex_total": 0}, "simplex_total=0 must be more than 0"),
        ({"simplex_total": 2}, "simplex_total=2 has no effect without a simplex"),
        ({"lambdas": {"a": []}}, "lambdas={'a': \\[\\]} must be finite numbers"),
        ({"lambdas": [{"a": float("nan")}]}, "must be a list of finite numbers"),
    ):
        with pytest.raises(DeRaError, match=message):
            of(TWO, **keys)


def test_what_others_are_compared_with():
    assert anchors([2.0, 1.0, None, 0.0]) == [0.0, 1.0]
    assert anchors([0.5, 2.0]) == anchors([]) == anchors([None]) == []
    known = points((0, 1), (1, 0), (0.5, 0.5), (1, 1), (0, 0), (2, -1))
    assert anchors(known) == points((0, 0), (1, 0), (0, 1)), "each adapter alone, in their order"
    assert [anchor_name(lam) for lam in (0.0, 1.0, *points((0, 0), (0, 1)))] == [
        "the reference (λ=0)", "the adapter as trained (λ=1)", "the reference (λ=0)",
        "harmless alone, as trained (λ=1)",
    ]  # fmt: skip
