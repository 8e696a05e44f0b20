"""One process of a sweep: decodes, scores and rewards its prompts, and keeps every row in the sweep's folder."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from dera_peft.checkpoint.devices import free_memory
from dera_peft.checkpoint.fingerprint import settings_fingerprint
from dera_peft.decoding.decoder import Decoder
from dera_peft.decoding.lambdas import Lambda, values_of
from dera_peft.decoding.prompts import Prompt, column_names
from dera_peft.decoding.rows import Expected
from dera_peft.engine.names import LOGITS
from dera_peft.evaluate.analysis.curve import reason_off
from dera_peft.evaluate.arms import Arm
from dera_peft.evaluate.config import SweepConfig
from dera_peft.evaluate.points import anchors, fine_grid
from dera_peft.evaluate.report.samples import viewed_rows
from dera_peft.evaluate.rows import CompletionRow, Key, RewardRow, ScoreRow, open_log
from dera_peft.evaluate.scorer import Scorer
from dera_peft.model import DeRaModel
from dera_peft.progress import Progress
from dera_peft.remote.decoders import open_decoder
from dera_peft.rewards.calls import Failures
from dera_peft.rewards.functions import NamedReward, call_reward_or_mark, columns_of
from dera_peft.rewards.judges import NamedJudge, judge_or_mark
from dera_peft.rewards.models import RewardModel

CALLED_AT_ONCE = 32  # completions that a reward or a judge gets in one call, where no batch size is given


@dataclass
class SweepWorker:
    """
    One process of a sweep. It computes the rows that its prompts lack; it has read the rows of all processes.

    Attributes:
        arms, prompts: all of the sweep's.
        tokens: token ids of each prompt, by its index.
        reference_tokens: of those that the reference reads, where they are others.
        own_indices: of the prompts that this process works on.
        rank: of this process, which has files of its own.
    """

    config: SweepConfig
    arms: Sequence[Arm]
    prompts: Sequence[Prompt]
    tokens: Sequence[Sequence[int]]
    reference_tokens: Sequence[Sequence[int]] | None
    tokenizer: PreTrainedTokenizerBase
    own_indices: Sequence[int]
    device_map: Any
    folder: Path
    rank: int
    progress: Progress

    def __post_init__(self):
        self.grid = fine_grid([lam for lam in self.arms[0].lambdas if lam is not None])
        self.reads_grid = reason_off(self.config.sampling, self.config.curve) is None
        grid = self.grid if self.reads_grid else None
        self.scorer = Scorer(self.tokens, self.reference_tokens, self.tokenizer, grid, self.config.temperature)
        self.columns = column_names(self.prompts)
        self.read_files()

    def read_files(self) -> None:
        """Reads the rows that all processes have written so far."""
        runs = {arm.name: arm.run for arm in self.arms}

        def expected(row: CompletionRow) -> Expected | None:
            if row.arm not in runs or row.prompt_index >= len(self.prompts):
                return None
            prompt = self.prompts[row.prompt_index]
            return Expected(prompt.source, {"prompt": prompt.content}, run=runs[row.arm], run_name=f"arm {row.arm!r}: ")

        self.completion_log = open_log(self.folder, CompletionRow, self.rank, expected)
        self.score_log = open_log(self.folder, ScoreRow, self.rank)
        self.reward_log = open_log(self.folder, RewardRow, self.rank)
        self.completions = {row.key: row for row in self.completion_log.rows if expected(row)}

    def add_lambda(self, lam: Lambda) -> None:
        """Plain λ is decoded at a further λ, one of the fine grid, which stays as it is."""
        plain, *others = self.arms
        lambdas = tuple(sorted({*cast("tuple[Lambda, ...]", plain.lambdas), lam}, key=values_of))
        self.arms = [replace(plain, lambdas=lambdas), *others]

    # -- which rows there are ---------------------------------------------------------------------------------------

    def keys(self, arm: Arm, indices: Iterable[int]) -> list[Key]:
        return [
            Key(arm.name, index, lam, sample)
            for index in indices
            for lam in arm.lambdas
            for sample in range(self.config.samples)
        ]

    def all_keys(self, indices: Iterable[int]) -> list[Key]:
        indices = list(indices)
        return [key for arm in self.arms for key in self.keys(arm, indices)]

    # -- completions and scores ---------------------------------------------------------------------------------------

    def decode_and_score(self, arms: Sequence[Arm]) -> None:
        """
        Decodes and scores what is missing of arms that share a model. It is loaded only if something is, and freed;
        where vLLM decodes, that has ended before.
        """
        if not any(self._missing(arm) or self._unscored(arm) for arm in arms):
            return
        load = cache(lambda: arms[0].load(self.device_map))
        self._decode_missing(arms, load)
        for arm in arms:
            if todo := self._unscored(arm):
                self._score(arm, load(), todo)
        del load
        free_memory()

    def _decode_missing(self, arms: Sequence[Arm], load: Callable[[], DeRaModel]) -> None:
        missing = [(arm, todo) for arm in arms if (todo := self._missing(arm))]
        if not missing:
            return
        with open_decoder(
            self.config, arms[0].source, self.tokenizer, load, self.config.batch_size, scores=True
        ) as decoder:
            for arm, todo in missing:
                self._decode(arm, decoder, todo)

    def _missing(self, arm: Arm) -> list[Key]:
        return [key for key in self.keys(arm, self.own_indices) if key not in self.completions]

    def _decode(self, arm: Arm, decoder: Decoder, todo: Sequence[Key]) -> None:
        requests = [arm.request(key) for key in todo]
        total = len(self.keys(arm, self.own_indices))
        with self.progress(f"decoding, {arm.name}", total, total - len(todo)) as advance:
            for completions in decoder.decode(
                self.tokens,
                requests,
                self.config.sampling,
                reference_prompts=self.reference_tokens,
                particles=arm.particles,
            ):
                rows = [
                    CompletionRow(
                        arm.run,
                        *arm.key(each.request),
                        prompt=self.prompts[each.request.index].content,
                        completion=each.text,
                        token_ids=each.tokens,
                        finish_reason=each.finish_reason,
                        token_lambda=each.token_lambda,
                        log_z=None if each.exact is None else each.exact.log_z,
                    )
                    for each in completions
                ]
                self.completions.update((row.key, row) for row in self.completion_log.append(rows))
                advance(len(rows))

    def score_run(self, key: Key) -> str:
        """Fingerprint of everything that the score of a completion depends on."""
        row = self.completions[key]
        grid = self.grid if key.arm == LOGITS and self.reads_grid else None
        return settings_fingerprint([row.run, row.token_ids, grid])

    def scores(self) -> dict[Key, ScoreRow]:
        rows = (row for row in self.score_log.rows if row.key in self.completions)
        return {row.key: row for row in rows if row.run == self.score_run(row.key)}

    def _unscored(self, arm: Arm) -> dict[Key, bool]:
        """The completions without a complete score, and whether the report shows their tokens."""
        decoded = [key for key in self.keys(arm, self.own_indices) if key in self.completions]
        rows = [
            {"key": key, "prompt_index": key.index, "sample": key.sample, "num_tokens": len(row.token_ids)}
            for key, row in ((key, self.completions[key]) for key in decoded)
        ]
        # chosen among this process's rows: at least those that the report will choose among all rows
        viewed = {row["key"] for row in viewed_rows(rows)} if rows and arm.mixing == LOGITS else set()
        scores = self.scores()
        return {
            key: key in viewed
            for key in decoded
            if key not in scores or (key in viewed and scores[key].token_views is None)
        }

    def _score(self, arm: Arm, model: DeRaModel, todo: Mapping[Key, bool]) -> None:
        with self.progress(f"scoring, {arm.name}", len(todo), 0) as advance:
            for with_views in (True, False):
                rows = [self.completions[key] for key, is_shown in todo.items() if is_shown == with_views]
                for key, values in self.scorer.score(arm, model, rows, with_views):
                    self.score_log.append([ScoreRow(self.score_run(key), *key, **values)])
                    advance(1)

    # -- rewards and verdicts -------------------------------------------------------------------------------------

    def reward_run(self, reward: NamedReward, key: Key) -> str:
        return settings_fingerprint(
            [reward.fingerprint, self.prompts[key.index].columns, self.completions[key].completion]
        )

    def judge_run(self, judge: NamedJudge, key: Key, other: Key) -> str:
        texts = [self.completions[each].completion for each in (key, other)]
        return settings_fingerprint([judge.fingerprint, self.config.seed, *texts])

    def rewards(self) -> dict[tuple[str, Key, str], RewardRow]:
        """
        The rows of rewards and verdicts by name, completion and fingerprint; of several one without an error.

        A reward that has changed, or another text, has another fingerprint, so that its old rows are not found.
        """
        rows: dict[tuple[str, Key, str], RewardRow] = {}
        for row in self.reward_log.rows:
            place = row.name, row.key, row.run
            if place not in rows or rows[place].error is not None:
                rows[place] = row
        return rows

    def call_reward(self, reward: NamedReward) -> None:
        """Rewards the completions that a reward has no value for, or failed on. A reward model is freed."""

        function = reward.function
        assert function is not None  # the values of a built-in one are taken from the scores

        def call(keys: Sequence[Key], failures: Failures) -> list[tuple[float | None, str | None]]:
            prompts = [self.prompts[key.index] for key in keys]
            return call_reward_or_mark(
                function,
                [prompt.content for prompt in prompts],
                [self.completions[key].completion for key in keys],
                columns_of(prompts, self.columns),
                token_ids=[self.completions[key].token_ids for key in keys],
                chat=self.config.chat,
                failures=failures,
            )

        places = {(reward.name, key, self.reward_run(reward, key)): key for key in self.all_keys(self.own_indices)}
        self._call_for("reward", reward.name, places, call)
        if isinstance(function, RewardModel):
            function.free()

    def comparisons(self, keys: Iterable[Key]) -> list[tuple[str, Key, Key]]:
        """(name, completion, the one that it is compared with): at each of `anchors`, of the same prompt and sample."""
        pairs = []
        for lam in anchors(self.arms[0].lambdas):
            others = [(key, Key(LOGITS, key.index, lam, key.sample)) for key in keys]
            pairs += [(f"judge {lam:g}", key, other) for key, other in others if key != other]
        return pairs

    def call_judge(self, judge: NamedJudge) -> None:
        """Compares the pairs that the judge has no verdict on, or failed on."""

        def call(pairs: Sequence[tuple[str, Key, Key]], failures: Failures) -> list[tuple[int | None, str | None]]:
            return judge_or_mark(
                judge,
                [self.prompts[key.index].content for _, key, _ in pairs],
                [self.completions[key].completion for _, key, _ in pairs],
                [self.completions[other].completion for _, _, other in pairs],
                [(self.config.seed, name, *key) for name, key, _ in pairs],
                failures,
            )

        pairs = self.comparisons(self.all_keys(self.own_indices))
        places = {(name, key, self.judge_run(judge, key, other)): (name, key, other) for name, key, other in pairs}
        self._call_for("judge", judge.name, places, call)

    def _call_for(self, kind: str, called: str, places: Mapping[tuple[str, Key, str], Any], call: Callable) -> None:
        """
        Appends a row for each place (name, completion, fingerprint) that has no value yet, or an error.

        Args:
            kind, called: what is called, for messages.
            places: the item that `call` takes for each place.
            call: from some of these items, and what has failed so far, to (value, error) of each.
        """
        rows = self.rewards()
        todo = [place for place in places if place not in rows or rows[place].error is not None]
        if not todo:
            return
        has_worked = any(place in rows and rows[place].error is None for place in places)
        failures = Failures(f"the {kind} {called!r}", has_worked)
        with self.progress(f"{kind}, {called}", len(places), len(places) - len(todo)) as advance:
            at_once = self.config.batch_size or CALLED_AT_ONCE
            for start in range(0, len(todo), at_once):
                batch = todo[start : start + at_once]
                values = call([places[place] for place in batch], failures)
                self.reward_log.append(
                    RewardRow(run, *key, name=name, value=value, error=error)
                    for (name, key, run), (value, error) in zip(batch, values, strict=True)
                )
                advance(len(batch))
