"""Runs that are killed, diverge or find no room on the disk; and rows that can't be trained on."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import train, write_rows

from dera_peft import DeRaError
from dera_peft.training import trainer as running

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SAVING = {"max_steps": 6, "logging_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}


def kill_at_step(step: int):
    def patch(monkeypatch):
        training_step = running.GuardedTrainer.training_step

        def killed(self, *args, **kwargs):
            if self.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return training_step(self, *args, **kwargs)

        monkeypatch.setattr(running.GuardedTrainer, "training_step", killed)

    return patch


def kill_while_saving_checkpoint(step: int):
    """When weights and optimizer are written, and the rest is not."""

    def patch(monkeypatch):
        save_rng_state = running.Trainer._save_rng_state

        def killed(self, output_dir):
            if output_dir.endswith(f"checkpoint-{step}"):
                os.kill(os.getpid(), signal.SIGKILL)
            save_rng_state(self, output_dir)

        monkeypatch.setattr(running.Trainer, "_save_rng_state", killed)

    return patch


def kill_while_saving_the_result(monkeypatch):
    def killed(trainer):
        Path(trainer.args.output_dir, "adapter_model.safetensors").write_bytes(b"half of a file")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(running, "save", killed)


def train_and_be_killed(patch, *args, **settings) -> None:
    """In a process of its own, which has what this one has imported."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            patch(pytest.MonkeyPatch())
            train(*args, **settings)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def metrics(folder: Path) -> dict:
    return json.loads((folder / "dera.json").read_text())["training"]["metrics"]


@pytest.fixture(scope="module")
def settings(tiny_base, preferences) -> dict:
    return {"model_name_or_path": tiny_base, "dataset_name": preferences, **SAVING}


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory) -> Path:
    return train("dpo", tmp_path_factory.mktemp("uninterrupted") / "dpo", **settings)


@pytest.mark.parametrize(
    ("patch", "begun_with"),
    [
        (kill_at_step(1), None),
        (kill_at_step(3), 2),
        (kill_while_saving_checkpoint(2), None),
        (kill_while_saving_checkpoint(4), 2),
        (kill_while_saving_the_result, 6),
    ],
    ids=["without-checkpoint", "after-checkpoint", "in-first-checkpoint", "in-second-checkpoint", "in-result"],
)
def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(patch, begun_with, settings, uninterrupted, tmp_path, capfd):
    train_and_be_killed(patch, "dpo", tmp_path / "dpo", **settings)
    assert not json.loads((tmp_path / "dpo" / "run.json").read_text())["complete"]
    capfd.readouterr()
    train("dpo", tmp_path / "dpo", **settings)
    said = capfd.readouterr().err
    assert (f"going on from {tmp_path / 'dpo' / f'checkpoint-{begun_with}'}" in said) == (begun_with is not None)
    assert ("going on from" in said) == (begun_with is not None)
    expected, found = (load_file(f / "adapter_model.safetensors") for f in (uninterrupted, tmp_path / "dpo"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-4)
    for name in ("loss", "train_loss", "first_loss"):
        assert metrics(tmp_path / "dpo")[name] == pytest.approx(metrics(uninterrupted)[name], abs=1e-5)


@pytest.mark.parametrize("continues", [False, True], ids=["frozen", "continued"])
def test_a_killed_run_over_an_sft_adapter(continues, settings, sft_adapter, tmp_path):
    settings = {**settings, "sft_adapter": sft_adapter, "continue_sft_adapter": continues, "lora_target_modules": EVERY}
    whole = train("dpo", tmp_path / "whole", **settings)
    train_and_be_killed(kill_at_step(5), "dpo", tmp_path / "killed", **settings)
    killed = train("dpo", tmp_path / "killed", **settings)
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, killed))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-4)
    assert metrics(killed)["loss"] == pytest.approx(metrics(whole)["loss"], abs=1e-5)
    assert {path.name for path in killed.iterdir() if path.is_dir()} == {"checkpoint-6", "sft"}


def test_a_killed_run_of_sft(tiny_base, preferences, tmp_path):
    """All weights, with the dropout of nothing; the rows' prompt and chosen as texts."""
    rows = [json.loads(line) for line in preferences.read_text().splitlines()]
    texts = write_rows(tmp_path / "texts.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows])
    settings = {"model_name_or_path": tiny_base, "dataset_name": texts, **SAVING}
    whole = train("sft", tmp_path / "whole", **settings)
    train_and_be_killed(kill_while_saving_checkpoint(4), "sft", tmp_path / "killed", **settings)
    killed = train("sft", tmp_path / "killed", **settings)
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(settings, tmp_path):
    settings = {**settings, "learning_rate": 1e38, "save_steps": 1, "save_total_limit": 5, "max_grad_norm": 0}
    with pytest.raises(DeRaError) as caught:
        train("dpo", tmp_path / "dpo", **settings)
    assert "the loss is nan at step 2, with the learning rate 1e+38" in str(caught.value)
    assert "there is no good checkpoint yet" in str(caught.value), "checkpoint-1 is what gave the NaN"


def test_a_loss_that_diverges_stops_the_run(settings, tmp_path, monkeypatch):
    """The loss of step k is made k times as large."""
    training_step = running.DPOTrainer.training_step

    def growing(self, *args, **kwargs):
        return training_step(self, *args, **kwargs) * (self.state.global_step + 1)

    monkeypatch.setattr(running.DPOTrainer, "training_step", growing)
    settings = {**settings, "learning_rate": 0, "logging_steps": 1, "save_total_limit": 5}
    with pytest.raises(DeRaError) as caught:
        train("dpo", tmp_path / "dpo", **settings)
    assert "the loss diverges: it began at 0.6931 and is 3.466" in str(caught.value)
    assert f"the last good checkpoint is {tmp_path / 'dpo' / 'checkpoint-2'}" in str(caught.value)
    train("dpo", tmp_path / "again", **{**settings, "stop_at_loss": 0})


def test_no_room_for_a_checkpoint(settings, uninterrupted, tmp_path, monkeypatch):
    save = torch.save

    def full(value, file, *args, **kwargs):
        if "checkpoint-4" in str(file):
            Path(file).write_bytes(b"half of")
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        save(value, file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(DeRaError) as caught:
            train("dpo", tmp_path / "dpo", **settings)
    assert "checkpoint-4' can't be saved: [Errno 28] No space left on device" in str(caught.value)
    assert f"the last good checkpoint is {tmp_path / 'dpo' / 'checkpoint-2'}" in str(caught.value)
    assert [path.name for path in (tmp_path / "dpo").glob("checkpoint-*")] == ["checkpoint-2"]
    train("dpo", tmp_path / "dpo", **settings)
    assert metrics(tmp_path / "dpo")["loss"] == pytest.approx(metrics(uninterrupted)["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"f_divergence_type": "foo"}, "training stopped at step 1: Unknown f_divergence_type: foo"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be at least 1"),
        ({"lora_task_type": "FOO"}, "Invalid task type: 'FOO'"),
        ({"model_init_kwargs": '{"foo": 1}'}, "can't be loaded: .*unexpected keyword argument 'foo'"),
        ({"max_length": 0}, "have a prompt that fills max_length .*No row is left to train on"),
        ({"dataset_num_proc": -1}, "dataset_num_proc=-1 must not be negative"),
    ],
)
def test_a_setting_that_a_library_refuses_is_one_message(changes, message, settings, tmp_path):
    """At once, or where it comes to use it."""
    with pytest.raises(DeRaError, match=message) as caught:
        train("dpo", tmp_path / "dpo", **{**settings, **changes})
    assert "\n" not in str(caught.value)


def test_rows_that_cannot_be_used_are_counted_and_left_out(settings, preferences, tmp_path, capfd):
    good = [json.loads(line) for line in preferences.read_text().splitlines()][:12]
    bad = [
        {"prompt": "A", "chosen": "", "rejected": " b"},
        {"prompt": " ", "chosen": " a", "rejected": " b"},
        {"prompt": "A", "chosen": " a", "rejected": " a"},
        {"prompt": "A", "rejected": " a"},
        {"prompt": "A", "chosen": " a fox" * 60, "rejected": " b"},
        {"prompt": "A fox " * 60, "chosen": " a", "rejected": " b"},
    ]
    data = write_rows(tmp_path / "rows.jsonl", good + bad)
    folder = train("dpo", tmp_path / "dpo", **{**settings, "dataset_name": data})
    expected = {
        "total": 18, "are empty": 2, "have identical chosen and rejected": 1, "lack chosen": 1,
        "have a prompt that fills max_length": 1, "are cut by max_length": 1,
    }  # fmt: skip
    assert json.loads((folder / "dera.json").read_text())["training"]["rows"] == expected
    said = capfd.readouterr().err
    assert f"{data}: 18 rows, 5 of them left out: 2 are empty" in said
    assert said.index("are empty") < said.index("training on")


def pairs(chosen: str, rejected: str, count: int = 1) -> list[dict]:
    return [{"prompt": "A", "chosen": chosen, "rejected": rejected}] * count


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (pairs(" a", " a", 3) + pairs(" a", " b", 2), "5 rows, 3 of them left out: 3 have identical chosen and rej"),
        (pairs(" a" * 80, " b", 3) + pairs(" a", " b"), "3 are cut by max_length.*raise max_length"),
        ([{"prompt": "A", "chosen": " a"}], "has no column 'rejected'; it has"),
    ],
    ids=["identical", "cut", "column"],
)
def test_too_many_bad_rows_are_an_error(rows, message, settings, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DeRaError, match=message):
        train("dpo", tmp_path / "dpo", **{**settings, "dataset_name": data})


def test_bad_rows_of_texts(tiny_base, tmp_path, capfd):
    texts = [{"text": "A fox crossed the river."}] * 6 + [{"text": " "}, {"text": None}, {"text": "a fox " * 60}]
    data = write_rows(tmp_path / "texts.jsonl", texts)
    train("sft", tmp_path / "sft", model_name_or_path=tiny_base, dataset_name=data)
    assert (
        f"{data}: 9 rows, 2 of them left out: 1 are empty, 1 lack text, 1 are cut by max_length"
        in capfd.readouterr().err
    )


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_chats_are_counted_with_the_template_that_they_are_trained_with(tiny_base, tmp_path, capfd, column):
    """Fifty tokens of a template, twice, are what makes a short chat too long for 64."""
    role, content = ("role", "content") if column == "messages" else ("from", "value")

    def chat(text: str) -> list[dict]:
        return [{role: "user", content: "a"}, {role: "assistant", content: text}]

    data = write_rows(tmp_path / "chats.jsonl", [{column: chat("b")}] * 4 + [{column: chat("b " * 60)}] * 2)
    (tmp_path / "long.jinja").write_text("{% for m in messages %}" + "!" * 50 + "{{ m['content'] }}{% endfor %}")
    settings = {"model_name_or_path": tiny_base, "dataset_name": data}
    train("sft", tmp_path / "own", **settings)
    assert "6 rows, 0 of them left out: 2 are cut by max_length" in capfd.readouterr().err
    with pytest.raises(DeRaError, match="6 are cut by max_length"):
        train("sft", tmp_path / "long", **settings, chat_template_path=tmp_path / "long.jinja")
    with pytest.raises(DeRaError, match=r"chat_template_path='.*none\.jinja' can't be read"):
        train("sft", tmp_path / "none", **settings, chat_template_path=tmp_path / "none.jinja")


def test_early_stopping_keeps_the_best_checkpoint(settings, preferences, tmp_path, monkeypatch):
    """At a learning rate that soon does harm on rows that were not trained on."""
    settings = {
        **settings, "dataset_train_split": "train[:70%]", "dataset_test_split": "train[70%:]", "learning_rate": 3e-2,
        "early_stopping_patience": 2, "save_steps": 1, "max_steps": 30, "logging_steps": 1, "stop_at_loss": 0,
    }  # fmt: skip
    states = []
    run = running.run

    def spy(trainer):
        metrics = run(trainer)
        states.append((trainer.state, trainer.evaluate()["eval_loss"]))
        return metrics

    monkeypatch.setattr(running, "run", spy)
    train("dpo", tmp_path / "dpo", **settings)
    ((state, final),) = states
    evaluated = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry][:-1]
    assert len(evaluated) < 30, "it has stopped early"
    assert min(evaluated) < evaluated[-1]
    assert evaluated.index(min(evaluated)) == len(evaluated) - 3, "after two evaluations that were not better"
    assert final == pytest.approx(min(evaluated), abs=1e-5), "and what is saved is the best"
