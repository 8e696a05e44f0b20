"""Which rows of a batch belong to which branch, and with which weight they are joined."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import torch

from dera_peft.engine.combiner import Combiner
from dera_peft.engine.names import ALIGNED, REFERENCE
from dera_peft.engine.rules import Rules
from dera_peft.errors import DeRaError

ROUNDING = 1e-6  # of a sum of λ that were given as float32


@dataclass(frozen=True)
class Branch:
    """A run of rows that see the same adapters, each added to the base; no adapters means the base itself."""

    name: str
    adapters: tuple[str, ...] = ()


# of a model without adapters, whose branches differ by their prompts
WITHOUT_ADAPTERS = (Branch(REFERENCE), Branch(ALIGNED))


def make_branches(reference: Sequence[str], aligned: Mapping[str, str], stacked: bool = True) -> list[Branch]:
    """
    The branches of a reference and its aligned models.

    Args:
        reference: the adapters that make the reference of the base; none for the base itself.
        aligned: branch name -> adapter.
        stacked: whether the aligned adapters come on top of the reference's, or replace them.
    """
    if REFERENCE in aligned:
        raise DeRaError(f"{REFERENCE!r} is the reference's branch; give the aligned adapter another name.")
    if not aligned:
        raise DeRaError("no aligned adapter is named: name at least one with adapter or adapters.")
    under = tuple(reference) if stacked else ()
    if both := set(under) & set(aligned.values()):
        raise DeRaError(f"adapter {both.pop()!r} is named both as the reference's and as aligned.")
    return [
        Branch(REFERENCE, tuple(reference)),
        *(Branch(name, (*under, adapter)) for name, adapter in aligned.items()),
    ]


def read_lam(lam, batch_size: int, aligned: Sequence[str]) -> torch.Tensor:
    """
    λ as a caller may write it, as one row of weights per sequence.

    Args:
        lam: a number for all sequences; one per sequence as a list or a 1-D tensor of length B; a `[B, K]` tensor with
            one per sequence and aligned branch; a dict from the branch's name to a number or one per sequence, in which
            a name that is left out is 0; or a list of dicts, one per sequence.
            A 1-D λ is for a model with one aligned branch.
        batch_size: B, the number of prompts, before beams or return sequences expand it.
        aligned: the K names of the aligned branches.

    Returns:
        `[B, K]` float64 on the CPU.

    Raises:
        DeRaError: λ is not a number that is finite in float32, or its count fits neither the prompts nor the branches.
    """
    if isinstance(lam, Sequence) and len(lam) > 0 and all(isinstance(each, Mapping) for each in lam):
        names = dict.fromkeys(name for each in lam for name in each)
        lam = {name: [each.get(name, 0.0) for each in lam] for name in names}
    if isinstance(lam, Mapping):
        unknown = [name for name in lam if name not in aligned]
        if unknown:
            raise DeRaError(f"lam names {unknown[0]!r}, which is not an aligned branch; there are: {list(aligned)}.")
        if not lam:
            raise DeRaError(f"lam={{}} names no aligned branch; there are: {list(aligned)}.")
        columns = [read_lam(lam.get(name, 0.0), batch_size, [name]) for name in aligned]
        return torch.cat(columns, dim=1)
    try:
        values = torch.as_tensor(lam, dtype=torch.float64, device="cpu").detach()
        is_bool = torch.as_tensor(lam).dtype == torch.bool
    except (TypeError, ValueError, RuntimeError):
        raise DeRaError(f"lam must be a number, or one per sequence; got {lam!r}.") from None
    if is_bool:
        raise DeRaError(f"lam must be a number, not a truth value; got {lam!r}.")
    if not torch.isfinite(values.float()).all():  # the weights of the join are float32
        raise DeRaError(f"lam must be finite in float32; got {lam!r}.")
    if values.ndim < 2 and len(aligned) != 1:
        raise DeRaError(
            f"lam={lam!r} gives one weight, and the model has {len(aligned)} aligned branches {list(aligned)}: "
            "pass a dict by name, or a [B, K] tensor."
        )
    if values.ndim == 0:
        values = values.expand(batch_size)
    if values.ndim == 1:
        values = values[:, None]
    if values.shape != (batch_size, len(aligned)):
        raise DeRaError(
            f"lam has shape {list(values.shape)} (sequences, aligned branches), and the batch needs "
            f"[{batch_size}, {len(aligned)}]: give one λ for all, or exactly one per prompt (before beams and return "
            "sequences expand them)."
        )
    return values


def branch_weights(lam: torch.Tensor) -> torch.Tensor:
    """
    `[B, K]` λ to the weights of the reference and the aligned branches, `[B, K+1]`, which sum to one.

    Where λ sums to one but for the rounding of float32, it is taken to do so, and the reference has weight zero.
    """
    total = lam.sum(dim=1, keepdim=True)
    is_whole = (total - 1.0).abs() < ROUNDING
    return torch.cat([torch.where(is_whole, 0.0, 1.0 - total), torch.where(is_whole, lam / total, lam)], dim=1)


@dataclass(frozen=True)
class Segment:
    """The contiguous rows `start:stop` of one branch, and the sequences they stand for."""

    branch: Branch
    start: int
    stop: int
    sequences: torch.Tensor  # [n] int64, ascending: row start+i belongs to sequence sequences[i]
    weights: torch.Tensor  # [n] float32


class BatchPlan:
    """
    The rows that a forward pass computes for B sequences, made once on the host and then fixed.

    Each branch owns a contiguous run of the R rows, with one row for each sequence that gives it a weight other than
    zero (for every sequence with `every_branch`). The join is z[b] = Σ_k weights[b, k] · z_k[b], for which the weights
    of a sequence sum to one: z_λ = (1-Σλ_k)·z_ref + Σ λ_k·z_k (Liu et al., arXiv 2402.02992).

    Args:
        branches: K+1 branches, the reference first.
        lam: `[B, K]` float64, from `read_lam`.
        device: where the index and weight tensors live.
        every_branch: compute all branches for all sequences, also at weight zero.
        rules: of the sequences, where not all are joined by this sum at a λ that stays.
    """

    reads_rows = False  # whether a forward pass is given the R rows themselves, and not one for each sequence

    def __init__(
        self,
        branches: Sequence[Branch],
        lam: torch.Tensor,
        device: torch.device | str = "cpu",
        every_branch: bool = False,
        rules: Rules | None = None,
    ):
        self.branches = tuple(branches)
        self.lam = lam
        self.device = torch.device(device)
        self.every_branch = every_branch
        self.rules = rules
        self.batch_size = lam.shape[0]

        weights = branch_weights(lam)
        computed = weights != 0 if rules is None else torch.tensor(rules.needed(weights[:, 1].tolist()))
        if every_branch:
            computed = torch.ones_like(computed)
        self.segments: list[Segment] = []
        start = 0
        for index, branch in enumerate(self.branches):
            sequences = computed[:, index].nonzero()[:, 0]
            stop = start + len(sequences)
            if stop > start:
                own = weights[sequences, index].to(self.device, torch.float32)
                self.segments.append(Segment(branch, start, stop, sequences.to(self.device), own))
            start = stop
        self.num_rows = start
        # [K+1, B] int64: the row of each branch of a sequence; that of its first one in place of those not computed
        row_of = (computed.T.flatten().cumsum(0) - 1).view_as(computed.T)
        first = row_of.gather(0, computed.T.int().argmax(0)[None])
        self.row_of = torch.where(computed.T, row_of, first).to(self.device)
        self.combiner = None
        if rules is not None:
            follow = [(self.branches.index(each.branch), each.sequences, each.weights) for each in self.segments]
            self.combiner = Combiner(rules, weights[:, 1], self.row_of, follow)
        # two plans with one pattern can share a KV cache
        self.pattern: tuple[tuple, ...] = tuple(map(tuple, computed.tolist()))

        source = torch.cat([segment.sequences for segment in self.segments])
        self.is_identity = len(self.segments) == 1 and len(source) == self.batch_size
        self.source = source  # [R] int64: the sequence of each row
        # adapter name -> a further scale of its delta for each row; none where logits are mixed
        self.adapter_scale: dict[str, torch.Tensor] = {}
        self._runs: dict[frozenset[str], list[tuple[slice, BatchPlan]]] = {}

    @property
    def structure(self) -> tuple:
        """What a forward pass does under this plan; two plans of one structure differ in the values of λ alone."""
        combiner = None if self.combiner is None else self.combiner.structure
        return (type(self), self.branches, self.pattern, self.every_branch, combiner)

    def copy(self) -> "BatchPlan":
        """The same plan in tensors of its own, at the start of its completions."""
        return type(self)(self.branches, self.lam, self.device, self.every_branch, self.rules)

    def take_lam(self, other: "BatchPlan") -> None:
        """Becomes `other`, of the same structure, in the tensors that it has: they may be part of a recorded step."""
        self.lam, self.pattern = other.lam, other.pattern
        for segment, its in zip(self.segments, other.segments, strict=True):
            segment.weights.copy_(its.weights)
        for name, scale in self.adapter_scale.items():
            scale.copy_(other.adapter_scale[name])
        if self.combiner is not None:
            assert other.combiner is not None  # of one structure
            self.rules = other.rules
            self.combiner.take(other.combiner)

    def expand(self, repeats: int) -> "BatchPlan":
        """The plan for a batch in which each sequence stands `repeats` times in a row, as for beams."""
        if repeats == 1:
            return self
        rules = None if self.rules is None else self.rules.repeat(repeats)
        lam = self.lam.repeat_interleave(repeats, dim=0)
        return type(self)(self.branches, lam, self.device, self.every_branch, rules)

    @property
    def token_lambda(self) -> torch.Tensor | None:
        """`[B, T]` fp32, the λ at each new token of the last `generate`, NaN where a rule has none; None at plain λ."""
        trace = None if self.combiner is None else self.combiner.trace
        return torch.stack(trace, dim=1) if trace else None

    @property
    def behind_head(self) -> Combiner | None:
        """What joins the branches' logits, where a rule needs those of both."""
        return None if self.rules is None or self.rules.is_linear else self.combiner

    @property
    def num_inputs(self) -> int:
        """The number of rows that a forward pass is given."""
        return self.num_rows if self.reads_rows else self.batch_size

    def first_forked(self, fork_layer: int) -> int:
        """The first layer that computes the branches' rows, of a model that forks before `fork_layer`."""
        return 0 if self.reads_rows else fork_layer

    def runs(self, adapters: frozenset[str]) -> list[tuple[slice, "BatchPlan"]]:
        """
        The rows that see the same of `adapters`, contiguous and with the plan of a batch of them alone, for what has to
        be computed one branch after the other. Made once.
        """
        if adapters not in self._runs:
            found: list[tuple[slice, tuple[str, ...]]] = []
            for segment in self.segments:
                seen = tuple(name for name in segment.branch.adapters if name in adapters)
                if found and found[-1][1] == seen:
                    found[-1] = (slice(found[-1][0].start, segment.stop), seen)
                else:
                    found.append((slice(segment.start, segment.stop), seen))
            self._runs[adapters] = [
                (rows, BatchPlan([Branch("alone", seen)], self.lam.new_zeros(rows.stop - rows.start, 0), self.device))
                for rows, seen in found
            ]
        return self._runs[adapters]

    def fork(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[B, ...]` to the rows of the branches, `[R, ...]`."""
        return tensor if self.is_identity else tensor.index_select(0, self.source.to(tensor.device))

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        """`[R, ...]` to the weighted sums over each sequence's branches, `[B, ...]`; summed in fp32."""
        if self.is_identity and not self.every_branch:
            return rows  # one branch at weight one
        mixed = rows.new_zeros((self.batch_size, *rows.shape[1:]), dtype=torch.float32)
        for segment in self.segments:
            weights = segment.weights.to(rows.device).view(-1, *[1] * (rows.ndim - 1))
            # no sequence stands twice in a segment, so this sum has one order and is reproducible on a GPU too
            mixed.index_add_(0, segment.sequences.to(rows.device), rows[segment.start : segment.stop].float() * weights)
        return mixed.to(rows.dtype)

    def join_log_probs(self, logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """
        The branches' logits `[R, S, V]` to log Π_k p_k^w_k, `[B, S, V]` in fp32, and `log_z`, `[B, S]`: the log of its
        sum over the vocabulary, which is 0 of one branch alone.
        """
        joined = self.join(logits.float().log_softmax(-1))
        joined = joined.masked_fill(~joined.isfinite(), -torch.inf)  # a token without probability in a branch
        is_single = (branch_weights(self.lam) != 0).sum(1, keepdim=True) == 1
        return joined, {"log_z": joined.logsumexp(-1).masked_fill(is_single.to(joined.device), 0)}

    def split(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """`[R, ...]` to one `[B, ...]` per branch, of a plan with `every_branch`."""
        return {segment.branch.name: rows[segment.start : segment.stop] for segment in self.segments}

    def rows_in(self, filled: "BatchPlan", sequences: torch.Tensor) -> torch.Tensor:
        """
        Where this plan's rows are found among those of another plan of the same branches, `[R]` int64.

        Args:
            filled: computes, for each sequence, at least the branches that this plan needs for it.
            sequences: `[B]` int64, that of `filled` which each of this plan's is. Beams of one prompt share its λ.
        """
        return self.rows_among(filled.row_of.to(sequences.device)[:, sequences])

    def rows_among(self, row_of: torch.Tensor) -> torch.Tensor:
        """This plan's rows, `[R]`, by the row of each branch of each of its sequences (`[K+1, B]`, as `row_of`)."""
        return row_of[self._branch_of_row.to(row_of.device), self.source.to(row_of.device)]

    @cached_property
    def _branch_of_row(self) -> torch.Tensor:
        found = [self.branches.index(each.branch) for each in self.segments for _ in range(each.start, each.stop)]
        return torch.tensor(found, device=self.device)

    @cached_property
    def adapter_rows(self) -> dict[str, list[slice]]:
        """Adapter name -> the rows that it touches, in few slices; `slice(None)` for one that all branches share."""
        common = set.intersection(*(set(branch.adapters) for branch in self.branches))
        # in the branches' order, so that sums have one order in every process
        names = dict.fromkeys(name for branch in self.branches for name in branch.adapters)
        rows: dict[str, list[slice]] = {name: [slice(None)] for name in names if name in common}
        for segment in self.segments:
            for name in segment.branch.adapters:
                if name in common:
                    continue
                slices = rows.setdefault(name, [])
                if slices and slices[-1].stop == segment.start:
                    slices[-1] = slice(slices[-1].start, segment.stop)
                else:
                    slices.append(slice(segment.start, segment.stop))
        return rows

    def __repr__(self) -> str:
        runs = ", ".join(f"{s.branch.name}: {s.stop - s.start}" for s in self.segments)
        return f"{type(self).__name__}({self.batch_size} sequences in {self.num_rows} rows; {runs})"


class WeightPlan(BatchPlan):
    """
    One row a sequence, in which each adapter's delta is scaled by the weights of the branches that have it.

    For one aligned adapter this is W + λ·s·BA, a mixture of weights instead of logits (alignment vectors,
    task arithmetic): one pass, and an approximation of DeRa. What all branches share has scale 1.
    """

    def __init__(
        self,
        branches: Sequence[Branch],
        lam: torch.Tensor,
        device: torch.device | str = "cpu",
        every_branch: bool = False,
    ):
        if every_branch:
            raise DeRaError('a model with mixing="weights" has no branches whose logits could be returned.')
        names = list(dict.fromkeys(name for branch in branches for name in branch.adapters))
        single = Branch("weights", tuple(names))
        super().__init__([single], lam[:, :0], device)
        self.lam = lam
        self.mixed_branches = tuple(branches)
        weights = branch_weights(lam)
        common = set.intersection(*(set(branch.adapters) for branch in branches))
        for name in names:
            if name not in common:
                has_it = torch.tensor([name in branch.adapters for branch in branches], dtype=weights.dtype)
                self.adapter_scale[name] = (weights @ has_it).to(self.device, torch.float32)
        self.adapter_rows = {name: [slice(None)] for name in names if name in common or self.adapter_scale[name].any()}
        self.pattern = tuple(map(tuple, lam.tolist()))  # keys and values depend on λ itself

    @property
    def structure(self) -> tuple:
        return (type(self), self.mixed_branches, self.batch_size, tuple(self.adapter_rows))

    def copy(self) -> "WeightPlan":
        return WeightPlan(self.mixed_branches, self.lam, self.device)

    def expand(self, repeats: int) -> "WeightPlan":
        if repeats == 1:
            return self
        return WeightPlan(self.mixed_branches, self.lam.repeat_interleave(repeats, dim=0), self.device)


def check_default_lam(lam: float | Mapping[str, float], aligned: Sequence[str] = (ALIGNED,)) -> float | dict:
    """
    A model's default λ: one finite number, or one for each aligned branch by name.

    Raises:
        DeRaError: it is something else, or names another branch.
    """
    if isinstance(lam, Mapping):
        if unknown := [name for name in lam if name not in aligned]:
            raise DeRaError(f"the default λ names {unknown[0]!r}, which is not an aligned branch: {list(aligned)}.")
        if not lam:
            raise DeRaError(f"the default λ is {{}}; name the aligned branches: {list(aligned)}.")
        values = {name: check_default_lam(value) for name, value in lam.items()}
        return values if len(aligned) > 1 else values.get(aligned[0], 0.0)
    number: Any = lam
    if getattr(lam, "ndim", None) == 0:  # one of numpy or torch
        number = number.item()
    limit: Any = torch.finfo(torch.float32).max
    if isinstance(number, bool) or not isinstance(number, Real) or not abs(number) <= limit:
        raise DeRaError(f"the default λ must be one number, finite in float32; got {lam!r}.")
    return float(number)
