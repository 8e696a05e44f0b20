"""
Completions for a parquet file of prompts on a Ray cluster: Ray Data hands the prompts to actors, a `DeRaModel` in each.

    pip install 'dera-peft[ray]'
    python examples/ray_generate.py --adapter ADAPTER --prompts prompts.parquet --lambda 0,0.5,1 --output out --actors 8

It runs on the cluster that `RAY_ADDRESS` names, else on this machine. The file, or folder of files, has a column
`prompt`, a text or with --chat messages, and perhaps `lambda`, a number or a list of them. The output is a folder of
parquet files with the columns of `SCHEMA`, which every machine sees; `prompt_index` is the prompt's row, from 0.

- The completions are those of `dera generate` with the same settings: random numbers belong to the row and the sample,
  and not to the actor or the batch.
- Run again, a run that was stopped goes on: what is there is not decoded again. With more λ or samples it adds these.
  A folder of other prompts or settings is an error.
- Where a machine is lost, Ray has another one decode what it was at.
- It is for one aligned adapter.
"""

import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dera_peft.quiet import be_quiet

be_quiet()

import numpy
import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import ray
import typer

from dera_peft import DeRaModel
from dera_peft.checkpoint.fingerprint import settings_fingerprint
from dera_peft.checkpoint.source import ModelSource
from dera_peft.cli.app import CONTEXT
from dera_peft.cli.options import command
from dera_peft.cli.program import run_program, split_debug
from dera_peft.decoding.batch_size import batch_size_setting
from dera_peft.decoding.batching import decode
from dera_peft.decoding.lambdas import for_adapters, lambdas_setting
from dera_peft.decoding.prompts import Prompt, encode, from_rows
from dera_peft.decoding.requests import Request
from dera_peft.decoding.rows import GeneratedRow, to_json
from dera_peft.decoding.rule_settings import RuleSettings
from dera_peft.decoding.sampling import Sampling
from dera_peft.errors import DeRaError
from dera_peft.lock import hold
from dera_peft.messages import messages_on_stderr
from dera_peft.settings import AT_LEAST_1, Check, part, setting

SCHEMA = pyarrow.schema(
    {
        "run": pyarrow.string(),
        "prompt_index": pyarrow.int64(),
        "lambda": pyarrow.float64(),
        "sample": pyarrow.int64(),
        "prompt": pyarrow.string(),  # of a chat its JSON
        "completion": pyarrow.string(),
        "num_tokens": pyarrow.int64(),
        "finish_reason": pyarrow.string(),
        "token_ids": pyarrow.list_(pyarrow.int64()),
        "end_token_id": pyarrow.int64(),
    }
)
KEY = ("prompt_index", "lambda", "sample")
KEYS = numpy.dtype([("prompt_index", "i8"), ("lambda", "f8"), ("sample", "i8")])
REQUESTS = "requests"  # of a row that an actor is given: (λ, sample) of each completion that is missing
NOT_NEGATIVE = Check(lambda value: value >= 0, "at least 0")

logger = logging.getLogger("dera_peft")


@dataclass(frozen=True, kw_only=True)
class RaySettings(RuleSettings, Sampling, ModelSource):
    prompts: str = setting(help="A parquet file of prompts, or a folder of them.", metavar="FILE", panel="Prompts")
    output: Path = setting(help="A folder for the completions, which every machine sees.", metavar="DIR")
    lambdas: tuple[float, ...] = lambdas_setting((), "Strengths of prompts without a λ of their own.", "Prompts")
    chat: bool = setting(False, "Render prompts with the tokenizer's chat template.", panel="Prompts")
    samples: int = setting(1, "Completions per prompt and λ.", check=AT_LEAST_1, metavar="N", panel="Sampling")
    batch_size: int | None = batch_size_setting("Sampling")
    rows: int = setting(64, "Prompts that an actor is given at once; what a stop loses.", check=AT_LEAST_1, metavar="N")
    actors: int = setting(1, "Models that decode at the same time.", check=AT_LEAST_1, metavar="N")
    cpus: float = setting(1.0, "CPUs of an actor.", check=NOT_NEGATIVE, metavar="N")
    gpus: float | None = setting(
        None, "GPUs of an actor. One unless given, where the cluster has any.", check=NOT_NEGATIVE, metavar="N"
    )

    @property
    def source(self) -> ModelSource:
        return part(self, ModelSource)

    @property
    def sampling(self) -> Sampling:
        return part(self, Sampling)


class Generator:
    """An actor: a model, and the completions of the prompts that it is given."""

    def __init__(self, settings: RaySettings, run: str, folder: str):
        be_quiet()
        if Path(folder).is_dir():  # where the driver was started, for paths that are relative to it
            os.chdir(folder)
        source = settings.source.placed()
        self.settings, self.run = settings, run
        self.config, self.tokenizer, self.model = source.config, source.tokenizer(), DeRaModel.from_source(source)

    def __call__(self, rows: pyarrow.Table) -> pyarrow.Table:
        settings = self.settings
        prompts = {prompt.index: prompt for prompt in prompts_of(rows, settings.prompts)}
        tokens = encode([*prompts.values()], self.tokenizer, self.config, settings.max_new_tokens, settings.chat)
        requests = [
            Request(index, each["lambda"], each["sample"], settings.combine, settings.schedule)
            for index, missing in zip(prompts, rows[REQUESTS].to_pylist(), strict=True)
            for each in missing
        ]
        batches = decode(
            self.model, self.tokenizer, dict(zip(prompts, tokens, strict=True)), requests, settings.sampling,
            settings.batch_size,
        )  # fmt: skip
        found = []
        for completion in (each for batch in batches for each in batch):
            row = to_json(GeneratedRow.of(self.run, completion, prompts[completion.request.index]))
            if not isinstance(row["prompt"], str):
                row["prompt"] = json.dumps(row["prompt"], ensure_ascii=False)
            found.append({name: row[name] for name in SCHEMA.names})
        return pyarrow.Table.from_pylist(found, SCHEMA)


def prompts_of(rows: pyarrow.Table, file: str) -> Iterator[Prompt]:
    """Of a table's rows, which have their place in the file as `prompt_index`."""
    for row in rows.to_pylist():
        index = row.pop("prompt_index")
        row.pop(REQUESTS, None)
        (prompt,) = from_rows([row], f"{file}, row {index + 1}")
        yield replace(prompt, index=index)


def read_file(file: str) -> pyarrow.Table:
    """The prompts' rows, with their places."""
    try:
        rows = pyarrow.dataset.dataset(file, format="parquet").to_table()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DeRaError(f"--prompts={file!r} can't be read: {error}") from None
    if reserved := {"prompt_index", REQUESTS}.intersection(rows.column_names):
        raise DeRaError(f"--prompts={file!r} has a column {min(reserved)!r}, which is made here: rename it.")
    if not rows.num_rows:
        raise DeRaError(f"--prompts={file!r} has no rows.")
    return rows.append_column("prompt_index", pyarrow.array(numpy.arange(rows.num_rows)))


def expected_keys(settings: RaySettings, rows: pyarrow.Table) -> tuple[numpy.ndarray, str]:
    """The completions to be made, as `KEYS`, and the run's fingerprint; checks all prompts before any is decoded."""
    source, record = settings.source, settings.source.resolve()
    source.check_has_adapter("a λ")
    if len(record.aligned) != 1:
        raise DeRaError(f"this example is for one aligned adapter, and the model has {list(record.aligned)}.")
    default = for_adapters([record.lam], record.aligned, "dera.json")
    lambdas = settings.lambdas_of(for_adapters(settings.lambdas, record.aligned), default, record.aligned)
    config, tokenizer, digest = source.config, source.tokenizer(), hashlib.sha256()

    def keys() -> Iterator[tuple[int, float, int]]:
        for prompt in prompts_of(rows, settings.prompts):
            encode([prompt], tokenizer, config, settings.max_new_tokens, settings.chat)
            digest.update(json.dumps([prompt.content, prompt.columns], sort_keys=True, default=str).encode())
            own = lambdas
            if prompt.lam is not None:
                given = for_adapters(prompt.lam, record.aligned, prompt.source)
                own = settings.lambdas_of(given, (), record.aligned, prompt.source)
            yield from ((prompt.index, lam, sample) for lam in own for sample in range(settings.samples))

    expected = numpy.fromiter(keys(), KEYS)
    run = {
        **source.placed().fingerprint(), "chat": settings.chat, "sampling": asdict(settings.sampling),
        "combine": settings.combine, "lambda_schedule": settings.schedule, "prompts": digest.hexdigest(),
    }  # fmt: skip
    return expected, settings_fingerprint(run)


def finished_keys(output: Path, run: str) -> numpy.ndarray:
    """The completions that are there, as `KEYS`. A file that was being written when a run was stopped is removed."""
    found = [numpy.empty(0, KEYS)]
    for file in sorted(output.glob("*.parquet")):
        try:
            names = pyarrow.parquet.read_schema(file).names
        except pyarrow.ArrowInvalid:  # it has no end
            file.unlink()
            continue
        if not {"run", *KEY}.issubset(names):
            raise DeRaError(f"{str(file)!r} holds no completions: name another --output.")
        rows = pyarrow.parquet.read_table(file, columns=["run", *KEY])
        if other := set(rows["run"].unique().to_pylist()) - {run}:
            raise DeRaError(
                f"{str(output)!r} holds completions of other prompts or settings (run {min(other)}, this one is "
                f"{run}): move it away or name another --output."
            )
        keys = numpy.empty(rows.num_rows, KEYS)
        for name in KEY:
            keys[name] = rows[name].to_numpy()
        found.append(keys)
    return numpy.concatenate(found)


def with_requests(rows: pyarrow.Table, missing: numpy.ndarray) -> pyarrow.Table:
    """The rows of prompts with completions that are missing, and beside each the λ and samples of these."""
    indices, starts = numpy.unique(missing["prompt_index"], return_index=True)  # `missing` is sorted
    each = pyarrow.StructArray.from_arrays(
        [pyarrow.array(numpy.ascontiguousarray(missing[name])) for name in KEY[1:]], KEY[1:]
    )
    requests = pyarrow.LargeListArray.from_arrays(numpy.append(starts, len(missing)), each)
    return rows.take(indices).append_column(REQUESTS, requests)


def generate(settings: RaySettings) -> None:
    """Decode a parquet file of prompts at one or several λ with Ray Data."""
    settings.check_paths()
    rows = read_file(settings.prompts)
    expected, run = expected_keys(settings, rows)
    with hold(settings.output, "--output", is_folder=True):
        missing = numpy.setdiff1d(expected, finished_keys(settings.output, run))
        if len(missing):
            logger.info(f"{settings.output}: {len(missing)} of {len(expected)} completions are missing")
            decode_with_ray(settings, run, with_requests(rows, missing))
        finished, counts = numpy.unique(finished_keys(settings.output, run), return_counts=True)
    lost, twice = len(numpy.setdiff1d(expected, finished)), int((counts > 1).sum())
    if lost or twice:
        raise DeRaError(f"{settings.output}: {lost} completions are missing after all, and {twice} are there twice.")
    logger.info(f"{settings.output}: all {len(expected)} completions are there")


def decode_with_ray(settings: RaySettings, run: str, rows: pyarrow.Table) -> None:
    ray.init(logging_level=logging.WARNING)
    try:
        has, blocks = ray.cluster_resources(), math.ceil(rows.num_rows / settings.rows)
        actors, gpus = min(settings.actors, blocks), settings.gpus
        if gpus is None:
            gpus = 1.0 if has.get("GPU") else 0.0
        for kind, each in (("CPU", settings.cpus), ("GPU", gpus)):
            if actors * each > has.get(kind, 0):
                logger.warning(
                    f"--actors={actors}, {each:g} {kind}s each: the cluster has {has.get(kind, 0):g}; actors that do "
                    f"not fit wait for more, and where none fits nothing is decoded: lower --{kind.lower()}s"
                )
        # a block is what an actor is given, and a file of the output: without this the table would be one. It is done
        # before there are actors, which may take all CPUs; for the same reason the tasks that write need none
        ray.data.from_arrow(rows).repartition(blocks).materialize().map_batches(
            Generator,
            fn_constructor_args=(settings, run, os.getcwd()),
            compute=ray.data.ActorPoolStrategy(size=actors),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=settings.cpus,
            num_gpus=gpus,
        ).write_parquet(str(settings.output.resolve()), ray_remote_args={"num_cpus": 0}, concurrency=actors)
    finally:
        ray.shutdown()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=CONTEXT)
command(app, RaySettings)(generate)


def main() -> None:
    arguments, debug = split_debug(sys.argv[1:])

    def program() -> None:
        with messages_on_stderr():
            app(arguments)

    run_program(program, debug)


if __name__ == "__main__":
    main()
