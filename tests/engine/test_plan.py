"""λ as it may be written, and the rows that follow from it; all numbers worked out by hand."""

import pytest
import torch

from dera_peft import DeRaError
from dera_peft.engine.plan import BatchPlan, Branch, check_default_lam, make_branches, read_lam

TWO = (Branch("reference"), Branch("aligned", ("default",)))
THREE = (Branch("reference", ("sft",)), Branch("helpful", ("sft", "h")), Branch("harmless", ("sft", "s")))


def plan(lam, **kwargs) -> BatchPlan:
    return BatchPlan(TWO, torch.tensor(lam, dtype=torch.float64)[:, None], **kwargs)


@pytest.mark.parametrize(
    "lam",
    [
        0.5,
        torch.tensor(0.5),
        [0.5, 0.5],
        (0.5, 0.5),
        torch.tensor([0.5, 0.5]),
        torch.tensor([[0.5], [0.5]]),
        {"aligned": 0.5},
        {"aligned": [0.5, 0.5]},
    ],
)
def test_every_way_to_write_lam_gives_one_weight_per_sequence(lam):
    assert read_lam(lam, 2, ["aligned"]).tolist() == [[0.5], [0.5]]


@pytest.mark.parametrize(
    ("lam", "message"),
    [
        (float("nan"), "finite"),
        ([0.5, float("inf")], "finite"),
        ("much", "must be a number"),
        ([0.5, 1.0, 2.0], r"shape \[3, 1\]"),
        ([0.5], r"needs \[2, 1\]"),
        ({"aligend": 0.5}, "'aligend'"),
        ([[0.5, 0.5]], r"shape \[1, 2\]"),
    ],
)
def test_a_lam_that_does_not_fit_is_an_error(lam, message):
    with pytest.raises(DeRaError, match=message):
        read_lam(lam, 2, ["aligned"])


def test_several_branches_need_a_weight_each():
    assert read_lam({"h": 0.7, "s": [0.2, 0.9]}, 2, ["h", "s"]).tolist() == [[0.7, 0.2], [0.7, 0.9]]
    with pytest.raises(DeRaError, match="2 aligned branches"):
        read_lam([0.2, 0.9], 2, ["h", "s"])


def test_rows_of_weight_zero_are_not_planned():
    mixed = plan([0.0, 0.5, 1.0, 1.0])
    assert mixed.num_rows == 5
    assert mixed.source.tolist() == [0, 1, 1, 2, 3]
    assert [(s.branch.name, s.start, s.stop) for s in mixed.segments] == [("reference", 0, 2), ("aligned", 2, 5)]
    assert mixed.adapter_rows == {"default": [slice(2, 5)]}
    assert plan([0.0, 0.0]).num_rows == plan([1.0, 1.0]).num_rows == 2
    assert plan([0.0, 1.0], every_branch=True).num_rows == 4


def test_join_is_the_weighted_sum():
    rows = torch.tensor([[1.0], [2.0], [30.0], [40.0], [50.0]])  # reference: 0, 1; aligned: 1, 2, 3
    assert plan([0.0, 0.5, 1.0, 1.0]).join(rows).tolist() == [[1.0], [16.0], [40.0], [50.0]]
    assert plan([-0.5, 3.0]).join(torch.tensor([[1.0], [2.0], [3.0], [4.0]])).tolist() == [[0.0], [8.0]]


def test_join_sums_in_fp32():
    rows = torch.tensor([[1.0], [1.0078125]], dtype=torch.bfloat16)  # neighbours in bf16
    joined = plan([3.0]).join(rows)
    assert joined.dtype == torch.bfloat16
    assert joined.item() == 1.0234375  # 3·1.0078125 - 2, a bf16 number


def test_expand_repeats_each_sequence():
    expanded = plan([0.0, 0.5]).expand(2)
    assert expanded.source.tolist() == [0, 1, 2, 3, 2, 3]
    assert expanded.lam[:, 0].tolist() == [0.0, 0.0, 0.5, 0.5]


def test_reorder_moves_the_rows_of_all_branches():
    # rows: reference of sequences 0 1 2 3, aligned of sequences 2 3; beams (0, 1) and (2, 3) swap
    expanded = plan([0.0, 0.5]).expand(2)
    assert expanded.rows_in(expanded, torch.tensor([1, 0, 3, 3])).tolist() == [1, 0, 3, 3, 5, 5]


def test_an_adapter_under_all_branches_touches_all_rows_and_neighbours_share_a_slice():
    lam = torch.tensor([[0.5, 0.0], [0.3, 0.2]], dtype=torch.float64)
    mixed = BatchPlan(THREE, lam)
    assert mixed.num_rows == 5  # reference 2, helpful 2, harmless 1
    assert mixed.adapter_rows == {"sft": [slice(None)], "h": [slice(2, 4)], "s": [slice(4, 5)]}
    joined = mixed.join(torch.tensor([[1.0], [2.0], [10.0], [20.0], [200.0]]))
    torch.testing.assert_close(joined, torch.tensor([[5.5], [0.5 * 2 + 0.3 * 20 + 0.2 * 200]]))
    neighbours = BatchPlan((Branch("reference"), Branch("a", ("x",)), Branch("b", ("x", "y"))), lam)
    assert neighbours.adapter_rows == {"x": [slice(2, 5)], "y": [slice(4, 5)]}


@pytest.mark.parametrize("lam", [float("nan"), float("inf"), "1", True, [1.0]])
def test_the_default_lam_is_one_finite_number(lam):
    with pytest.raises(DeRaError, match="default λ"):
        check_default_lam(lam)


def test_weights_that_sum_to_one_in_float32_leave_no_reference():
    branches = make_branches([], {"a": "a", "b": "b"})
    lam = read_lam(torch.tensor([[0.1, 0.9], [0.1, 0.8]]), 2, ["a", "b"])
    assert lam[0].sum() != 1
    for plan in (BatchPlan(branches, lam), BatchPlan(branches, lam).expand(2)):
        assert plan.num_rows == 5 * plan.batch_size // 2
        total = plan.join(torch.ones(plan.num_rows, 1))
        torch.testing.assert_close(total, torch.ones(plan.batch_size, 1), rtol=0, atol=1e-7)
    assert BatchPlan(branches, lam + 1e-5).num_rows == 6
