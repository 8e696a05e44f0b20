"""The rules of a batch on its device: which rows each combines, and how far each completion is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from dera_peft.engine.combine import FUNCTIONS, divergence, log_probs
from dera_peft.engine.rules import KL_TOTAL, Rules
from dera_peft.errors import DeRaError

FLOAT = torch.float32


@dataclass(frozen=True)
class Group:
    """The sequences of one rule: their places `[n]`, and the rule's parameter for each, `[n]` fp32."""

    name: str
    sequences: torch.Tensor
    values: torch.Tensor


class Combiner:
    """
    Combines the branches' logits of a plan's sequences, each by its rule.

    What a completion has come to (`lam`, `position`, `spent`) is in tensors that a forward pass only reads; `advance`
    changes them, once for each new token. So prefills in chunks and recorded steps need not know of it.

    Args:
        rules: one for each of the B sequences.
        lam: `[B]` float64, the λ of those without a schedule.
        rows: `[2, B]` int64, the row of the reference and of the aligned branch of each sequence; that of the other one
            where one is not computed, since its rule does not need it.
        weights: of each branch that is computed, 0 for the reference's and 1 for the aligned one: sequences `[n]` and
            their weights `[n]`, which follow a schedule.

    Attributes:
        lam: `[B]` fp32, λ of the next token.
        position: `[B]` int64, how many new tokens there are.
        spent: `[B]` fp32, Σ KL(p_t ‖ p_ref) of these tokens, in nats, where the rule is "kl_total"; else 0.
        trace: the effective λ of each new token, `[B]` fp32 each, NaN where the rule has none; None where it is not
            kept.
    """

    def __init__(
        self,
        rules: Rules,
        lam: torch.Tensor,
        rows: torch.Tensor,
        weights: Sequence[tuple[int, torch.Tensor, torch.Tensor]],
    ):
        self.rules, self.rows, device = rules, rows, rows.device
        self.groups = []
        for name in dict.fromkeys(rule.name for rule in rules.each):
            places = [place for place, rule in enumerate(rules.each) if rule.name == name]
            values = [rules.each[place].value or 0.0 for place in places]
            self.groups.append(
                Group(name, torch.tensor(places, device=device), torch.tensor(values, dtype=FLOAT, device=device))
            )
        schedules = [schedule or ((0, value),) for schedule, value in zip(rules.schedules, lam.tolist(), strict=True)]
        longest = max(map(len, schedules))
        never = torch.iinfo(torch.long).max
        padded = [[*schedule, *[(never, 0.0)] * (longest - len(schedule))] for schedule in schedules]
        self._starts = torch.tensor([[start for start, _ in each] for each in padded], device=device)
        strengths = torch.tensor([[value for _, value in each] for each in padded], dtype=torch.float64)
        self._scheduled = torch.stack([1 - strengths, strengths]).to(device, FLOAT)  # of the reference, of the aligned
        self._weights = weights
        self.lam = self._scheduled[1, :, 0].clone()
        self.position = torch.zeros_like(self._starts[:, 0])
        self.spent = torch.zeros_like(self.lam)
        self.trace: list[torch.Tensor] | None = None

    @property
    def structure(self) -> tuple:
        """What it does, but for the values in its tensors."""
        return tuple(rule.name for rule in self.rules.each), self._starts.shape[1], self.rules.state is not None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that a copy of it may be given by another one of the same structure."""
        values = [group.values for group in self.groups]
        return [self.lam, self.position, self.spent, self._starts, self._scheduled, *values]

    def take(self, other: "Combiner") -> None:
        """Becomes `other`, of the same structure, in the tensors that it has."""
        self.rules = other.rules
        for own, its in zip(self.tensors, other.tensors, strict=True):
            own.copy_(its)

    def restart(self) -> None:
        """At the first token of a completion; nothing is kept of another one."""
        self.trace = None
        self.resume(torch.zeros_like(self.position), torch.zeros_like(self.spent))

    def resume(self, position: torch.Tensor, spent: torch.Tensor) -> None:
        """Amid completions: how many new tokens each has (`[B]` int64), and its nats (`[B]`)."""
        self.position.copy_(position)
        self.spent.copy_(spent)
        self._follow_schedule()

    def join(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The branches' logits `[R, S, V]` to the combined ones `[B, S, V]` (fp32), with the `token_lambda` and
        `token_spent` of a `MixtureOutput`.
        """
        device, places = logits.device, logits.shape[1]
        count = len(self.rules.each)
        combined = logits.new_empty((count, *logits.shape[1:]), dtype=FLOAT)
        lam = torch.empty((count, places), dtype=FLOAT, device=device)
        spent = torch.zeros_like(lam)
        for group in self.groups:
            sequences = group.sequences.to(device)
            reference, aligned = (
                logits.index_select(0, rows.to(device)[sequences]).float().flatten(0, 1) for rows in self.rows
            )
            strengths, values = self.lam.to(device)[sequences], group.values.to(device)
            if group.name == KL_TOTAL:
                values = (values - self.spent.to(device)[sequences]).clamp(min=0)
            strengths, values = (each.repeat_interleave(places) for each in (strengths, values))
            result, chosen = FUNCTIONS[group.name](reference, aligned, strengths, values)
            combined.index_copy_(0, sequences, result.unflatten(0, (-1, places)))
            lam.index_copy_(0, sequences, chosen.unflatten(0, (-1, places)))
            if group.name == KL_TOTAL:
                nats = divergence(log_probs(result), log_probs(reference)).clamp(min=0)
                spent.index_copy_(0, sequences, nats.unflatten(0, (-1, places)))
        return combined, lam, spent

    def advance(self, lam: torch.Tensor | None, spent: torch.Tensor | None) -> None:
        """After a new token of each sequence, with its λ and nats `[B]` from `join`; None where all are linear."""
        if self.trace is not None:
            self.trace.append((self.lam if lam is None else lam).clone())
        if self.rules.state is None:
            return
        if spent is not None:
            self.spent += spent.to(self.spent.device)
        self.position += 1
        self._follow_schedule()

    def _follow_schedule(self) -> None:
        if not any(self.rules.schedules):
            return
        index = (self._starts <= self.position[:, None]).sum(1, keepdim=True) - 1
        now = [each.gather(1, index)[:, 0] for each in self._scheduled]
        self.lam.copy_(now[1])
        for branch, sequences, weights in self._weights:
            weights.copy_(now[branch][sequences])

    def prepare(self, generation_config: GenerationConfig, mode: GenerationMode) -> None:
        """
        Before the first token of a call of `generate`.

        Raises:
            DeRaError: in this mode the state of the completions would not follow them.
        """
        if mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            self.trace = []
        elif (what := self.rules.state) is not None:
            if mode == GenerationMode.ASSISTED_GENERATION:
                raise DeRaError(
                    f"{what} with prompt_lookup_num_tokens is not supported: it needs the token before each token."
                )
            if generation_config.use_cache is False:
                raise DeRaError(f"{what} with beams and use_cache=False is not supported: use a cache.")

    def reorder(self, sequences: torch.Tensor) -> None:
        """Sequence b goes on as `sequences[b]`, as beams of one prompt do."""
        self.spent.copy_(self.spent[sequences.to(self.spent.device)])
