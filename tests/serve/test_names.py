"""λ from the field and from the model's name, of one adapter, of several and of none."""

import pytest

from dera_peft.serve.errors import APIError
from dera_peft.serve.names import ModelNames

ONE = ModelNames({"dpo@2": "aligned"}, "base", 0.8, (-1.0, 2.0), (0, 0.5))
TWO = ModelNames({"helpful": "helpful", "brief": "brief"}, "base", {"helpful": 0.7, "brief": 0.1}, (-5.0, 5.0), (1,))
NONE = ModelNames({}, "base", 1.0, (-5.0, 5.0), (0, 1))


@pytest.mark.parametrize(
    ("names", "model", "lam", "expected"),
    [
        (ONE, None, None, 0.8),
        (ONE, "dpo@2", None, 0.8),  # a folder of that name
        (ONE, "dpo@2@0.25", None, 0.25),
        (ONE, "dpo@2", -1, -1.0),
        (ONE, None, {"dpo@2": 1.5}, 1.5),
        (ONE, "dpo@2@-0", None, 0.0),
        (TWO, None, None, {"helpful": 0.7, "brief": 0.1}),
        (TWO, "helpful", None, {"helpful": 1.0, "brief": 0.0}),
        (TWO, "brief@2", None, {"helpful": 0.0, "brief": 2.0}),
        (TWO, "brief", 0.5, {"helpful": 0.0, "brief": 0.5}),
        (TWO, "brief@0.5+helpful", None, {"helpful": 0.7, "brief": 0.5}),
        (TWO, "helpful+brief", {"brief": 1}, {"helpful": 0.0, "brief": 1.0}),
        (NONE, None, None, None),
        (NONE, "base", None, None),
    ],
)
def test_lambda_is_read(names, model, lam, expected):
    assert names.read(model, lam) == expected
    assert names.shown(names.read(model, lam)) == (expected if names is not ONE else pytest.approx(expected))


@pytest.mark.parametrize(
    ("names", "model", "lam", "status", "says"),
    [
        (ONE, "dpo", None, 404, "there is no 'dpo'"),
        (ONE, "dpo@2@3", None, 400, "-1 to 2"),
        (ONE, "dpo@2@", None, 400, "not a number"),
        (ONE, "dpo@2@0", 0, 400, "says λ already"),
        (ONE, None, 10**400, 400, "finite"),
        (TWO, None, 0.5, 400, "several adapters"),
        (TWO, "helpful+other", None, 404, "there is no 'other'"),
        (TWO, None, {"other": 1}, 400, "there is no 'other'"),
        (TWO, None, {"brief": None}, 400, "finite number"),
        (NONE, None, 0.5, 400, "no adapter"),
        (NONE, "base@0", None, 404, "without λ"),
    ],
)
def test_a_wrong_lambda_or_name_is_told(names, model, lam, status, says):
    with pytest.raises(APIError, match=says) as told:
        names.read(model, lam)
    assert told.value.status == status


def test_plain_names_are_listed_first():
    assert ONE.listing() == ["dpo@2", "dpo@2@0", "dpo@2@0.5"]
    assert TWO.listing() == ["helpful", "brief", "helpful+brief", "helpful@1", "brief@1"]
    assert NONE.listing() == ["base"]
