"""`dera lm-eval` against the harness's own model with PEFT, and two models by hand. `make test-lm-eval` runs it."""

import json
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch
from tiny_models import CORPUS, make_adapter
from transformers import AutoTokenizer
from two_models import TwoModels, decode_by_hand, load_two

from dera_peft.checkpoint.source import ModelSource
from dera_peft.cli.app import main
from dera_peft.errors import DeRaError
from dera_peft.evaluate.benchmarks import by_line, model_fingerprint, read_benchmarks
from dera_peft.model import DeRaModel

lm_eval = pytest.importorskip("lm_eval")

LAMBDAS = (0.0, 0.5, 1.0)
TASKS = ("tiny_choice", "tiny_text")
NEW_TOKENS = 6
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{docs}"}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
TEXT = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with two tasks over eight documents."""
    folder = tmp_path_factory.mktemp("tasks")
    words = " ".join(CORPUS).split()
    docs = [
        {"question": " ".join(words[n : n + 3 + n % 3]), "choices": words[n + 9 : n + 12], "answer": n % 3}
        for n in range(8)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, kind in zip(TASKS, (CHOICE, TEXT), strict=True):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, docs=folder / "docs.jsonl") + kind)
    return folder


@pytest.fixture(scope="module", autouse=True)
def own_tasks_alone():
    """To read the ten thousand files of the harness's own tasks takes most of a minute."""
    import lm_eval.tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # which asks other programs, for seconds
        yield


def dera_lm_eval(tasks: Path, *more: str) -> int | str | None:
    """The exit code."""
    with pytest.raises(SystemExit) as end:
        main(["lm-eval", "--include_path", str(tasks), "--tasks", ",".join(TASKS), *more])
    return end.value.code


def samples_in(folder: Path, task: str) -> list[dict]:
    (file,) = folder.glob(f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


def answers(samples: list[dict]) -> list:
    """Log-probabilities with whether greedy decoding gives them, or texts; as they come, and as JSON has them."""
    return [
        [[str(each) for each in resp] if isinstance(resp, (list, tuple)) else resp for (resp,) in sample["resps"]]
        for sample in samples
    ]


@pytest.fixture(scope="module")
def measured(tiny_base, tiny_adapter, tasks, tmp_path_factory) -> dict:
    """`dera lm-eval` at three λ: its folder, how many models were loaded, and what was printed."""
    folder, loads = tmp_path_factory.mktemp("out"), []
    from_source = DeRaModel.from_source
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(DeRaModel, "from_source", lambda *given: (loads.append(given), from_source(*given))[1])
        of_model = ["--base", str(tiny_base), "--adapter", str(tiny_adapter), "--lambda", "0,0.5,1"]
        assert dera_lm_eval(tasks, *of_model, "--output_path", str(folder), "--log_samples", "-b", "3") == 0
    return {"folder": folder, "loads": len(loads), "printed": printed.getvalue()}


def by_harness(tasks: Path, **model_args) -> dict[str, list]:
    """The samples of the harness's own model."""
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks))
    model_args = {"dtype": "float32", **model_args}
    results = lm_eval.simple_evaluate(
        "hf", model_args, list(TASKS), batch_size=3, device="cpu", task_manager=manager, bootstrap_iters=0
    )
    return {
        task: answers(sorted(samples, key=lambda row: row["doc_id"])) for task, samples in results["samples"].items()
    }


@pytest.fixture(scope="module")
def base_alone(tiny_base, tasks) -> dict[str, list]:
    return by_harness(tasks, pretrained=str(tiny_base))


@pytest.fixture(scope="module")
def by_peft(tiny_base, tiny_adapter, tasks) -> dict[str, list]:
    return by_harness(tasks, pretrained=str(tiny_base), peft=str(tiny_adapter))


@pytest.mark.parametrize("task", TASKS)
def test_at_0_and_1_it_is_the_harness_s_own_model_exactly(measured, base_alone, by_peft, task):
    assert base_alone[task] != by_peft[task]
    assert answers(samples_in(measured["folder"] / "lambda_0", task)) == base_alone[task]
    assert answers(samples_in(measured["folder"] / "lambda_1", task)) == by_peft[task]


@torch.no_grad()
def test_between_it_is_the_mixture_of_two_models(measured, tiny_base, tiny_adapter):
    mixture, tokenizer = (
        TwoModels(*load_two(tiny_base, tiny_adapter), lam=0.5),
        AutoTokenizer.from_pretrained(tiny_base),
    )
    for sample in samples_in(measured["folder"] / "lambda_0.5", "tiny_choice"):
        for number, (log_p, _) in enumerate(resp for (resp,) in sample["resps"]):
            context, continuation = sample["arguments"][f"gen_args_{number}"].values()
            ids = torch.tensor([tokenizer.encode(context + continuation)])
            new = ids.shape[1] - len(tokenizer.encode(context))
            log_probs = mixture(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            assert float(log_p) == pytest.approx(log_probs[-new:].sum().item(), abs=1e-4)
    for sample in samples_in(measured["folder"] / "lambda_0.5", "tiny_text"):
        inputs = tokenizer(sample["arguments"]["gen_args_0"]["arg_0"], return_tensors="pt")
        tokens = decode_by_hand(mixture, inputs["input_ids"], inputs["attention_mask"], NEW_TOKENS)[0]
        text = tokenizer.decode(tokens).partition("</s>")[0].partition("\n")[0]
        assert sample["resps"] == [[tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)]]


def test_each_lam_has_files_of_its_own_and_one_model_serves_all(measured):
    assert measured["loads"] == 1
    results = {}
    for lam in LAMBDAS:
        folder = measured["folder"] / f"lambda_{lam:g}"
        assert len(list(folder.iterdir())) == 1 + len(TASKS)
        (file,) = folder.glob("results_*.json")
        results[lam] = json.loads(file.read_text())
        assert results[lam]["config"]["model_args"]["lam"] == lam
    assert {path.name for path in measured["folder"].iterdir()} == {
        "benchmarks.jsonl",
        *(f"lambda_{lam:g}" for lam in LAMBDAS),
    }
    for lam in LAMBDAS:  # the table
        values = results[lam]["results"]
        for task, metric in (("tiny_choice", "acc"), ("tiny_text", "exact_match")):
            cell = f"{values[task][f'{metric},none']:.4f} ± {values[task][f'{metric}_stderr,none']:.4f}"
            assert cell in measured["printed"]
    assert "tiny_choice acc" in measured["printed"]


def test_rows_beside_a_sweep_hold_what_the_harness_found(measured, tiny_base, tiny_adapter):
    record = ModelSource(base=str(tiny_base), adapter=str(tiny_adapter)).resolve()
    lines = by_line(read_benchmarks(measured["folder"], model_fingerprint(record)))
    assert list(lines) == ["tiny_choice acc", "tiny_text exact_match"]
    for (label, line), metric in zip(lines.items(), ("acc", "exact_match"), strict=True):
        assert [row.lam for row in line] == list(LAMBDAS)
        assert {(row.samples, row.num_fewshot, row.higher_is_better) for row in line} == {(8, 0, True)}
        for row in line:
            (file,) = (measured["folder"] / f"lambda_{row.lam:g}").glob("results_*.json")
            found = json.loads(file.read_text())["results"][label.split()[0]]
            assert (row.value, row.stderr) == (found[f"{metric},none"], found[f"{metric}_stderr,none"])
    assert read_benchmarks(measured["folder"], "another model") == []


def test_the_harness_s_cache_does_not_give_one_lam_the_answers_of_another(
    measured, tiny_base, tiny_adapter, tasks, tmp_path
):
    of_model = ["--base", str(tiny_base), "--adapter", str(tiny_adapter), "--lambda", "0,1"]
    cached = ["--use_cache", str(tmp_path / "cache"), "--output_path", str(tmp_path / "out"), "-s", "-b", "3"]
    assert dera_lm_eval(tasks, *of_model, *cached) == 0
    for lam in (0, 1):
        for task in TASKS:
            without = samples_in(measured["folder"] / f"lambda_{lam}", task)
            assert answers(samples_in(tmp_path / "out" / f"lambda_{lam}", task)) == answers(without)


def test_two_adapters_by_name(tiny_base, tiny_adapter, tasks, tmp_path, by_peft):
    other = make_adapter(tiny_base, tmp_path / "other", seed=5)
    of_model = ["--base", str(tiny_base), "--adapters", f"a={tiny_adapter}", "--adapters", f"b={other}"]
    points = ["--lambda", "a=1", "--lambda", "a=0,b=1"]
    assert dera_lm_eval(tasks, *of_model, *points, "--output_path", str(tmp_path / "out"), "-s", "-b", "3") == 0
    expected = {
        "lambda_a=1,b=0": by_peft,
        "lambda_a=0,b=1": by_harness(tasks, pretrained=str(tiny_base), peft=str(other)),
    }
    for folder, of_peft in expected.items():
        for task in TASKS:
            assert answers(samples_in(tmp_path / "out" / folder, task)) == of_peft[task]


def test_the_harness_knows_the_model_by_its_name(measured, tiny_base, tiny_adapter, tasks):
    from dera_peft.evaluate import harness_model

    assert lm_eval.api.registry.get_model("dera") is harness_model.DeRaLM
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks))
    text = f"base={tiny_base},adapter={tiny_adapter},lam=0.5"
    results = lm_eval.simple_evaluate("dera", text, ["tiny_choice"], batch_size=3, task_manager=manager)
    expected = answers(samples_in(measured["folder"] / "lambda_0.5", "tiny_choice"))
    assert answers(sorted(results["samples"]["tiny_choice"], key=lambda row: row["doc_id"])) == expected
    with pytest.raises(
        DeRaError, match=r"model_args: 'adaptor' is not an argument of this model; do you mean 'adapter'"
    ):
        lm_eval.simple_evaluate("dera", f"adaptor={tiny_adapter}", ["tiny_choice"], task_manager=manager)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model_args", "max_lenght=100"], "'max_lenght' is not an argument of this model; do you mean 'max_length'"),
        (["--model_args", "dtype=float32"], "--model_args: 'dtype' is an option of its own here: --dtype"),
        (["--model_args", "peft=x"], "--model_args: 'peft' is an option of its own here: --adapter"),
        (["--model", "hf"], "--model: 'hf'"),
        (["--output_path", "x.json"], "--output_path: 'x.json' is a file"),
        (["--wandb_args", "project=x"], "--wandb_args"),
        (["--log_samples"], "--output_path"),
        (["--tasks", "tiny_choise"], "Tasks not found: tiny_choise"),
        (["--device", "cuda:7"], "device_map='cuda:7': there is no such device"),
        (["--device", "cpu", "--device-map", "cpu"], "say the same"),
        (["--adaptor", "x"], "unrecognized arguments: --adaptor x"),
        (["--lambda", "0,x"], "'x' is not a number"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_told_before_a_model_is_loaded(
    tiny_base, tiny_adapter, tasks, capsys, monkeypatch, more, message
):
    monkeypatch.setattr(DeRaModel, "from_source", lambda *_: pytest.fail("a model is loaded"))
    assert dera_lm_eval(tasks, "--base", str(tiny_base), "--adapter", str(tiny_adapter), *more) == 2
    assert message in capsys.readouterr().err


def test_results_that_can_not_be_written_are_an_error(tiny_base, tiny_adapter, tasks, tmp_path, capsys):
    (tmp_path / "lambda_0").write_text("in the way")
    of_model = ["--base", str(tiny_base), "--adapter", str(tiny_adapter), "--lambda", "0"]
    assert dera_lm_eval(tasks, *of_model, "--output_path", str(tmp_path), "--limit", "1") == 2
    assert "Could not save results aggregated" in capsys.readouterr().err
