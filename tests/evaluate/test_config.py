"""The settings of a sweep."""

import pytest
import yaml

from dera_peft import DeRaError
from dera_peft.evaluate import SweepConfig
from dera_peft.evaluate.arm_settings import ArmSettings, parse_arms

REQUIRED = {"prompts": "p.txt", "rewards": ["r.py:reward"], "output_dir": "out"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lambdas": 0.5}, "lambdas=0.5 must be a list of finite numbers"),
        ({"lambdas": []}, r"lambdas=\[\] must be a list of finite numbers"),
        ({"lambdas": "0,1"}, "lambdas='0,1' must be a list of finite numbers"),
        ({"lambdas": [float("nan")]}, r"lambdas=\[nan\] must be a list of finite numbers"),
        ({"lambdas": [0, 1e39]}, r"lambdas=\[0, 1e\+39\] must be a list of finite numbers"),
        ({"samples": "4"}, "samples='4' must be an integer of at least 1"),
        ({"samples": None}, "samples=None must be an integer of at least 1"),
        ({"batch_size": True}, "batch_size=True must be an integer of at least 1"),
        ({"max_prompts": 0}, "max_prompts=0 must be an integer of at least 1, or left out"),
        ({"rewards": [3]}, "rewards: 3 is not one of what it may hold"),
        ({"rewards": ["length", "length"]}, "rewards: 'length' is there twice"),
        ({"prompts": None}, "prompts=None must name a file"),
        ({"base": ["a"]}, r"base=\['a'\] must be a text, or left out"),
        ({"chat": "yes"}, "chat='yes' must be true or false"),
        ({"temperature": "hot"}, "temperature='hot' must be a finite number"),
        ({"seed": -1}, "seed=-1 must be from 0"),
        ({"arms": {"mixing": "weights"}}, r"arms=\{'mixing': 'weights'\} must be a list of arms"),
        ({"arms": ["aad:0.1"]}, r"arms\[0\]: 'aad:0.1' is not an arm, which is keys with values"),
        ({"arms": [{"combin": "aad:0.1"}]}, r"arms\[0\]: 'combin' is not a key of an arm; do you mean 'combine'\?"),
        (
            {"arms": [{"lambdas": [2]}]},
            r"arms\[0\]: it says no way to decode: give one of combine, lambda_schedule, mixing, adapter",
        ),
        ({"arms": [{"mixing": "logits"}]}, r"arms\[0\]: mixing='logits' is not known; choose one of weights"),
        (
            {"arms": [{"combine": "linear"}]},
            r"arms\[0\]: combine='linear' is plain λ, which is always there as the arm 'logits'",
        ),
        ({"arms": [{"particles": 0}]}, r"arms\[0\]: particles=0 must be an integer of at least 1"),
        (
            {"arms": [{"adapter": "a"}, {"particles": 4, "mixing": "weights"}]},
            r"arms\[1\]: mixing and particles exclude each other",
        ),
        (
            {"arms": [{"mixing": "weights", "lambdas": ["x"]}]},
            r"arms\[0\]: lambdas: 'x' is not one of what it may hold",
        ),
        (
            {"arms": [{"mixing": "weights"}, {"mixing": "weights", "lambdas": [2]}]},
            "arms: 'weights' is the name of two arms; give one of them another name",
        ),
        ({"arms": [{"adapter": "a", "name": "logits"}]}, "arms: 'logits' is the name of two arms"),
        ({"rule": "best"}, "rule='best' is not known; choose one of reward, kl_budget"),
        ({"rule": "kl_budget"}, "rule='kl_budget' needs the budget: set kl_budget"),
        ({"kl_budget": 3}, "kl_budget=3 has no effect on rule='reward'"),
        ({"rule": "kl_budget", "kl_budget": -1}, "kl_budget=-1 must be a number of nats, 0 or more"),
        ({"rule": "worst_group"}, "needs the column that tells the groups: set group"),
        ({"reward": "x"}, "'reward' is not a key of a sweep; do you mean 'rewards'?"),
    ],
)
def test_a_bad_value_is_told_with_its_key(tmp_path, values, message):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**REQUIRED, **values}))
    with pytest.raises(DeRaError, match=message):
        SweepConfig.read(str(tmp_path / "sweep.yaml"))


def test_lambdas_are_taken_once_in_their_order_and_one_value_is_a_list(tmp_path):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**REQUIRED, "lambdas": [1, 0.5, -0.0, 1.0, 0], "seed": 0}))
    config = SweepConfig.read(str(tmp_path / "sweep.yaml"), rewards="length")
    assert str(config.lambdas) == "(1.0, 0.5, 0.0)"
    assert (config.rewards, config.arms) == (("length",), ())


def test_another_rule_takes_the_place_of_the_files_rule_with_its_budget(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({**REQUIRED, "rule": "kl_budget", "kl_budget": 3}))
    config = SweepConfig.read(str(file), rule="reward")
    assert (config.rule, config.kl_budget) == ("reward", None)
    assert SweepConfig.read(str(file), rule="kl_budget").kl_budget == 3
    with pytest.raises(DeRaError, match="kl_budget"):
        SweepConfig.read(str(file), rule="reward", kl_budget=2)


def test_arms_on_the_command_line_and_their_names():
    texts = ["combine=plausible:0.1,lambdas=2,3", "mixing=weights", "adapter=runs/a,b,name=β=1", "particles=16"]
    config = SweepConfig(**REQUIRED, arms=parse_arms(texts))
    assert [arm.label for arm in config.arms] == ["plausible:0.1", "weights", "β=1", "16 particles"]
    first, _, third, fourth = config.arms
    assert (first.lambdas, third.adapter, fourth.particles) == ((2.0, 3.0), "runs/a,b", 16)
    assert ArmSettings(adapter="runs/dpo-2", combine="aad:0.1").label == "runs/dpo-2, aad:0.1"
    for text, message in (
        ("weights", "--arm 'weights' is not of the form key=value"),
        ("name=a,name=b", "--arm 'name=a,name=b': 'name' is there twice"),
        ("mixing=weights,lambdas=x", "'x' is not a number"),
        ("particles=many", "particles='many' must be an integer of at least 1"),
    ):
        with pytest.raises(DeRaError, match=message):
            SweepConfig(**REQUIRED, arms=parse_arms([text]))
