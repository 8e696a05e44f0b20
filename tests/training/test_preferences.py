"""The preferences program on random tiny models: what it samples, reuses, ranks and refuses."""

import json
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from captured import watch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dera_peft import DeRaError, progress
from dera_peft.checkpoint import devices
from dera_peft.decoding.batching import decode
from dera_peft.decoding.requests import Request
from dera_peft.decoding.sampling import Sampling
from dera_peft.training import preferences
from dera_peft.training.preference_rows import PreferenceReader
from dera_peft.training.sft_model import SFTModel

ROOT = Path(__file__).resolve().parents[2]
REWARD = """
def length(prompts, completions, **columns):
    return [len(completion) for completion in completions]

def weighted(prompts, completions, weight, **columns):
    return [w * len(c) for w, c in zip(weight, completions)]

def of_chats(prompts, completions, **columns):
    return [len(message["content"]) for (message,) in completions]

def silent(prompts, completions, **columns):
    return [None] * len(completions)
"""
OPTIONS = ["--samples", "3", "--max_new_tokens", "12", "--seed", "5", "--batch_size", "8"]


@pytest.fixture(scope="module")
def base(tiny_base, tmp_path_factory) -> Path:
    """`tiny_base`, where every eighth token ends a text: its random weights would seldom find the one that does."""
    folder = tmp_path_factory.mktemp("base")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(7, len(tokenizer), 8)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path) -> Path:
    (tmp_path / "reward.py").write_text(REWARD)
    prompts = ["A fox crossed", "Rain fell on the market", "My sister repairs bicycles", "The old lighthouse"]
    rows = [{"prompt": prompt, "weight": index % 2, "other": 1} for index, prompt in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def make(
    files: Path, base: Path, output: str = "out", *arguments: str, reward: str = "length", data=None
) -> list[dict]:
    """Runs the program; returns the rows of preferences.jsonl."""
    source = data or ["--prompts", str(files / "prompts.jsonl")]
    preferences.main(
        [
            "--model_name_or_path", str(base), "--reward", f"{files}/reward.py:{reward}", *source,
            "--output_dir", str(files / output), *OPTIONS, *arguments,
        ]
    )  # fmt: skip
    return read(files / output / "preferences.jsonl")


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def completions(folder: Path) -> dict:
    return {(row["prompt_index"], row["sample"]): row["completion"] for row in read(folder / "completions.jsonl")}


def test_an_interrupted_run_goes_on_and_ends_the_same(files, base, capsys):
    whole = make(files, base, "whole")
    assert whole
    lines = (files / "whole" / "completions.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 12
    make(files, base, "cut")
    (files / "cut" / "preferences.jsonl").unlink()
    (files / "cut" / "completions.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    assert make(files, base, "cut") == whole
    assert completions(files / "cut") == completions(files / "whole")
    assert "of 4 prompts" not in capsys.readouterr().err


def test_a_process_counts_its_own_share_alone(files, base, monkeypatch):
    """Of 12 completions 5 are there: of each, the second of two processes has every second one, 2 and 3."""
    make(files, base)
    log = files / "out" / "completions.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:5]))
    shown = []

    @contextmanager
    def show(description, total, done):
        shown.append((total, done))
        yield lambda items: shown.append(items)

    second = SimpleNamespace(
        process_index=1, num_processes=2, is_main_process=False, device=torch.device("cpu"),
        wait_for_everyone=lambda: None, main_process_first=nullcontext,
    )  # fmt: skip
    monkeypatch.setattr(devices, "join_processes", lambda: second)
    monkeypatch.setattr(progress, "show_progress", show)
    preferences.main(
        ["--model_name_or_path", str(base), "--reward", f"{files}/reward.py:length", "--prompts",
         str(files / "prompts.jsonl"), "--output_dir", str(files / "out"), *OPTIONS]
    )  # fmt: skip
    assert shown[0] == (5, 2)
    assert sum(shown[1:]) == 3


def test_ranked_anew_without_sampling_anew(files, base, monkeypatch):
    best = make(files, base)
    monkeypatch.setattr(SFTModel, "load_to_sample", lambda _: pytest.fail("nothing is to be sampled"))
    every = make(files, base, "out", "--pairs", "all")
    assert len(every) > len(best)
    assert all(pair in every for pair in best)
    margin = sorted(pair["chosen_reward"] - pair["rejected_reward"] for pair in every)[len(every) // 2]
    some = make(files, base, "out", "--pairs", "all", "--min_margin", str(margin))
    assert some == [pair for pair in every if pair["chosen_reward"] - pair["rejected_reward"] > margin]
    assert make(files, base, "out", "--max_prompts", "2") == [
        pair for pair in best if pair["prompt"].startswith(("A", "Rain"))
    ]


def test_more_samples_go_on_from_those_that_are_there(files, base):
    make(files, base)
    before = (files / "out" / "completions.jsonl").read_text()
    make(files, base, "out", "--samples", "4")
    after = (files / "out" / "completions.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 16
    with pytest.raises(DeRaError, match="made with seed=5, and now it is 6"):
        make(files, base, "out", "--seed", "6")
    make(files, base, "out", "--seed", "6", "--overwrite", "true")
    assert len(read(files / "out" / "completions.jsonl")) == 12
    assert (
        completions(files / "out").items()
        - {
            (row["prompt_index"], row["sample"]): row["completion"] for row in map(json.loads, before.splitlines())
        }.items()
    ), "another seed gives other texts"


def test_more_prompts_go_on_from_those_that_are_there_and_other_columns_are_an_error(files, base):
    data = ["--dataset_name", str(files / "prompts.jsonl"), "--reward_columns", "weight"]
    prompts = files / "prompts.jsonl"
    make(files, base, reward="weighted", data=data)
    before, text = (files / "out" / "completions.jsonl").read_text(), prompts.read_text()
    prompts.write_text(text + json.dumps({"prompt": "The baker sold", "weight": 2, "other": 1}) + "\n")
    make(files, base, reward="weighted", data=data)
    after = (files / "out" / "completions.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == len(before.splitlines()) + 3
    prompts.write_text(text.replace('"weight": 0', '"weight": 7'))
    with pytest.raises(DeRaError, match=r"other columns: 'weight' was 0, and .*row [13] has 7"):
        make(files, base, reward="weighted", data=data)
    make(files, base, "out", "--overwrite", "true", reward="weighted", data=data)
    assert {row["columns"]["weight"] for row in read(files / "out" / "completions.jsonl")} == {7, 1}


def test_an_sft_adapter_samples_as_the_model_that_it_is_merged_into(files, base, tiny_adapter):
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tiny_adapter).merge_and_unload()
    merged.save_pretrained(files / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(files / "merged")
    make(files, base, "base")
    make(files, base, "adapter", "--sft_adapter", str(tiny_adapter))
    make(files, files / "merged", "merged")
    found = {name: completions(files / name) for name in ("base", "adapter", "merged")}
    assert found["base"] != found["adapter"]
    assert found["adapter"] == found["merged"]


def test_a_datasets_column_of_texts_with_columns_for_the_reward(files, base):
    data = ["--dataset_name", str(files / "prompts.jsonl"), "--reward_columns", "weight"]
    rows = make(files, base, reward="weighted", data=data)
    assert {row["prompt"] for row in rows} <= {"Rain fell on the market", "The old lighthouse"}, "weight 0: all alike"
    assert rows
    sampled = read(files / "out" / "completions.jsonl")
    assert all(row["reward"] == row["columns"]["weight"] * len(row["completion"]) for row in sampled)
    assert "other" not in sampled[0]["columns"]
    with pytest.raises(DeRaError, match="missing 1 required positional argument: 'weight'"):
        make(files, base, "other", reward="weighted", data=data[:2])


def test_every_batch_has_the_columns_of_all_rows(files, base):
    """Also where its first row lacks one."""
    rows = read(files / "prompts.jsonl")
    for row in rows[::2]:
        del row["other"]
    (files / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (files / "reward.py").write_text(
        "def length(prompts, completions, other, weight, **columns):\n"
        "    assert not columns.keys() - {'completion_ids', 'trainer_state', 'log_extra', 'log_metric'}\n"
        "    return [len(completion) + 1000 * (value or 0) for completion, value in zip(completions, other)]\n"
    )
    make(files, base, "out", "--batch_size", "1")
    sampled = read(files / "out" / "completions.jsonl")
    assert len(sampled) == 12
    assert all(row["reward"] == len(row["completion"]) + 1000 * row["columns"].get("other", 0) for row in sampled)


def test_columns_may_be_called_as_the_results_call_their_values(files, base):
    names = {"weight": "index", "other": "reward"}
    rows = [{names.get(name, name): value for name, value in row.items()} for row in read(files / "prompts.jsonl")]
    (files / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (files / "reward.py").write_text(
        "def length(prompts, completions, index, reward):\n"
        "    return [100 * i + r + len(c) for i, r, c in zip(index, reward, completions)]\n"
    )
    assert make(files, base)
    sampled = read(files / "out" / "completions.jsonl")
    assert len(sampled) == 12
    for row in sampled:
        own = rows[row["prompt_index"]]
        assert row["columns"] == {"index": own["index"], "reward": own["reward"]}
        assert row["reward"] == 100 * own["index"] + own["reward"] + len(row["completion"])
    (files / "prompts.jsonl").write_text("".join(json.dumps({**row, "completions": 1}) + "\n" for row in rows))
    with pytest.raises(DeRaError, match="column 'completions': a reward is given the columns by name"):
        make(files, base, "other")


def test_completions_of_an_earlier_version_are_refused(files, base):
    make(files, base)
    file = files / "out" / "completions.jsonl"
    names = {"prompt_index": "index", "finish_reason": "finish", "num_tokens": "tokens"}
    old = [{names.get(name, name): value for name, value in row.items()} for row in read(file)]
    file.write_text("".join(json.dumps(row) + "\n" for row in old))
    with pytest.raises(DeRaError, match="line 1, is of an earlier version, whose rows had 'index', 'tokens' and"):
        make(files, base)


def test_a_datasets_column_of_chats(files, base, capsys):
    """What stands before the answer is the prompt; rows that have none, or one too long, are counted."""
    user = {"role": "user", "content": "What does the fox do?"}
    chats = [
        [user, {"role": "assistant", "content": "It sleeps."}],
        [user],
        [{"role": "user", "content": " "}, {"role": "assistant", "content": "Hm?"}],
        [{"role": "user", "content": "fox " * 300}],
    ]
    (files / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    data = ["--dataset_name", str(files / "chats.jsonl"), "--prompt_column", "messages", "--chat", "true"]
    rows = make(files, base, data=data, reward="of_chats")
    assert rows
    for row in rows:
        assert row["prompt"] == [user]
        assert row["chosen_reward"] == len(row["chosen"][0]["content"])
        assert [message["role"] for message in (*row["chosen"], *row["rejected"])] == ["assistant"] * 2
    table = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "1 25.0% no pair: the prompt is empty" in table
    assert "1 25.0% no pair: prompt and max_new_tokens exceed the model's context" in table
    assert "4 in all" in table
    with pytest.raises(DeRaError, match=r"has no column 'text'; it has \['messages'\]"):
        make(files, base, data=[*data[:3], "text"])


def test_a_text_that_was_rendered_as_a_chat_is_trained_on_as_one(files, base):
    rows = make(files, base, "out", "--chat", "true", reward="of_chats")
    assert rows
    assert all([message["role"] for message in row["prompt"]] == ["user"] for row in rows)
    assert all([message["role"] for message in row["rejected"]] == ["assistant"] for row in rows)


def test_dpo_trains_with_the_prompt_tokens_that_were_sampled_from(files, base):
    """Of a text that became a chat, with its system column, tools and arguments, and of an answer that is begun."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{{ tools | length if tools else '' }}{{ mood }}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}me:{% endif %}"
    )
    chatty = files / "chatty"
    chatty.mkdir()
    for file in base.iterdir():
        (chatty / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(chatty)
    begun = [{"role": "user", "content": "A fox"}, {"role": "assistant", "content": "It crossed"}]
    rows = [
        {"prompt": "Rain fell", "system": "Be kind.", "tools": None, "chat_template_kwargs": {"mood": "gay "}},
        {"prompt": begun, "system": None, "tools": [{"name": "f"}], "chat_template_kwargs": None},
    ]
    texts = ["gay system: Be kind.\nuser: Rain fell\nme:", "1user: A fox\nassistant: It crossed"]
    (files / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in ("--prompts", "--dataset_name"):
        pairs = make(
            files, chatty, f"out{source}", "--chat", "true", "--samples", "8",
            data=[source, str(files / "chats.jsonl")], reward="of_chats",
        )  # fmt: skip
        columns = list(dict.fromkeys(name for pair in pairs for name in pair))
        read_pair = PreferenceReader(columns, tokenizer)
        made = [read_pair({**dict.fromkeys(columns), **pair}).columns for pair in pairs]
        assert [tokenizer.decode(row["decoding_prompt_ids"]) for row in made] == texts


def test_a_quantized_base_samples_other_texts(files, base):
    make(files, base, "full")
    make(files, base, "nf4", "--quantization", "nf4")
    assert completions(files / "full") != completions(files / "nf4")
    model = SFTModel(base=str(base), quantization="nf4").load_to_sample()
    assert type(model.base.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"


@pytest.mark.parametrize("adapted", [False, True])
def test_steps_of_the_sft_model_are_captured_and_draw_what_transformers_and_peft_do(base, sft_adapter, adapted):
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapted:
        plain = PeftModel.from_pretrained(plain, sft_adapter).eval().get_base_model()
    model = SFTModel(base=str(base), adapter=str(sft_adapter) if adapted else None).load_to_sample()
    model.capture, recorder = True, watch(model, torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [tokenizer(text).input_ids for text in ("A fox crossed", "Rain fell on the market")]
    requests = [Request(index, None, sample) for index in range(2) for sample in range(4)]
    drawn = []
    for one in (plain, model):
        batches = decode(one, tokenizer, prompts, requests, Sampling(max_new_tokens=12))
        drawn.append({each.request: each.tokens for batch in batches for each in batch})
    assert drawn[0] == drawn[1]
    assert len(set(map(tuple, drawn[0].values()))) > 4
    assert recorder.replays


def test_no_pair_at_all_is_an_error_after_the_table(files, base, capsys):
    with pytest.raises(DeRaError, match="no prompt gives a pair"):
        make(files, base, reward="silent")
    assert "fewer than two completions got a reward" in capsys.readouterr().out
    assert not (files / "out" / "preferences.jsonl").exists()


def test_two_processes_make_what_one_makes(files, base):
    one = make(files, base, "one")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "dera_peft.cli",
            "preferences",
            "--model_name_or_path", base, "--reward", f"{files}/reward.py:length", "--prompts", files / "prompts.jsonl",
            "--output_dir", files / "two", *OPTIONS,
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("in all") == 1, "one of them speaks"
    parts = [read(files / "two" / name) for name in ("completions.jsonl", "completions-1.jsonl")]
    assert [len(part) for part in parts] == [6, 6]
    assert read(files / "two" / "preferences.jsonl") == one


def test_help_shows_the_text_as_it_is_written(capsys):
    with pytest.raises(SystemExit):
        preferences.main(["--help"])
    assert preferences.__doc__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "x"], "prompts .a file. or dataset_name: one of the two"),
        (["--min_margin", "-1"], "min_margin=-1.0 must not be negative"),
        (["--max_prompts", "0"], "max_prompts=0 must be at least 1"),
        (["--sft_adapter", "./nowhere"], "nowhere"),
        (["--device_map", "cuda:7"], "there is no such device here"),
        (["--model_name_or_path", "./nowhere"], "model_name_or_path='./nowhere'"),
    ],
)
def test_bad_input_is_refused(files, base, arguments, message):
    with pytest.raises(DeRaError, match=message):
        make(files, base, "out", *arguments)
