"""lm-evaluation-harness at several λ: its own command line, one load, and results by λ."""

import json
import logging
import math
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import handle_non_serializable, setup_logging

from dera_peft.checkpoint.fingerprint import settings_fingerprint
from dera_peft.checkpoint.source import ModelSource
from dera_peft.decoding.lambdas import Lambda
from dera_peft.errors import DeRaError, first_line
from dera_peft.evaluate.benchmarks import BenchmarkRow, model_fingerprint
from dera_peft.evaluate.harness_model import OWN, USES, check_names, given_fields

TRACKERS = ("wandb_args", "wandb_config_args", "trackio_args", "hf_hub_log_args")
PREDICTED = "bypass"  # the harness's name of what is measured where it only predicts


class Harness:
    """
    What a command line asks of the harness, checked before a model is loaded.

    Args:
        source: the model.
        arguments: of `lm-eval run`.

    Attributes:
        output: the folder for what the harness writes, and in which each λ has its own; None without one.

    Raises:
        DeRaError: the harness refuses them, or they name a model.
        SystemExit: its parser refuses them, and has told why.
    """

    def __init__(self, source: ModelSource, arguments: Sequence[str]):
        setup_logging()
        given = _parse(arguments)
        if source.trust_remote_code:  # of tasks' data, too
            given.trust_remote_code = True
        with _told():
            self.config = EvaluatorConfig.from_cli(given)
        _check_not_given(given, self.config)
        self.uses = {name: value for name, value in self.config.model_args.items() if name != "trust_remote_code"}
        _check_uses(self.uses)
        is_default = self.config.device == EvaluatorConfig().device
        self.source = _on_device(source, given.device or (None if is_default else self.config.device))
        self.output = None if self.config.output_path is None else Path(self.config.output_path)
        if self.output is not None and self.output.suffix == ".json":
            raise DeRaError(
                f"--output_path: {str(self.output)!r} is a file: name a folder, in which each λ has its own."
            )
        with _told():
            self.tasks = self.config.process_tasks({"pretrained": source.resolve().base, **self.config.metadata})
        self.model = model_fingerprint(source.resolve())

    def evaluate(self, lam: Lambda) -> list[BenchmarkRow]:
        """
        Runs the tasks at one λ, and writes what the harness writes into the λ's folder.

        Returns:
            A row for each metric.

        Raises:
            DeRaError: the results can't be written.
        """
        config = self.config
        strength = dict(lam) if isinstance(lam, Mapping) else lam
        model_args = {**given_fields(self.source), "lam": strength, **self.uses}
        file = None if self.output is None else str(self.output / f"lambda_{lam:.12g}" / "results.json")
        tracker = EvaluationTracker(output_path=file)
        python_seed, numpy_seed, torch_seed, fewshot_seed = config.seed or (None,) * 4
        results = simple_evaluate(
            model="dera",
            model_args=model_args,
            tasks=config.tasks,
            num_fewshot=config.num_fewshot,
            batch_size=config.batch_size,
            max_batch_size=config.max_batch_size,
            use_cache=self._cache(model_args),
            cache_requests=config.cache_requests.get("cache_requests", False),
            rewrite_requests_cache=config.cache_requests.get("rewrite_requests_cache", False),
            delete_requests_cache=config.cache_requests.get("delete_requests_cache", False),
            limit=config.limit,
            samples=config.samples,
            check_integrity=config.check_integrity,
            write_out=config.write_out,
            log_samples=config.log_samples,
            evaluation_tracker=tracker,
            system_instruction=config.system_instruction,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.fewshot_as_multiturn,
            gen_kwargs=config.gen_kwargs,
            task_manager=self.tasks,
            predict_only=config.predict_only,
            random_seed=python_seed,
            numpy_random_seed=numpy_seed,
            torch_random_seed=torch_seed,
            fewshot_random_seed=fewshot_seed,
            confirm_run_unsafe_code=config.confirm_run_unsafe_code,
            metadata=config.metadata,
        )
        assert results is not None  # they are of the first of several processes
        samples = results.pop("samples", None)
        if config.show_config:
            shown = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
            sys.stdout.write(f"{shown}\n")  # as the harness does where it is asked to
        if self.output is not None:
            _save(tracker, results, samples or {})
        return self._rows(lam, results)

    def _cache(self, model_args: Mapping[str, Any]) -> str | None:
        """The harness's cache tells requests apart, but not models."""
        if self.config.use_cache is None:
            return None
        return f"{self.config.use_cache}_{settings_fingerprint({**self.source.fingerprint(), **model_args})}"

    def _rows(self, lam: Lambda, results: Mapping[str, Any]) -> list[BenchmarkRow]:
        rows = []
        for task, values in {**results["results"], **results.get("groups", {})}.items():
            shots, counts = results["n-shot"].get(task), results["n-samples"].get(task, {})
            samples = counts.get("effective", values.get("sample_len"))
            run = self._run(task, shots, samples, results)
            for key, value in values.items():
                metric, comma, kind = key.partition(",")
                if not comma or metric.endswith("_stderr") or metric == PREDICTED:
                    continue
                rows.append(
                    BenchmarkRow(
                        run=run,
                        model=self.model,
                        lam=lam,
                        task=task,
                        metric=metric,
                        filter=kind,
                        value=_number(value),
                        stderr=_number(values.get(f"{metric}_stderr,{kind}")),
                        samples=samples,
                        num_fewshot=shots,
                        higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                    )
                )
        return rows

    def _run(self, task: str, shots: int | None, samples: int | None, results: Mapping[str, Any]) -> str:
        """The fingerprint of all that a task's results depend on beside λ."""
        config = self.config
        return settings_fingerprint(
            {
                "model": self.source.fingerprint(),
                "uses": self.uses,
                "task": [task, results["versions"].get(task), shots, samples, results["group_subtasks"].get(task)],
                "generation": [results["configs"].get(task, {}).get("generation_kwargs"), config.seed],
                "documents": [config.limit, config.samples],
                "prompts": [config.apply_chat_template, config.system_instruction, config.fewshot_as_multiturn],
                "lm_eval": version("lm_eval"),
            }
        )


def _parse(arguments: Sequence[str]) -> Namespace:
    """By the harness's own parser, which reads `sys.argv`."""
    if not arguments:
        raise DeRaError("--tasks is missing: name what to evaluate; `lm-eval ls tasks` lists the tasks.")
    kept, sys.argv = sys.argv, ["lm-eval", "run", *arguments]
    try:
        return HarnessCLI().parse_args()
    finally:
        sys.argv = kept


def _check_not_given(given: Namespace, config: EvaluatorConfig) -> None:
    """What belongs to another model, or to one run alone, is refused."""
    model = given.model or ("dera" if config.model == EvaluatorConfig().model else config.model)
    if model != "dera":
        raise DeRaError(f"--model: {model!r}: this command evaluates a model of its own; leave it out.")
    for name in TRACKERS:
        if getattr(config, name):
            raise DeRaError(
                f"--{name}: a tracker is for one run, and each λ is one; give --output_path, and log the results_* "
                "files of its folders."
            )
    if not config.tasks:
        raise DeRaError("--tasks is missing: name what to evaluate; `lm-eval ls tasks` lists the tasks.")


def _check_uses(uses: Mapping[str, Any]) -> None:
    for name in uses:
        if name in OWN:
            raise DeRaError(f"--model_args: {name!r} is an option of its own here: {OWN[name]}.")
    check_names(uses, USES, "--model_args")


def _on_device(source: ModelSource, device: str | None) -> ModelSource:
    if device is None:
        return source
    if source.device_map is not None:
        raise DeRaError(f"--device {device} and --device-map {source.device_map} say the same; give one of them.")
    return replace(source, device_map=device)


@contextmanager
def _told() -> Iterator[None]:
    """What the harness refuses is the user's to mend."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise DeRaError(f"lm-eval: {first_line(error)}") from error


def _save(tracker: EvaluationTracker, results: dict[str, Any], samples: Mapping[str, Any]) -> None:
    with _warnings_raised(tracker.output_path):
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, of_task in samples.items():
            tracker.save_results_samples(task_name=task, samples=of_task)


@contextmanager
def _warnings_raised(file: str) -> Iterator[None]:
    """The harness only warns where it can't write results."""

    def refuse(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            cause = sys.exc_info()[1]
            raise DeRaError(f"{str(Path(file).parent)!r}: {record.getMessage()}: {cause}") from cause
        return True

    writer = logging.getLogger(EvaluationTracker.__module__)
    writer.addFilter(refuse)
    try:
        yield
    finally:
        writer.removeFilter(refuse)


def _number(value: Any) -> float | None:
    """The harness writes "N/A" where it has no number, and JSON has none that is not finite."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None
