"""What a sweep's completions are worth: KL, log-probabilities, and what each branch would have said."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from dera_peft.decoding.lambdas import Lambda, values_of
from dera_peft.decoding.scoring import Scored, score_each
from dera_peft.decoding.token_views import token_views
from dera_peft.engine.names import LOGITS
from dera_peft.evaluate.arms import Arm
from dera_peft.evaluate.points import ends
from dera_peft.evaluate.rows import CompletionRow, Key
from dera_peft.model import DeRaModel

TOP = 3  # tokens of each branch that the report names
DIGITS = 6  # of what is kept: nats


@dataclass
class Scorer:
    """
    Attributes:
        tokens: token ids of each prompt, by its index.
        reference_tokens: of those that the reference reads, where they are others.
        grid: the λ that the curve of plain λ is estimated on; None where there is none.
        temperature: that of the sampling.
    """

    tokens: Sequence[Sequence[int]]
    reference_tokens: Sequence[Sequence[int]] | None
    tokenizer: PreTrainedTokenizerBase
    grid: Sequence[Lambda] | None
    temperature: float
    texts: dict[tuple[int | None, int], str] = field(default_factory=dict)  # a cache for `token_views`

    def score(
        self, arm: Arm, model: DeRaModel, rows: Sequence[CompletionRow], with_views: bool
    ) -> Iterator[tuple[Key, dict[str, Any]]]:
        """The fields of the `ScoreRow` of each completion of an arm, as they are ready."""
        if arm.name == LOGITS and self.grid is not None:
            yield from self._on_grid(model, rows, with_views, self.grid)
            return
        by_lambda: dict[Lambda | None, list[CompletionRow]] = defaultdict(list)
        for row in rows:
            by_lambda[row.lam].append(row)
        for alike in by_lambda.values():
            yield from self._at_its_lambda(arm, model, alike, with_views)

    def _on_grid(
        self, model: DeRaModel, rows: Sequence[CompletionRow], with_views: bool, grid: Sequence[Lambda]
    ) -> Iterator[tuple[Key, dict[str, Any]]]:
        """At all λ of the grid, in one pass, which the curve needs."""
        known = ends(grid[0])
        lam = sorted({*grid, *known}, key=values_of)
        top = TOP if with_views else 0
        given = {"lam": lam, "temperature": self.temperature, "top": top}
        for index, scored in score_each(**self._inputs(model, rows), **given):
            row, total, kl = rows[index], scored.total, scored.kl.sum(-1)
            places = [lam.index(strength) for strength in grid]
            values = self._ends(scored.log_p_at_1.sum(-1)[list(map(lam.index, known))], is_own=True)
            values |= {
                "kl": _rounded(kl[lam.index(cast("Lambda", row.lam))]),
                "log_p": [_rounded(value) for value in total[places]],
                "kl_grid": [_rounded(value) for value in kl[places]],
            }
            yield row.key, values | (self._views(scored, row) if with_views else {})

    def _at_its_lambda(
        self, arm: Arm, model: DeRaModel, rows: Sequence[CompletionRow], with_views: bool
    ) -> Iterator[tuple[Key, dict[str, Any]]]:
        """At temperature 1, with the KL of what completions of one λ were decoded from."""
        lam = cast("Lambda", arm.request(rows[0].key).lam)  # of a key it is one
        known, inputs = ends(lam), self._inputs(model, rows)
        strengths = sorted({lam, *known}, key=values_of)
        by_rule: dict[int, float] = {}
        if arm.has_rule:
            rule = {"combine": arm.combine, "lambda_schedule": arm.schedule}
            of_rule = score_each(**inputs, lam=None if rows[0].lam is None else lam, **rule)
            by_rule = {index: _rounded(scored.kl.sum()) for index, scored in of_rule}
        for index, scored in score_each(**inputs, lam=strengths, top=TOP if with_views else 0):
            row, total = rows[index], scored.total
            at_ends = total[list(map(strengths.index, known))]
            values = self._ends(at_ends, arm.is_own)
            if row.log_z is not None:
                # log π/π_ref of the whole text, whose mean is the KL; token by token there is no such distribution
                values["kl"] = _rounded(cast("float", lam) * (at_ends[1] - at_ends[0]) - row.log_z)
            else:
                values["kl"] = by_rule.get(index, _rounded(scored.kl[strengths.index(lam)].sum()))
            yield row.key, values | (self._views(scored, row) if with_views else {})

    def _inputs(self, model: DeRaModel, rows: Sequence[CompletionRow]) -> dict[str, Any]:
        """Arguments of `score_each`."""
        inputs = {
            "model": model,
            "prompts": [self.tokens[row.prompt_index] for row in rows],
            "completions": [row.token_ids for row in rows],
        }
        if self.reference_tokens is not None:
            inputs["reference_prompts"] = [self.reference_tokens[row.prompt_index] for row in rows]
        return inputs

    def _ends(self, log_p: torch.Tensor, is_own: bool) -> dict[str, float]:
        """
        Args:
            log_p: at each of `points.ends`. That of another adapter would be another implicit reward, and several have
                none.
        """
        log_ref, *log_aligned = map(_rounded, log_p)
        known = {"log_ref": log_ref}
        return known | {"log_aligned": log_aligned[0]} if is_own and len(log_aligned) == 1 else known

    def _views(self, scored: Scored, row: CompletionRow) -> dict[str, Any]:
        prompt = self.tokens[row.prompt_index]
        views = token_views(scored, prompt, row.token_ids, self.tokenizer, self.texts)
        return {"token_views": [_short(view) for view in views]}


def _rounded(value: torch.Tensor) -> float:
    return round(value.item(), DIGITS)


def _short(view: dict[str, Any]) -> dict[str, Any]:
    """A token's view with no more digits than the report needs."""
    return {
        name: round(value, DIGITS)
        if name == "js"
        else value
        if name == "token"
        else [[text, round(chance, 4)] for text, chance in value]
        for name, value in view.items()
    }
