"""The settings of a sweep, and what it says of its prompts."""

import json

import pytest
import yaml

from dera_peft import DeRaError
from dera_peft.evaluate.sweep import SweepConfig, sweep

REQUIRED = {"prompts": "p.txt", "reward": "r.py:reward", "output_dir": "out"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lambdas", 0.5, "lambdas=0.5 must be a list of finite numbers"),
        ("lambdas", [], r"lambdas=\[\] must be a list of finite numbers"),
        ("lambdas", "0,1", "lambdas='0,1' must be a list of finite numbers"),
        ("lambdas", [float("nan")], r"lambdas=\[nan\] must be a list of finite numbers"),
        ("lambdas", [0, 1e39], r"lambdas=\[0, 1e\+39\] must be a list of finite numbers"),
        ("samples", "4", "samples='4' must be an integer of at least 1"),
        ("samples", None, "samples=None must be an integer of at least 1"),
        ("batch_size", True, "batch_size=True must be an integer of at least 1"),
        ("max_prompts", 0, "max_prompts=0 must be an integer of at least 1, or left out"),
        ("reward", 3, "reward=3 must be a text"),
        ("prompts", None, "prompts=None must be a text"),
        ("base", ["a"], r"base=\['a'\] must be a text, or left out"),
        ("chat", "yes", "chat='yes' must be true or false"),
        ("temperature", "hot", "temperature='hot' must be a finite number"),
        ("seed", -1, "seed=-1 must be from 0"),
    ],
)
def test_a_bad_value_is_told_with_its_key(tmp_path, key, value, message):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**REQUIRED, key: value}))
    with pytest.raises(DeRaError, match=message):
        SweepConfig.read(str(tmp_path / "sweep.yaml"))


def test_lambdas_are_taken_once_in_their_order(tmp_path):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**REQUIRED, "lambdas": [1, 0.5, -0.0, 1.0, 0], "seed": 0}))
    assert str(SweepConfig.read(str(tmp_path / "sweep.yaml")).lambdas) == "(1.0, 0.5, 0.0)"


def test_a_prompts_own_lambda_is_left_aside_and_that_is_said(tiny_base, tiny_adapter, tmp_path, capsys):
    rows = [{"prompt": "Rain fell", "lambda": 2}, {"prompt": "A fox"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.py").write_text("def reward(prompts, completions, **columns): return [0.0] * len(completions)\n")
    config = SweepConfig(
        f"{tmp_path}/p.jsonl", f"{tmp_path}/r.py:reward", f"{tmp_path}/out", str(tiny_base), str(tiny_adapter),
        lambdas=[0, 1], samples=1, max_new_tokens=2,
    )  # fmt: skip
    assert {(row["index"], row["lambda"]) for row in sweep(config).samples} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert "p.jsonl: 1 of 2 prompts have a lambda of their own, which a sweep leaves aside" in capsys.readouterr().err
