"""The fine grid of λ that a sweep's curve is estimated on."""

from dera_peft.evaluate.arms import fine_grid


def test_the_fine_grid_holds_the_lambdas_and_points_between():
    assert fine_grid([1, 0]) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert fine_grid([0.3]) == [0.3]
    many = [index / 7 for index in range(40)]
    assert set(many) < set(fine_grid(many))
    assert len(fine_grid(many)) <= 81
