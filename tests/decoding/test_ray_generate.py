"""examples/ray_generate.py against `dera generate` in one process. `make test-ray` runs it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dera_peft.errors import DeRaError
from dera_peft.user_code import load_object

pytest.importorskip("ray")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "ray_generate.py"
PROMPTS = [{"prompt": f"The fox {n} crossed" + " the river" * (n % 5), "lambda": None} for n in range(40)]
PROMPTS[3]["lambda"], PROMPTS[7]["lambda"] = [0.25], [0.0, 1.0, 3.0]
SAMPLED = {"lambdas": [0.0, 0.5, 2.0], "samples": 2, "max_new_tokens": 12, "temperature": 0.9, "top_p": 0.95, "seed": 7}
GREEDY = {"lambdas": [0.0, 0.5, 1.0], "max_new_tokens": 12, "temperature": 0.0}
TOLD = ("prompt", "completion", "num_tokens", "finish_reason", "token_ids", "end_token_id")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    # of two files, which are read one after the other
    for part, rows in (("a", PROMPTS[:15]), ("b", PROMPTS[15:])):
        table = pyarrow.Table.from_pylist(
            rows, pyarrow.schema({"prompt": pyarrow.string(), "lambda": pyarrow.list_(pyarrow.float64())})
        )
        (folder / "parquet").mkdir(exist_ok=True)
        parquet.write_table(table, folder / "parquet" / f"{part}.parquet")
    lines = [json.dumps({name: value for name, value in row.items() if value is not None}) for row in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def arguments(tiny_base, tiny_adapter, files):
    def arguments(output: Path, settings: dict, **more) -> list[str]:
        """As options; `settings` are those of `dera generate`, too."""
        given = {"base": tiny_base, "adapter": tiny_adapter, "output": output, **settings, **more}
        given["lambda"] = ",".join(map(str, given.pop("lambdas")))
        return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]

    return arguments


@pytest.fixture
def by_dera_generate(dera, files, arguments, tmp_path):
    def by_dera_generate(settings: dict) -> dict:
        output = tmp_path / "one-process.jsonl"
        code, _, error = dera("generate", *arguments(output, settings, prompts=files / "prompts.jsonl"))
        assert code == 0, error
        return by_key(map(json.loads, output.read_text().splitlines()))

    return by_dera_generate


def by_key(rows) -> dict:
    found = {}
    for row in rows:
        key = row["prompt_index"], row["lambda"], row["sample"]
        assert key not in found, f"{key} is there twice"
        found[key] = {name: row[name] for name in TOLD}
    return found


def rows_of(output: Path) -> list[dict]:
    return [row for file in sorted(output.glob("*.parquet")) for row in parquet.read_table(file).to_pylist()]


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    with log.open("w") as stream:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)


def whole_files(output: Path) -> list[Path]:
    def is_whole(file: Path) -> bool:
        try:
            return bool(parquet.read_metadata(file).num_rows)
        except (OSError, pyarrow.ArrowInvalid):
            return False

    return list(filter(is_whole, output.glob("*.parquet")))


def test_a_run_that_was_killed_goes_on(files, arguments, by_dera_generate, tmp_path, monkeypatch):
    output, log = tmp_path / "out", tmp_path / "log"
    options = {"prompts": files / "parquet", "actors": 2}
    process = start(arguments(output, SAMPLED, **options, rows=2), log)
    while not whole_files(output):
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    process.kill()
    process.wait()
    expected = by_dera_generate(SAMPLED)
    # before the next run looks: Ray's processes have noticed that the driver is gone
    (output / "torn-0.parquet").write_bytes(next(output.glob("*.parquet")).read_bytes()[:-40])
    before = {file: file.read_bytes() for file in whole_files(output)}
    assert before

    process = start(arguments(output, SAMPLED, **options, rows=5), log)
    assert process.wait() == 0, log.read_text()
    assert "Actors: 2" in log.read_text(), "Ray says how many it has"
    for file, content in before.items():
        assert file.read_bytes() == content
    assert not (output / "torn-0.parquet").exists()
    assert 0 < sum(parquet.read_metadata(file).num_rows for file in before) < len(expected)
    assert by_key(rows_of(output)) == expected
    assert len({row["completion"] for row in expected.values()}) > 40, "the rows must be told apart"
    assert {row["run"] for row in rows_of(output)} == {rows_of(output)[0]["run"]}

    settings, generate = read_settings(files, arguments, output, SAMPLED)
    generate(settings())  # there is nothing left to do, which needs no Ray
    with pytest.raises(DeRaError, match=r"other prompts or settings \(run [0-9a-f]+"):
        generate(settings(temperature=0.8))
    with pytest.raises(DeRaError, match="other prompts or settings"):
        generate(settings(prompts=str(files / "parquet" / "a.parquet")))
    asked = {}
    monkeypatch.setitem(generate.__globals__, "decode_with_ray", lambda _, run, rows: asked.update(rows=rows, run=run))
    with pytest.raises(
        DeRaError, match=f"{len(expected) // 2} completions are missing after all, and 0 are there twice"
    ):
        generate(settings(samples=3))
    further = [each["sample"] for row in asked["rows"]["requests"].to_pylist() for each in row]
    assert (further, asked["run"]) == ([2] * (len(expected) // 2), rows_of(output)[0]["run"])
    (output / "again.parquet").write_bytes(next(output.glob("*.parquet")).read_bytes())
    with pytest.raises(DeRaError, match=r"0 completions are missing after all, and [1-9]\d* are there twice"):
        generate(settings())
    parquet.write_table(pyarrow.table({"prompt": ["One"]}), output / "other.parquet")
    with pytest.raises(DeRaError, match=r"'.*other.parquet' holds no completions"):
        generate(settings())


def test_greedy_completions_do_not_depend_on_the_partition(files, arguments, by_dera_generate, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    assert start(arguments(output, GREEDY, prompts=files / "parquet", actors=2, rows=7), log).wait() == 0, (
        log.read_text()
    )
    assert by_key(rows_of(output)) == by_dera_generate(GREEDY)


def read_settings(files, arguments, output, given):
    module = sys.modules[load_object(f"{SCRIPT}:generate").__module__]

    def settings(**more):
        values = {"prompts": str(files / "parquet"), **given, **more}
        named = dict(each[2:].split("=", 1) for each in arguments(output, given) if each.startswith(("--base", "--ad")))
        return module.RaySettings(**named, output=output, **{**values, "lambdas": tuple(values["lambdas"])})

    return settings, module.generate


def test_what_can_not_be_decoded_is_told_before(files, arguments, tmp_path):
    settings, generate = read_settings(files, arguments, tmp_path / "out", GREEDY)
    file = tmp_path / "prompts.parquet"

    def refused(message: str, **columns):
        parquet.write_table(pyarrow.table(columns), file)
        with pytest.raises(DeRaError, match=message):
            generate(settings(prompts=str(file)))

    refused("row 2, prompt 1: the prompt is empty", prompt=["One", " "])
    refused("row 1, prompt 1: has no key 'prompt'", text=["One"])
    refused("lambda must be a finite number", **{"prompt": ["One"], "lambda": [float("nan")]})
    refused("has a column 'prompt_index'", prompt=["One"], prompt_index=[3])
    refused("more than the model's context", prompt=["One two three " * 100])
    refused("has no rows", prompt=pyarrow.array([], pyarrow.string()))
    with pytest.raises(DeRaError, match="can't be read"):
        generate(settings(prompts=str(tmp_path / "nowhere.parquet")))
    assert not (tmp_path / "out").exists()
