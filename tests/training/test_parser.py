"""Where the training programs' settings come from, and what is no setting."""

import os

import pytest

from dera_peft import DeRaError
from dera_peft.checkpoint.source import ModelSource
from dera_peft.cli.program import split_debug
from dera_peft.decoding.sampling import Sampling
from dera_peft.settings import fields, setting_of
from dera_peft.training import dpo, preferences, sft
from dera_peft.training.dpo import DPOSettings
from dera_peft.training.parser import Parser
from dera_peft.training.preferences import PreferenceSampling, PreferenceSettings
from dera_peft.training.trainer import DPOConfig, ModelConfig

NEEDED = ["--model_name_or_path", "m", "--prompts", "p.txt", "--reward", "r.py:f", "--output_dir", "out"]


def read_dpo(*arguments: str) -> tuple:
    return Parser("dera dpo", "", DPOSettings, DPOConfig, ModelConfig).read(list(arguments))


def read_preferences(*arguments: str) -> tuple:
    return Parser("dera preferences", "", PreferenceSettings, PreferenceSampling).read([*NEEDED, *arguments])


def test_the_command_line_comes_before_the_file_and_that_before_the_default(tmp_path):
    file = tmp_path / "dpo.yaml"
    file.write_text("beta: 0.3\nlearning-rate: 1e-3\nlora_r: 8\nlora-target-modules: all-linear\nbf16: false\n")
    settings, training, model = read_dpo("--lora_r", "4", "--config", str(file), "--use_peft", "--max-length", "7")
    assert (training.beta, training.learning_rate, training.max_length) == (0.3, 1e-3, 7)
    assert (model.lora_r, model.lora_alpha, model.lora_target_modules, model.use_peft) == (4, 32, "all-linear", True)
    assert settings == DPOSettings()


def test_values_of_a_file_are_read_as_on_the_command_line(tmp_path):
    file = tmp_path / "dpo.yaml"
    file.write_text("learning_rate: '1e-3'\nloss_weights: [1, 2]\nloss_type: [sigmoid, sft]\nreport_to: [none]\n"
                    "run_name: 5\nmodel_init_kwargs: {a: 1}\nbf16: no\nmax_length: null\n")  # fmt: skip
    _, training, _ = read_dpo("--config", str(file))
    assert (training.learning_rate, training.loss_weights, training.run_name) == (1e-3, [1.0, 2.0], "5")
    assert (training.loss_type, training.model_init_kwargs, training.max_length) == (["sigmoid", "sft"], {"a": 1}, None)


def test_what_was_given_is_known_apart_from_defaults(tmp_path):
    file = tmp_path / "dpo.yaml"
    file.write_text("beta: 0.3\nmax-length: null\nlora-target-modules: all-linear\nenv: {DERA_TEST: 1}\n")
    parser = Parser("dera dpo", "", DPOSettings, DPOConfig, ModelConfig)
    parser.read(["--config", str(file), "--beta", "0.1", "--seed", "42", "--bf16", "false", "--use_peft"])
    assert parser.given == {
        "beta": 0.1, "max_length": None, "lora_target_modules": ["all-linear"], "seed": 42, "bf16": False,
        "use_peft": True,
    }  # fmt: skip


def test_lists_take_words_and_of_a_value_given_twice_the_last_counts(tmp_path):
    file = tmp_path / "preferences.yaml"
    file.write_text("reward_columns: weight\nsamples: 6\n")
    first, _ = read_preferences("--config", str(file))
    assert (first.reward_columns, first.samples) == (("weight",), 6)
    settings, sampling = read_preferences(
        "--config", str(file), "--reward_columns", "a", "b", "--samples", "3", "--samples", "5", "--chat", "true",
        "--chat", "false", "--top-k", "7", "--min_p", "0.1",
    )  # fmt: skip
    assert (settings.reward_columns, settings.samples, settings.chat) == (("a", "b"), 5, False)
    assert (sampling.top_k, sampling.min_p, sampling.max_new_tokens) == (7, 0.1, 256)


def test_variables_of_the_environment_can_be_set_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DERA_TEST", "no")
    file = tmp_path / "dpo.yaml"
    file.write_text("env: {DERA_TEST: 1}\nbf16: false\n")
    read_dpo("--config", str(file))
    assert os.environ["DERA_TEST"] == "1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "--learning_rat is not an option of dera dpo; do you mean 'learning_rate'?"),
        (["--lora-rr=3"], "--lora-rr is not an option of dera dpo; do you mean 'lora_r'?"),
        (["--qqqqqqq", "1"], "--qqqqqqq is not an option of dera dpo; see --help."),
        (["--lora_r", "3", "4"], "'4' follows no option that takes it"),
        (["--lora_r", "x"], "argument --lora_r/--lora-r: invalid int value: 'x'"),
        (["--quantization", "nf5"], "quantization: invalid choice: 'nf5' (choose from"),
        (["--num_processes", "0"], "num_processes=0 must be an integer of at least 1"),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "nowhere.yaml"], "config='nowhere.yaml': there is no such file"),
    ],
)
def test_what_is_no_option(arguments, message):
    with pytest.raises(DeRaError) as caught:
        read_dpo("--bf16", "false", *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning-rat: 1", "'learning-rat' is not a key of dera dpo; do you mean 'learning_rate'?"),
        ("beta: 1\nbeta: [", "is not valid YAML"),
        ("lora-r: 1\nlora_r: 2", "'lora_r' is there twice"),
        ("- beta", "must hold keys with values"),
        ("sft_adapter: 3", "sft_adapter=3 must be a text"),
        ("quantization: nf5", "quantization='nf5' is not known; choose one of nf4, fp4, int8"),
        ("max_steps: [3]", "dpo.yaml': max_steps=[3] must be a single value"),
        ("beta: {a: 1}", "dpo.yaml': beta={'a': 1} must be a single value"),
        ("lora_target_modules: [[a]]", "dpo.yaml': lora_target_modules=[['a']] must be a value or a list of values"),
        ("seed: 1.5", "dpo.yaml': argument --seed: invalid int value: '1.5'"),
        ("eval_strategy: no", "invalid choice: 'False' (choose from 'no', 'steps', 'epoch')"),
        ("gradient_checkpointing_kwargs: [a]", "gradient_checkpointing_kwargs=['a'] must be a single value"),
        ("seed: 2024-13-45", "is not valid YAML: month must be in 1..12"),
        ("? [a]\n: b", "is not valid YAML"),
    ],
)
def test_what_is_no_file_of_settings(text, message, tmp_path):
    (tmp_path / "dpo.yaml").write_text(text)
    with pytest.raises(DeRaError) as caught:
        read_dpo("--bf16", "false", "--config", str(tmp_path / "dpo.yaml"))
    assert message in str(caught.value)


def test_settings_that_are_declared_elsewhere_are_the_same_here():
    own = {each.name: setting_of(each) for each in fields(PreferenceSampling)}
    assert own == {each.name: setting_of(each) for each in fields(Sampling)}
    source = {each.name: setting_of(each) for each in fields(ModelSource)}
    for kind in (sft.SFTSettings, DPOSettings, PreferenceSettings):
        assert next(setting_of(each) for each in fields(kind) if each.name == "quantization") == source["quantization"]


@pytest.mark.parametrize("program", [sft, dpo, preferences])
def test_help_is_of_the_command(program, capsys):
    with pytest.raises(SystemExit) as caught:
        program.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    name = program.__name__.rpartition(".")[2]
    assert text.startswith(f"usage: dera {name} [--config FILE] [--KEY VALUE ...]\n")
    assert program.__doc__ in text
    assert "a part, as train[:95%]" in text or program is preferences
    assert "--quantization {nf4,fp4,int8}" in text


def test_debug_is_taken_out_where_it_is_not_the_trainers_own():
    assert split_debug(["--debug", "dpo", "--beta", "1"]) == (["dpo", "--beta", "1"], True)
    assert split_debug(["dpo", "--beta", "1", "--debug"]) == (["dpo", "--beta", "1"], True)
    assert split_debug(["dpo", "--debug", "underflow_overflow"]) == (["dpo", "--debug", "underflow_overflow"], False)
