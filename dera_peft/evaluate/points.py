"""The λ of a sweep: numbers of one adapter, or points of several; which are compared with, and what lies between."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy

from dera_peft.decoding.lambdas import Lambda, NamedLambda, for_adapters, values_of, with_values
from dera_peft.errors import DeRaError

DEFAULT = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # of one adapter
SIMPLEX = 4  # steps of the default for several
MAX_POINTS = 2000  # that a sweep decodes at

GRID_STEPS = 4  # points of the fine grid between two λ of the sweep
MAX_GRID = 81  # points in all
ROUNDING = 1e-6  # of a λ between two others


def sweep_lambdas(
    aligned: Sequence[str],
    asked: Iterable[float | Mapping[str, Any]] = (),
    steps: int | None = None,
    total: float = 1.0,
) -> tuple[Lambda, ...]:
    """
    The λ that a sweep decodes at.

    Args:
        aligned: the names of the model's aligned branches.
        asked, steps, total: the settings `lambdas`, `simplex` and `simplex_total`.

    Raises:
        DeRaError: they don't fit the model's aligned adapters, or are too many.
    """
    lambdas = for_adapters(asked, aligned, "lambdas")
    if len(aligned) == 1:
        if steps is not None:
            raise DeRaError(f"simplex={steps}: it divides a sum among several adapters, and there is one; set lambdas.")
        return lambdas or DEFAULT
    if steps is None and not lambdas:
        steps = SIMPLEX
    if steps is not None:
        points = simplex(aligned, steps, total)
        reference = NamedLambda(dict.fromkeys(aligned, 0.0))
        lambdas = tuple(dict.fromkeys([*(lambdas or [reference]), *points]))
    if len(lambdas) > MAX_POINTS:
        raise DeRaError(f"lambdas: these are {len(lambdas)} points, and a sweep takes at most {MAX_POINTS}.")
    return lambdas


def simplex(names: Sequence[str], steps: int, total: float = 1.0) -> list[NamedLambda]:
    """
    All λ ≥ 0 that sum to `total`, in steps of total/steps: one for each way to give `steps` away.

    Raises:
        DeRaError: they are more than a sweep takes.
    """
    points = []
    # a way to give steps away is a way to put bars between them
    for bars in combinations(range(steps + len(names) - 1), len(names) - 1):
        ends = (-1, *bars, steps + len(names) - 1)
        counts = [right - left - 1 for left, right in pairwise(ends)]
        points.append(NamedLambda({name: total * n / steps for name, n in zip(names, counts, strict=True)}))
        if len(points) > MAX_POINTS:
            raise DeRaError(
                f"simplex={steps}: of {len(names)} adapters these are more than {MAX_POINTS} points; take fewer steps."
            )
    return points


# -- which λ are compared with -----------------------------------------------------------------------------------------


def is_reference(lam: Lambda) -> bool:
    return not any(values_of(lam))


def is_as_trained(lam: Lambda) -> bool:
    """Whether it is one adapter alone, at 1."""
    return lam in ends(lam)[1:]


def anchors(lambdas: Iterable[Lambda | None]) -> list[Lambda]:
    """Those of the λ that all others are compared with: the reference, and each adapter alone as it was trained."""
    known = [lam for lam in lambdas if lam is not None]
    return [lam for lam in (ends(known[0]) if known else ()) if lam in known]


def ends(lam: Lambda) -> list[Lambda]:
    """The reference, and each adapter alone as it was trained, of the model that this λ is of."""
    if not isinstance(lam, NamedLambda):
        return [0.0, 1.0]
    alone = [NamedLambda({name: float(name == other) for name in lam}) for other in lam]
    return [NamedLambda(dict.fromkeys(lam, 0.0)), *alone]


def anchor_name(lam: Lambda) -> str:
    """What a comparison is with: "the reference (λ=0)", "helpful alone, as trained"."""
    if is_reference(lam):
        return "the reference (λ=0)"
    if isinstance(lam, NamedLambda):
        return f"{next(name for name, value in lam.items() if value)} alone, as trained (λ=1)"
    return "the adapter as trained (λ=1)"


def is_of_several(lambdas: Iterable[Lambda | None]) -> bool:
    """Whether they are points of several adapters."""
    return any(isinstance(lam, NamedLambda) for lam in lambdas)


# -- between the λ -----------------------------------------------------------------------------------------------------


def neighbours(lambdas: Sequence[Lambda]) -> list[tuple[Lambda, Lambda]]:
    """
    The pairs between which no other λ lies: none in the ball whose diameter they are (the Gabriel graph), and they are
    no diagonal of a rectangle. Of numbers those are the pairs in their order; of points on a grid those beside each
    other on an axis.
    """
    lambdas = sorted(lambdas, key=values_of)
    places = numpy.array([values_of(lam) for lam in lambdas])  # [N, K]
    known = {tuple(place) for place in (places.round(6) + 0.0).tolist()}
    pairs = []
    for low in range(len(lambdas)):
        to_low = places - places[low]  # [N, K]
        # a third point sees both under an angle of more than 90 degrees, or under one of 90 from a rectangle's corner
        cosines = (to_low[:, None] * (places[:, None] - places)).sum(-1)  # [third, high], times both distances
        rounding = ROUNDING * (to_low**2).sum(-1)
        near = cosines < -rounding
        for third, high in zip(*(numpy.abs(cosines) <= rounding).nonzero(), strict=True):
            opposite = (places[low] + places[high] - places[third]).round(6)
            near[third, high] = tuple((opposite + 0.0).tolist()) in known
        near[low] = False
        numpy.fill_diagonal(near, False)
        pairs += [(lambdas[low], lambdas[high]) for high in range(low + 1, len(lambdas)) if not near[:, high].any()]
    return pairs


def fine_grid(lambdas: Sequence[Lambda]) -> list[Lambda]:
    """
    The λ and points evenly between neighbours, as many as MAX_GRID allows; ascending, never beyond the λ themselves.
    """
    room = MAX_GRID - len(lambdas)
    pairs = neighbours(lambdas) if room > 0 else []
    between = min(GRID_STEPS, room // max(1, len(pairs)))
    grid = [*lambdas]
    for low, high in pairs:
        ends = list(zip(values_of(low), values_of(high), strict=True))
        for step in range(1, between + 1):
            values = [round(start + (end - start) * step / (between + 1), 9) for start, end in ends]
            grid.append(with_values(low, values))
    return sorted(set(grid), key=values_of)


def is_between(lam: Lambda, low: Lambda, high: Lambda) -> bool:
    """Whether it lies on the way from one to the other, and is neither."""
    place, start, end = (numpy.array(values_of(each)) for each in (lam, low, high))
    way = end - start
    share = (place - start) @ way / (way @ way)
    return bool(0 < share < 1 and numpy.abs(start + share * way - place).max() <= ROUNDING)
