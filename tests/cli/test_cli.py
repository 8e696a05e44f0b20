"""The command line, run as a user runs it: in this process, but for two tests of signals and pipes."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.cells import cell_len
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from two_models import TwoModels, load_two

from dera_peft.cli import generate

DERA = [sys.executable, "-m", "dera_peft.cli"]


@pytest.fixture
def dera(dera, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return dera


@pytest.fixture
def model(tiny_base, tiny_adapter) -> list[str]:
    return ["--base", str(tiny_base), "--adapter", str(tiny_adapter)]


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_help_teaches(dera):
    code, out, _ = dera("--help")
    assert code == 0
    assert all(command in out for command in ("generate", "info", "sweep"))
    for command in ("generate", "score", "info", "sweep"):
        code, out, _ = dera(command, "--help")
        assert code == 0
        assert "Example" in out
        assert f"dera {command}" in out


def test_without_a_command_the_commands_are_shown(dera):
    code, out, err = dera()
    assert code in (0, 2)
    assert "generate" in out + err


def test_help_does_not_import_torch():
    program = """
import sys
import dera_peft.cli.app
sys.argv = ["dera", "--help"]
try:
    dera_peft.cli.app.main()
except SystemExit as end:
    assert end.code == 0
assert not {"torch", "transformers", "peft"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_texts_side_by_side_fit_80_columns(dera, model):
    for lambdas in ("0,1", "0,0.5,1,2"):
        code, out, err = dera(
            "generate", *model, "--lambda", lambdas, "--prompt", "Rain [bold]fell", "--max-new-tokens", 40
        )
        assert code == 0, err
        assert "Rain [bold]fell" in out, "texts are not markup"
        assert all(f"λ={lam}" in out for lam in lambdas.split(","))
        assert max(cell_len(line) for line in out.splitlines()) <= 80


def test_json_lines(dera, model):
    code, out, _ = dera(
        "generate", *model, "--lambda", "0", "--lambda", "0.5,1", "--prompt", "Rain", "--prompt", "A fox",
        "--samples", 2, "--max-new-tokens", 5, "--json", "--seed", 3,
    )  # fmt: skip
    assert code == 0
    found = rows(out)
    assert {(row["prompt_index"], row["lambda"], row["sample"]) for row in found} == {
        (index, lam, sample) for index in (0, 1) for lam in (0.0, 0.5, 1.0) for sample in (0, 1)
    }
    assert {row["prompt"] for row in found} == {"Rain", "A fox"}
    assert all(set(row) >= {"run", "completion", "num_tokens", "finish_reason"} for row in found)


def test_negative_lambdas_and_a_rows_own(dera, model, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Rain", "lambda": [0.25, 3], "topic": "weather"}\n{"prompt": "A fox"}\n')
    code, out, _ = dera("generate", *model, "--lambda", "-0.5,1", "--prompts", file, "--max-new-tokens", 3, "--json")
    assert code == 0
    found = sorted(rows(out), key=lambda row: (row["prompt_index"], row["lambda"]))
    assert [(row["prompt_index"], row["lambda"]) for row in found] == [
        (0, 0.25), (0, 3.0), (1, -0.5), (1, 1.0),
    ]  # fmt: skip
    assert {row["columns"].get("topic") for row in rows(out) if row["prompt_index"] == 0} == {"weather"}


def test_standard_input(model):
    command = [*DERA, "generate", *model, "--greedy", "--max-new-tokens", "3", "--json"]
    done = subprocess.run(command, input="Rain\nA fox\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["prompt"] for row in sorted(rows(done.stdout), key=lambda row: row["prompt_index"])] == [
        "Rain",
        "A fox",
    ]
    assert done.stderr == "", "nothing but the results in a pipe"


def test_stream_and_greedy_show_the_same(dera, model):
    arguments = ["generate", *model, "--lambda", "0.5", "--prompt", "Rain", "--greedy", "--max-new-tokens", 8]
    code, streamed, _ = dera(*arguments, "--stream")
    assert code == 0
    (row,) = rows(dera(*arguments, "--json")[1])
    assert streamed.strip() == row["completion"].strip()


def test_output_is_continued(dera, model, tmp_path):
    output = tmp_path / "out.jsonl"
    arguments = [
        "generate", *model, "--lambda", "0,0.5", "--prompt", "Rain", "--prompt", "A fox", "--max-new-tokens", 6,
    ]  # fmt: skip
    assert dera(*arguments, "--output", output)[0] == 0
    whole = output.read_text().splitlines()
    assert len(whole) == 4
    output.write_text("\n".join(whole[:2]) + "\n" + whole[2][:20])
    code, out, err = dera(*arguments, "--output", output, "--batch-size", 1, "--json")
    assert code == 0
    assert "2 of 4 completions are there already" in err
    assert sorted(output.read_text().splitlines()) == sorted(whole), "the same texts as without the interruption"
    assert sorted(out.splitlines()) == sorted(whole), "those that were there already are printed too"
    code, _, err = dera(*arguments, "--output", output, "--seed", 1)
    assert code == 2
    assert "other settings" in err


def test_particles(dera, model, tmp_path):
    """Rows say what the particles say of them, and are continued by the same settings alone."""
    output = tmp_path / "exact.jsonl"
    command = ["generate", *model, "--prompt", "Rain", "--max-new-tokens", 16, "--output", output, "--samples"]
    code, _, err = dera(*command, 2, "--lambda", "1,3", "--particles", 4)
    assert code == 0
    assert "4 particles were too uneven for" in err, "at λ=3"
    first = rows(output.read_text())
    at_1, at_3 = ([row for row in first if row["lambda"] == lam] for lam in (1, 3))
    for row in at_1:
        assert (row["particles"], row["log_z"], row["log_z_error"], row["effective_size"]) == (4, 0, 0, 4)
        assert (row["resamplings"], row["ancestors"]) == (0, 4)
    assert all(row["log_z"] > 0 and 0 < row["log_z_error"] <= 1 and row["resamplings"] for row in at_3)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # as a kill leaves it
    assert dera(*command, 3, "--lambda", "1,3", "--particles", 4)[0] == 0
    again = rows(output.read_text())
    assert len(again) == 6
    kept = {(row["lambda"], row["sample"]): (row["token_ids"], row["resamplings"]) for row in again}
    assert {(row["lambda"], row["sample"]): (row["token_ids"], row["resamplings"]) for row in first}.items() <= (
        kept.items()
    ), "the same, alone as in the batch"
    for other in (["--particles", 5], []):
        code, _, err = dera(*command, 2, *other)
        assert code == 2
        assert "holds the results of other settings" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--greedy"], "temperature=0: the exact mixture is sampled at temperature 1"),
        (["--top-p", 0.9], "top_p=0.9"),
        (["--stream", "--lambda", 2], "--stream shows tokens as they come"),
        (["--combine", "kl:0.1"], "--combine kl:0.1: the exact mixture is of λ alone"),
        (["--lambda-schedule", "0:2,4:1"], "--lambda-schedule: the exact mixture is of λ alone"),
    ],
)
def test_what_particles_do_not_go_with(dera, model, options, message):
    code, _, err = dera("generate", *model, "--prompt", "Rain", "--particles", 4, *options)
    assert code == 2
    assert message in err


def test_a_long_run_ends_with_its_speed(dera, model, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    arguments = ["generate", *model, "--lambda", "0,1", "--max-new-tokens", 6, "--output", output, "--prompt", "Rain"]
    assert "tokens/s" not in dera(*arguments)[2], "it took less than 5 seconds"
    monkeypatch.setattr(generate, "SHORT", 0.0)
    code, out, err = dera(*arguments, "--prompt", "A fox", "--json")
    assert code == 0
    new = sum(row["num_tokens"] for row in rows(out) if row["prompt"] == "A fox")
    assert re.search(rf"^{new} tokens in [\d.]+ s: [\d.]+ tokens/s$", err.splitlines()[-1]), "those of this run"
    assert "tokens/s" not in dera(*arguments, "--prompt", "A fox")[2], "nothing was decoded"
    code, _, err = dera("generate", *model, "--max-new-tokens", 6, "--prompt", "Rain", "--stream")
    assert re.search(r"^\d tokens in [\d.]+ s: [\d.]+ tokens/s$", err.splitlines()[-1])


def test_interrupted_and_continued(dera, model, tmp_path):
    output = tmp_path / "out.jsonl"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"Rain fell on day {day}" for day in range(120)) + "\n")
    command = [
        "generate", *model, "--lambda", "0.5", "--prompts", str(prompts), "--max-new-tokens", "40",
        "--output", str(output),
    ]  # fmt: skip
    # one by one it takes long enough for the signal to come in the middle on a busy machine too
    slowly = [*DERA, *command, "--batch-size", "1"]
    process = subprocess.Popen(
        slowly,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )
    deadline = time.time() + 240
    while not (output.is_file() and output.stat().st_size) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert err.startswith("interrupted;")
    assert err.count("\n") == 1
    done = len(output.read_text().splitlines())
    assert 0 < done < 120, "it must be stopped in the middle for the test to mean something"
    assert dera(*command, "--batch-size", 64)[0] == 0
    assert sorted(row["prompt_index"] for row in rows(output.read_text())) == list(range(120))


def test_info(dera, model, tiny_base, top_adapter):
    code, out, _ = dera("info", *model)
    assert code == 0
    assert "at the input" in out
    assert "before the head" in out
    facts = json.loads(dera("info", "--base", tiny_base, "--adapter", top_adapter, "--json")[1])
    assert facts["fork_layer"] == 2
    assert facts["rows_per_sequence"] == {"0": 1, "0.5": 2, "1": 1, "2": 2}
    # 2 of 4 layers on each side of the fork, keys and values of 2 heads by 16 numbers of 4 bytes
    assert facts["cache_bytes_per_token"] == {
        "below_fork_per_sequence": 2 * 2 * 32 * 4,
        "above_fork_per_row": 2 * 2 * 32 * 4,
    }
    assert facts["adapter_parameters"] * 4 == facts["adapter_bytes"]
    assert facts["base_parameters"] * 4 == facts["base_bytes"]
    assert facts["branches"] == {"reference": [], "aligned": ["default"]}


def test_export(dera, model, tmp_path):
    prompt = ["--prompt", "The old lighthouse"]
    code, out, _ = dera("export", *model, "--lambda", 0.6, "--output", tmp_path / "out", *prompt, "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["kl"] > 0
    assert facts["tokens"] > 1
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    code, out, _ = dera("export", *model, "--lambda", 1, "--output", tmp_path / "one", *prompt)
    assert code == 0
    assert "nats a token" in " ".join(out.split())
    code, _, err = dera("export", *model, "--lambda", "0.5,much", "--output", tmp_path / "bad")
    assert code == 2
    assert "'0.5,much'" in err
    code, _, err = dera("export", *model, "--lambda", "aligend=0.5", "--output", tmp_path / "bad")
    assert code == 2
    assert "'aligend'" in err


@pytest.fixture
def completions(dera, model, tmp_path):
    """A file of four, as `dera generate` makes it."""
    file = tmp_path / "completions.jsonl"
    prompts = ["--prompt", "Rain fell", "--prompt", "A fox"]
    code, _, err = dera(
        "generate", *model, *prompts, "--lambda", "0,1", "--max-new-tokens", 5, "--output", file, "--greedy"
    )
    assert code == 0, err
    return file


def test_score(dera, model, completions, tiny_base, tiny_adapter):
    """
    The numbers are those of two whole models over the prompt's tokens and the completion's behind them: as they were
    drawn; or, of a row whose text was changed, as it is split, with the end token that the row names.
    """
    (given, *_), first = rows(completions.read_text()), completions.read_text().splitlines()[0]
    changed = {**given, "completion": " other words", "finish_reason": "eos", "end_token_id": 9}
    completions.write_text(first + "\n" + json.dumps(changed) + "\n")
    code, out, err = dera("score", *model, "--completions", completions, "--lambda", "0,0.5", "--json", "--tokens")
    assert code == 0, err
    assert "1 of 2 completions have token_ids of another text or tokenizer" in err
    found = rows(out)
    assert [(row["prompt_index"], row["lambda"]) for row in found] == [(0, 0.0), (0, 0.5), (1, 0.0), (1, 0.5)]

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    prompt = tokenizer(given["prompt"])["input_ids"]
    completion = [given["token_ids"], [*tokenizer(" other words", add_special_tokens=False)["input_ids"], 9]]
    mixture = TwoModels(*load_two(tiny_base, tiny_adapter))
    for row in found:
        ids = completion[row["prompt_index"]]
        mixture.lam = row["lambda"]
        with torch.no_grad():
            log_probs = mixture(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        each = log_probs[range(len(ids)), ids]
        assert row["token_ids"] == ids
        assert row["num_tokens"] == len(ids)
        assert row["token_log_p"] == pytest.approx(each.tolist(), abs=2e-4)
        assert row["log_p"] == pytest.approx(each.sum().item(), abs=1e-3)
        assert row["perplexity"] == pytest.approx((-each.mean()).exp().item(), rel=1e-3)
        assert row["kl"] == pytest.approx(sum(row["token_kl"]), abs=1e-4)
        assert (row["kl"] > 0.01) == (row["lambda"] > 0)
        assert "".join(row["token_texts"]).startswith((given["completion"], " other words")[row["prompt_index"]])


def test_scores_are_continued_and_shown(dera, model, completions, tmp_path):
    output = tmp_path / "scores.jsonl"
    arguments = ["score", *model, "--completions", completions, "--output", output]
    code, shown, err = dera(*arguments, "--lambda", "0,1")
    assert code == 0, err
    assert "perplexity" in shown
    whole = output.read_text().splitlines()
    assert len(whole) == 8
    output.write_text("\n".join(whole[:3]) + "\n" + whole[3][:30])
    code, out, err = dera(*arguments, "--lambda", "0,1")
    assert code == 0
    assert "3 of 8 scores are there already" in err
    assert out.split()[:8] == shown.split()[:8]

    def by_key(lines: list[str]) -> dict[tuple, float]:
        return {(row["prompt_index"], row["lambda"], row["num_tokens"]): row["log_p"] for row in map(json.loads, lines)}

    # in another batch the last digit may differ
    assert by_key(output.read_text().splitlines()) == pytest.approx(by_key(whole), abs=1e-4)
    code, out, _ = dera(*arguments, "--lambda", "0,1,2", "--json")
    assert code == 0
    assert len(rows(out)) == len(output.read_text().splitlines()) == 12, "another λ scores that one alone"
    for changed in (["--temperature", 0.5], ["--end"], ["--tokens"]):
        code, _, err = dera(*arguments, *changed)
        assert code == 2
        assert "other settings" in err
    completions.write_text('{"prompt": "Rain fell", "completion": " hard"}\n')
    code, _, err = dera(*arguments)
    assert code == 2
    assert "holds the scores of other rows: " in err


def test_end_tokens_and_chats_are_scored_as_asked(dera, model, tmp_path):
    file = tmp_path / "completions.jsonl"
    chat = [{"role": "user", "content": "Rain?"}]
    file.write_text("".join(json.dumps({"prompt": chat, "completion": text}) + "\n" for text in ("yes", "yes</s>", "")))
    counts = {}
    for end in ("", "--end", "--no-end"):
        code, out, err = dera("score", *model, "--completions", file, "--chat", "--json", *([end] if end else []))
        assert code == 0, err
        found = sorted(rows(out), key=lambda row: row["prompt_index"])
        counts[end] = [row["num_tokens"] for row in found]
    assert counts == {"": [2, 3, 0], "--end": [3, 3, 1], "--no-end": [2, 3, 0]}, "one written out is not added again"
    assert (found[2]["log_p"], found[2]["per_token"], found[2]["perplexity"]) == (0.0, None, None)


def test_completions_are_scored_behind_the_prompt_as_it_was_rendered(dera, model, tmp_path):
    """With its system column; the same under the columns of a row of results. Another one is of other rows."""
    file, output = tmp_path / "completions.jsonl", tmp_path / "scores.jsonl"
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Rain?"}]
    given = [
        {"prompt": chat}, {"prompt": "Rain?", "system": "Be kind."},
        {"prompt": "Rain?", "columns": {"system": "Be kind."}}, {"prompt": "Rain?"},
    ]  # fmt: skip
    file.write_text("".join(json.dumps({**row, "completion": "yes"}) + "\n" for row in given))
    arguments = ["score", *model, "--completions", file, "--chat", "--json", "--output", output]
    code, out, err = dera(*arguments)
    assert code == 0, err
    first, *others, without = [row["log_p"] for row in sorted(rows(out), key=lambda row: row["prompt_index"])]
    assert others == pytest.approx([first] * 2, abs=1e-5)
    assert without != pytest.approx(first, abs=1e-3)
    file.write_text(file.read_text().replace('"system": "Be kind."', '"system": "Be rude."'))
    code, _, err = dera(*arguments)
    assert code == 2
    assert "other columns: 'system' was " in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', "line 1: has no key 'completion'; its keys are ['prompt']"),
        ('{"completion": "a"}', "line 1: has no key 'prompt'"),
        ('{"prompt": "a", "completion": ["b"]}', "line 1: a completion must be a text"),
        ('{"prompt": "", "completion": "b"}', "line 1: the prompt is empty"),
        ('{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}', "the prompt is a chat; pass --chat"),
        (
            '{"prompt": "a", "completion": "b", "finish_reason": "stop"}',
            "finish_reason='stop' is neither 'eos' nor 'length'",
        ),
        ('{"prompt": "a", "completion": "\\ud800"}', "not valid UTF-8: an escape names half"),
        (json.dumps({"prompt": "a", "completion": "xy " * 300}), "which is more than the model's context of 256"),
        ("[1]", "line 1: a row must be a JSON object; got list"),
        ("{", "line 1: not valid JSON"),
        ("", "has no rows in it"),
        (None, "there is no such file"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_completions_are_told(dera, model, tmp_path, line, message):
    file = tmp_path / "completions.jsonl"
    if line is not None:
        file.write_text(line + "\n" if line else "")
    code, out, err = dera("score", *model, "--completions", file, "--output", tmp_path / "out.jsonl")
    assert code == 2
    assert out == ""
    assert message in re.sub(r"[\s│]+", " ", err)
    assert "Traceback" not in err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_record_of_several_adapters(dera, tiny_base, tiny_adapter, top_adapter, tmp_path):
    from dera_peft import DeRaModel

    adapters = {"helpful": tiny_adapter, "harmless": top_adapter}
    DeRaModel.from_pretrained(tiny_base, adapters=adapters).save_pretrained(tmp_path / "both")
    code, out, _ = dera("info", "--adapter", tmp_path / "both")
    assert code == 0
    assert "helpful=0.5, harmless=0.5" in out
    code, _, err = dera("generate", "--adapter", tmp_path / "both", "--prompt", "Rain", "--lambda", 1)
    assert code == 2
    assert "['helpful', 'harmless']" in err
    out_dir = tmp_path / "out"
    code, _, _ = dera("export", "--adapter", tmp_path / "both", "--lambda", "helpful=0.7", "--output", out_dir)
    assert code == 0
    assert "λ(helpful)=0.7, λ(harmless)=0" in (out_dir / "README.md").read_text()


MODEL = ["--base", "{base}", "--adapter", "{adapter}"]
BAD_INPUTS = {
    "no such base": (
        ["--base", "./none", "--adapter", "{adapter}", "--prompt", "x"],
        "base='./none': there is no such folder",
    ),
    "no such adapter": (["--base", "{base}", "--adapter", "./none", "--prompt", "x"], "there is no such folder"),
    "for another base": (["--base", "{base}", "--adapter", "{other}", "--prompt", "x"], "is for another base"),
    "not LoRA": (["--base", "{base}", "--adapter", "{ia3}", "--prompt", "x"], "is of type IA3; only LoRA"),
    "no model": (["--prompt", "x"], "no model is named"),
    "nan": ([*MODEL, "--lambda", "nan", "--prompt", "x"], "'nan' is not finite"),
    "infinite": ([*MODEL, "--lambda", "0,inf", "--prompt", "x"], "'inf' is not finite"),
    "infinite in fp32": ([*MODEL, "--lambda", "1e39", "--prompt", "x"], "'1e39' is not finite in fp32"),
    "no number": ([*MODEL, "--lambda", "0,much", "--prompt", "x"], "'much' is not a number"),
    "empty prompt": ([*MODEL, "--prompt", "x", "--prompt", ""], "--prompt 2: the prompt is empty"),
    "long prompt": ([*MODEL, "--prompt", "xy " * 300], "tokens, which with 128 new ones is more than"),
    "too large a lambda": (
        [*MODEL, "--prompts", "{folder}/large.jsonl"],
        "line 1: lambda must be a finite number, an object with one for each adapter, or a list of such",
    ),
    "malformed line": ([*MODEL, "--prompts", "{folder}/bad.jsonl"], "line 2: not valid JSON"),
    "two sources": ([*MODEL, "--prompt", "x", "--prompts", "y.txt"], "not both"),
    "not UTF-8": ([*MODEL, "--prompt", "\udcff"], "--prompt 1: the prompt is not valid UTF-8"),
    "no template": ([*MODEL, "--prompts", "{folder}/chat.jsonl"], "line 1: the prompt is a chat; pass --chat"),
    "device": ([*MODEL, "--prompt", "x", "--device-map", "wherever"], "device_map='wherever' is not a device"),
    "no device": ([*MODEL, "--prompt", "x", "--device-map", "cuda:99"], "there is no such device here"),
    "no option": ([*MODEL, "--prompt", "x", "--quantization", "nf5"], "'nf5' is not one of 'nf4', 'fp4', 'int8'"),
    "output": (
        [*MODEL, "--prompt", "x", "--output", "/proc/none/out.jsonl"],
        "--output: '/proc/none/out.jsonl' can't be written",
    ),
    "stream": ([*MODEL, "--prompt", "x", "--lambda", "0,1", "--stream"], "--stream shows one completion"),
    "unknown option": ([*MODEL, "--prompt", "x", "--lambad", "1"], "No such option"),
    "out of range": ([*MODEL, "--prompt", "x", "--top-p", "2"], "top_p=2.0 must be in"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_message_and_exit_code_2(dera, tmp_path, tiny_base, tiny_adapter, case):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "large.jsonl").write_text(f'{{"prompt": "a", "lambda": [0, 1{"0" * 400}]}}\n')
    (tmp_path / "chat.jsonl").write_text('{"prompt": [{"role": "user", "content": "Hi"}]}\n')
    other = shutil.copytree(tiny_adapter, tmp_path / "other")
    factors = load_file(tiny_adapter / "adapter_model.safetensors")
    save_file(
        {key: value[:, :32].contiguous() if "lora_A" in key else value for key, value in factors.items()},
        other / "adapter_model.safetensors",
    )
    ia3 = shutil.copytree(tiny_adapter, tmp_path / "ia3")
    (ia3 / "adapter_config.json").write_text(
        '{"peft_type": "IA3", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}'
    )
    arguments, message = BAD_INPUTS[case]
    places = {"base": tiny_base, "adapter": tiny_adapter, "folder": tmp_path, "other": other, "ia3": ia3}
    code, out, err = dera("generate", *(argument.format(**places) for argument in arguments))
    assert code == 2
    assert out == ""
    assert message in re.sub(r"[\s│]+", " ", err)
    assert "Traceback" not in err


def test_debug_shows_the_traceback(dera):
    for arguments in (["generate", "--prompt", "x", "--debug"], ["--debug", "generate", "--prompt", "x"]):
        code, _, err = dera(*arguments)
        assert code == 2
        assert err.startswith("Traceback")
        assert "DeRaError: no model is named" in err


def test_a_folder_with_dera_json_names_the_rest(dera, tiny_model, tmp_path):
    tiny_model.lam = 0.25
    tiny_model.save_pretrained(tmp_path)
    for option in ("--base", "--adapter"):
        code, out, err = dera("generate", option, tmp_path, "--prompt", "Rain", "--max-new-tokens", 3, "--json")
        assert code == 0, err
        assert [row["lambda"] for row in rows(out)] == [0.25], "the recorded default λ"


def test_control_characters_do_not_reach_the_terminal(dera, model):
    code, out, _ = dera("generate", *model, "--prompt", "\x1b[31mRain\x07", "--max-new-tokens", 3)
    assert code == 0
    assert "\N{REPLACEMENT CHARACTER}[31mRain" in out
    assert "\x1b[31m" not in out
    assert "\x07" not in out


def test_an_output_that_cannot_be_written_is_told_before_the_model_loads(dera, model, tmp_path, monkeypatch):
    monkeypatch.setattr("dera_peft.model.DeRaModel.from_source", None)
    code, _, err = dera("generate", *model, "--prompt", "x", "--output", tmp_path)
    assert code == 2
    assert f"--output: '{tmp_path}' can't be written: Is a directory." in err


def test_a_run_that_fails_leaves_no_empty_output(dera, model, tmp_path):
    file = tmp_path / "out.jsonl"
    code, _, err = dera("generate", *model, "--prompt", "xy " * 300, "--output", file)
    assert code == 2
    assert "is more than the model's context" in err
    assert not file.exists()
    file.touch()
    dera("generate", *model, "--prompt", "xy " * 300, "--output", file)
    assert file.exists(), "that one was there before"


def test_what_nf4_cannot_quantize_is_told(dera, stories, stories_adapter, monkeypatch):
    monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: True)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    code, _, err = dera(
        "generate", "--base", stories, "--adapter", stories_adapter, "--quantization", "nf4", "--prompt", "x"
    )
    assert code == 2
    assert "can't be quantized to nf4 on this CPU: 'model.layers.0.mlp.gate_proj'" in err


def test_a_corrupt_base_is_named(dera, tiny_base, tiny_adapter, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"broken")
    code, out, err = dera("generate", "--base", base, "--adapter", tiny_adapter, "--prompt", "x")
    assert (code, out) == (2, "")
    assert "model.safetensors is corrupt" in err
    assert "Traceback" not in err


def test_a_corrupt_file_is_named(dera, model, tiny_base, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
    code, _, err = dera("generate", "--base", tiny_base, "--adapter", tmp_path, "--prompt", "x")
    assert code == 2
    assert "adapter_model.safetensors is corrupt" in err


def test_sweep(dera, model, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Rain fell on day {day}"}) + "\n" for day in range(4))
    )
    (tmp_path / "reward.py").write_text(
        "def reward(prompts, completions, **columns): return [c.count('a') for c in completions]\n"
    )
    (tmp_path / "sweep.yaml").write_text(
        f"prompts: {tmp_path}/prompts.jsonl\nrewards: [{tmp_path}/reward.py:reward, length]\n"
        f"output_dir: {tmp_path}/out\nlambdas: [0, 0.5, 1]\nsamples: 2\nmax_new_tokens: 8\n"
    )
    arguments = ["sweep", "--config", tmp_path / "sweep.yaml", *model]
    code, out, err = dera(*arguments)
    assert code == 0, err
    samples = rows((tmp_path / "out" / "samples.jsonl").read_text())
    assert len(samples) == 4 * 3 * 2
    assert all(row["kl"] == 0 for row in samples if row["lambda"] == 0)
    assert all(row["kl"] > 0 for row in samples if row["lambda"] != 0 and row["num_tokens"])
    assert all(row["rewards"]["reward"] == row["completion"].count("a") for row in samples)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "parts", "samples.jsonl", "summary.csv", "report.html", "sweep.png", "sweep.svg", "pareto.png", "pareto.svg",
        "recommendation.json",
    }  # fmt: skip
    assert "λ* = " in out
    assert "Rain fell on day 0" in out
    assert "Rain fell on day 1" in out

    (tmp_path / "picky.py").write_text(
        "def picky(prompts, completions, **columns):\n"
        "    if prompts[0].endswith('2'): raise KeyError('two')\n"
        "    return [1.0] * len(completions)\n"
    )
    before = (tmp_path / "out" / "samples.jsonl").read_text()
    monkeypatch.setattr("dera_peft.decoding.decoder.decode", None)
    monkeypatch.setattr("dera_peft.evaluate.results.write_report", lambda *_, **__: None)
    picky = ["--reward", "length", "--reward", f"{tmp_path}/picky.py:picky", "--batch-size", "1"]
    code, out, err = dera(*arguments, *picky)
    assert code == 1, "a reward has failed"
    assert "all 24 completions are there already" in err
    assert "picky: failed on 6 of 24 completions, as: the reward 'picky' raised KeyError: 'two'" in err
    assert dera(*arguments)[0] == 0
    assert (tmp_path / "out" / "samples.jsonl").read_text() == before

    code, _, err = dera("sweep", "--config", tmp_path / "sweep.yaml", *model, "--seed", 9)
    assert code == 2
    assert "other settings" in err
    (tmp_path / "sweep.yaml").write_text("lambdsa: [0]\n")
    code, _, err = dera("sweep", "--config", tmp_path / "sweep.yaml")
    assert code == 2
    assert "'lambdsa' is not a key" in err
    code, _, err = dera("sweep", *model)
    assert "prompts is missing" in err
