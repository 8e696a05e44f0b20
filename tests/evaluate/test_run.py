"""The sweep: what it measures, keeps and refuses, and several processes, on a tiny model."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import PICTURES
from tiny_models import make_adapter
from two_models import load_two

from dera_peft import DeRaError
from dera_peft.checkpoint.record import Record
from dera_peft.decoding import decoder
from dera_peft.evaluate import SweepConfig, scorer, sweep
from dera_peft.evaluate.points import fine_grid
from dera_peft.evaluate.rows import Key
from dera_peft.evaluate.run import _own_indices

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["Rain fell on the market", "A fox crossed", "My sister", "The old lighthouse keeper counted", "Rain", "Bread"]
ROWS = [{"prompt": text, "kind": "ab"[index % 2], "answer": " x"} for index, text in enumerate(TEXTS)]
REWARDS = """
import json, os
def count(prompts, completions, kind, **columns):
    with open(os.environ["ASKED"], "a") as file:
        file.writelines(json.dumps(c) + "\\n" for c in completions)
    return [float(c.count("e")) for c in completions]
def picky(prompts, completions, kind, **columns):
    if os.environ.get("PICKY") and any(p.startswith("Rain") for p in prompts):
        raise KeyError("rain")
    return [0.5] * len(completions)
def judge(prompts, pairs):
    return [0 if len(a) > len(b) else 1 if len(b) > len(a) else -1 for a, b in pairs]
"""


pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def model(tiny_base, tiny_adapter) -> dict:
    return {"base": str(tiny_base), "adapter": str(tiny_adapter)}


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """Rewards, which note what they were asked about."""
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path / "rewards.py"


def asked(file: Path) -> int:
    """How many completions since it was last asked."""
    notes = file.with_name("asked")
    count = len(notes.read_text().splitlines()) if notes.exists() else 0
    notes.unlink(missing_ok=True)
    return count


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def by_key(rows: list[dict]) -> dict[Key, dict]:
    return {Key(row["arm"], row["prompt_index"], row["lambda"], row["sample"]): row for row in rows}


def test_processes_share_the_prompts_by_length():
    tokens = [[0] * length for length in (9, 1, 5, 5, 8, 2)]
    parts = [_own_indices(tokens, rank, 2) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(6))
    assert [sum(len(tokens[index]) for index in part) for part in parts] == [15, 15]
    assert _own_indices(tokens, 0, 1) == list(range(6))


# -- what it measures -------------------------------------------------------------------------------------------------


@torch.no_grad()
def exact(two, prompt: list[int], completion: list[int], lam: float) -> dict[str, float]:
    """KL at λ, and both branches' log-probabilities, in nats, of one sequence by itself."""
    ids = torch.tensor([[*prompt, *completion]])
    z_ref, z_aligned = (model(ids).logits[0, len(prompt) - 1 : -1].double() for model in two)
    log_p = ((1 - lam) * z_ref + lam * z_aligned).log_softmax(-1)
    log_ref, log_aligned = z_ref.log_softmax(-1), z_aligned.log_softmax(-1)
    places = range(len(completion)), completion
    return {
        "kl": (log_p.exp() * (log_p - log_ref)).sum().item(),
        "log_ref": log_ref[places].sum().item(),
        "log_aligned": log_aligned[places].sum().item(),
    }


def test_everything_at_once(model, file, tmp_path, tiny_base, tiny_adapter):
    """Several rewards and arms, a judge and groups; against two whole models, and again without decoding."""
    other = make_adapter(tiny_base, tmp_path / "other", seed=5)
    for folder, beta in ((tiny_adapter, 0.2), (other, 0.4)):
        copy = shutil.copytree(folder, tmp_path / f"beta-{beta}")
        training = {"method": "dpo", "beta": beta, "dataset": "pairs.jsonl"}
        branches = {"reference": [], "aligned": ["default"]}
        Record(str(tiny_base), {"default": str(copy)}, branches, training=training).save(copy)
    config = SweepConfig(
        prompts=ROWS, rewards=[f"{file}:count", "implicit", "perplexity", "length", "exact_match:answer"],
        output_dir=str(tmp_path / "out"), adapter=str(tmp_path / "beta-0.2"),
        arms=[{"mixing": "weights"}, {"adapter": tmp_path / "beta-0.4", "name": "at 0.4"}],
        lambdas=[0, 0.5, 1], samples=2, max_new_tokens=6,
        judge=f"{file}:judge", group="kind",
    )  # fmt: skip
    result = sweep(config)
    assert asked(file) == len(result.rows) == 6 * 2 * (3 + 3 + 1)
    assert list(dict.fromkeys(s.arm for s in result.summaries)) == ["logits", "weights", "at 0.4"]

    rows, two = by_key(result.rows), load_two(tiny_base, tiny_adapter)
    tokens = {key: row["token_ids"] for key, row in by_key(read(tmp_path / "out/parts/completions.0.jsonl")).items()}
    prompts = {index: prompt_tokens(tiny_base, text) for index, text in enumerate(TEXTS)}
    for key, row in rows.items():
        assert row["rewards"]["count"] == row["completion"].count("e")
        assert row["rewards"]["exact_match:answer"] == float(row["completion"].strip() == "x")
        assert row["columns"]["kind"] == ROWS[row["prompt_index"]]["kind"]
        if key.index < 3 and key.arm == "logits":
            found = exact(two, prompts[key.index], tokens[key], key.lam)
            assert row["kl"] == pytest.approx(found["kl"], abs=2e-3)
            implicit = 0.2 * (found["log_aligned"] - found["log_ref"])
            assert row["rewards"]["implicit"] == pytest.approx(implicit, abs=1e-3)
            assert row["rewards"]["perplexity"] == pytest.approx(
                math.exp(-found["log_ref"] / len(tokens[key])), rel=1e-3
            )
        at_0 = rows[Key("logits", key.index, 0.0, key.sample)]["completion"]
        sign = (len(row["completion"]) > len(at_0)) - (len(row["completion"]) < len(at_0))
        if key[0] != "logits" or key.lam != 0:
            assert row["judged"]["0"] == sign
    assert any(row["completion"] != rows[Key("weights", *key[1:])]["completion"] for key, row in rows.items()
               if key.arm == "logits" and key.lam == 0.5), "the two ways of mixing differ"  # fmt: skip
    for key, row in rows.items():
        if key.arm == "weights" and key.lam in (0, 1):
            assert row["completion"] == rows[Key("logits", *key[1:])]["completion"], "at the ends they are the same"
    assert rows[Key("at 0.4", 0, 1.0, 0)]["rewards"]["implicit"] is None

    half = next(s for s in result.summaries if (s.arm, s.lam) == ("logits", 0.5))
    assert set(half.rewards["count"].groups) == {"a", "b"}
    assert set(half.judged) == {0.0, 1.0}
    assert result.recommendation.reward == "count"
    own = [row for row in result.rows if row["arm"] == "logits"]
    assert all(len(row["log_p"]) == len(fine_grid(config.lambdas)) for row in own)
    assert result.curve.reason is None
    assert all(len(row["token_views"]) == row["num_tokens"] for row in own)
    saved = read(tmp_path / "out" / "samples.jsonl")
    assert [{name: row[name] for name in saved_row} for row, saved_row in zip(result.rows, saved, strict=True)] == saved
    assert not {"log_p", "token_views"} & saved[0].keys()

    again = sweep(config)
    assert (again.reused, asked(file)) == (len(result.rows), 0)
    assert read(tmp_path / "out" / "samples.jsonl") == saved


def prompt_tokens(base, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)(text)["input_ids"]


def test_greedy_and_at_a_temperature(model, tmp_path, tiny_base, tiny_adapter):
    """Without a temperature there is no curve; at another than 1, KL and implicit reward are still of the models'."""
    common = {"prompts": TEXTS[:2], "rewards": ["perplexity", "length"][::-1], "lambdas": [0, 0.5, 1], "samples": 1,
              "max_new_tokens": 5, **model}  # fmt: skip
    greedy = sweep(**common, temperature=0, output_dir=str(tmp_path / "greedy"))
    assert "greedy decoding" in greedy.curve.reason
    assert "log_p" not in greedy.rows[0]
    off = sweep(**common, temperature=0.7, curve=False, output_dir=str(tmp_path / "off"))
    assert "curve is off" in off.curve.reason
    assert "log_p" not in read(tmp_path / "off" / "parts" / "scores.0.jsonl")[0]
    warm = sweep(**common, temperature=0.7, output_dir=str(tmp_path / "warm"))
    assert warm.curve.reason is None
    two = load_two(tiny_base, tiny_adapter)
    for result, name in ((greedy, "greedy"), (warm, "warm"), (off, "off")):
        tokens = by_key(read(tmp_path / name / "parts" / "completions.0.jsonl"))
        for key, row in by_key(result.rows).items():
            ids = tokens[key]["token_ids"]
            found = exact(two, prompt_tokens(tiny_base, TEXTS[key.index]), ids, key.lam)
            assert row["kl"] == pytest.approx(found["kl"], abs=2e-3)
            assert row["rewards"]["perplexity"] == pytest.approx(math.exp(-found["log_ref"] / len(ids)), rel=1e-3)


# -- what it keeps ----------------------------------------------------------------------------------------------------


def test_what_is_added_or_changed_is_made_and_nothing_else(model, file, tmp_path, monkeypatch):
    def run(**changes):
        return sweep(
            SweepConfig(**{
                "prompts": ROWS, "rewards": [f"{file}:count"], "output_dir": str(tmp_path / "out"), "lambdas": [0, 1],
                "samples": 1, "max_new_tokens": 4, **model, **changes,
            })
        )  # fmt: skip

    first = run()
    texts = {key: row["completion"] for key, row in by_key(first.rows).items()}
    assert (asked(file), first.reused) == (12, 0)
    more = run(lambdas=[0, 0.5, 1], samples=2)
    assert (asked(file), more.reused) == (24, 12)
    assert texts.items() <= {key: row["completion"] for key, row in by_key(more.rows).items()}.items()

    monkeypatch.setattr(decoder, "decode", None)  # from here on nothing may be decoded
    monkeypatch.setattr(scorer, "score_each", None)
    run(prompts=[{**row, "kind": "c"} if row["prompt"] == "Rain" else row for row in ROWS])
    assert asked(file) == 2, "of the prompt whose column has changed"
    monkeypatch.setitem(sys.modules, "x", None)
    for name in [name for name in sys.modules if name.startswith("dera_user_rewards")]:
        monkeypatch.delitem(sys.modules, name)
    file.write_text(REWARDS.replace('count("e")', 'count("a")'))
    # as if another process, of a sweep that was split otherwise, had found the old ones
    (tmp_path / "out" / "parts" / "rewards.0.jsonl").rename(tmp_path / "out" / "parts" / "rewards.1.jsonl")
    changed = run()
    assert asked(file) == 12
    assert all(row["rewards"]["count"] == row["completion"].count("a") for row in changed.rows)
    run(rewards=["length", f"{file}:count"])
    assert asked(file) == 0

    with pytest.raises(DeRaError, match="holds the completions of other settings"):
        run(seed=7)
    with pytest.raises(DeRaError, match="holds the completions of other prompts: "):
        run(prompts=ROWS[::-1])


def test_a_reward_that_fails_on_some_rows_is_tried_again(model, file, tmp_path, monkeypatch):
    def run():
        return sweep(
            prompts=ROWS, rewards=[f"{file}:picky", f"{file}:count"], output_dir=str(tmp_path / "out"), lambdas=[0, 1],
            samples=1, max_new_tokens=4, **model,
        )  # fmt: skip

    monkeypatch.setenv("PICKY", "1")
    result = run()
    rain = [row for row in result.rows if row["prompt"].startswith("Rain")]
    assert result.failed == len(rain) == 4
    for row in result.rows:
        assert row["rewards"]["picky"] == (None if row in rain else 0.5)
        assert row.get("errors") == ({"picky": "the reward 'picky' raised KeyError: 'rain'"} if row in rain else None)
    assert [s.rewards["picky"].failed for s in result.summaries] == [2, 2]
    monkeypatch.delenv("PICKY")
    asked(file)
    mended = run()
    assert (mended.failed, mended.reused, asked(file)) == (0, 12, 0)
    assert all(row["rewards"]["picky"] == 0.5 for row in mended.rows)


def test_where_the_first_reward_fails_everywhere_the_rest_is_still_shown(model, tmp_path):
    def never(prompts, completions, **columns):
        raise RuntimeError("down")

    result = sweep(
        prompts=TEXTS[:2], rewards=[never, "length"], output_dir=str(tmp_path), lambdas=[0, 1], samples=1,
        max_new_tokens=3, **model,
    )  # fmt: skip
    assert result.recommendation is None
    assert result.no_recommendation == "the reward 'never' has no value at any λ."
    assert result.failed == 4
    assert {"samples.jsonl", "summary.csv"} < {path.name for path in tmp_path.iterdir()}
    with pytest.raises(DeRaError, match="the reward 'never' failed on each of the first 20 rows"):
        sweep(
            prompts=TEXTS[:1], rewards=[never], output_dir=str(tmp_path / "more"), lambdas=[0, 1], samples=10,
            max_new_tokens=1, **model,
        )  # fmt: skip
    assert len((tmp_path / "more" / "parts" / "completions.0.jsonl").read_text().splitlines()) == 20


# -- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": None}, "output_dir is missing"),
        ({"rewards": []}, "rewards is missing"),
        ({"rewards": ["perplexity"]}, "a high perplexity is no merit; put another one first"),
        ({"rewards": ["length", "implicit"]}, "'implicit' needs the β of the training"),
        ({"judge": "{judge}", "lambdas": [0.5]}, "compares with λ=0 and λ=1, and lambdas has none of them"),
        ({"rewards": ["exact_match:solution"]}, "no prompt has a column 'solution'"),
        (
            {"prompts": [{"prompt": "Rain", "kind": None}], "group": "kind"},
            "prompts, prompt 1: its 'kind', which tells its group, is null",
        ),
        ({"group": "topic"}, r"prompts, prompt 1: has no 'topic' to tell its group by; it has \['answer', 'kind'\]"),
        ({"arms": "{other}"}, "stands over another reference than the sweep's adapter"),
        (
            {"adapter": "{both}", "base": None, "lambdas": [0, 1]},
            r"λ=0 is one number, and the model has several .*\['a', 'b'\]",
        ),
        ({"prompts": "./nowhere.csv"}, "there is no such file"),
        ({"prompts": "nowhere.py:prompts"}, "there is no file 'nowhere.py'"),
    ],
)
def test_bad_input_is_told_before_a_model_is_loaded(
    model, tiny_base, tiny_adapter, top_adapter, sft_adapter, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr("dera_peft.model.DeRaModel.from_source", None)
    branches = {"reference": ["sft"], "aligned": ["sft", "default"]}
    adapters = {"sft": str(sft_adapter), "default": str(top_adapter)}
    Record(str(tiny_base), adapters, branches).save(tmp_path / "other")
    branches = {"reference": [], "a": ["a"], "b": ["b"]}
    Record(str(tiny_base), {"a": str(tiny_adapter), "b": str(top_adapter)}, branches, {"a": 0.5, "b": 0.5}).save(
        tmp_path / "both"
    )
    values = {"prompts": ROWS, "rewards": ["length"], "output_dir": str(tmp_path / "out"), **model}
    (tmp_path / "judge.py").write_text("def judge(prompts, pairs): pass\n")
    places = {"{judge}": f"{tmp_path}/judge.py:judge"} | {
        "{other}": [{"adapter": str(tmp_path / "other")}],
        "{both}": str(tmp_path / "both"),
    }
    for name, value in changes.items():
        values[name] = places.get(value, value) if isinstance(value, str) else value
    with pytest.raises(DeRaError, match=message):
        sweep(**values)


def test_a_prompts_own_lambda_is_left_aside_and_that_is_said(model, tmp_path, caplog):
    rows = [{"prompt": "Rain fell", "lambda": 2}, {"prompt": "A fox"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = sweep(
        prompts=f"{tmp_path}/p.jsonl", rewards="length", output_dir=f"{tmp_path}/out", lambdas=[0, 1], samples=1,
        max_new_tokens=2, **model,
    )  # fmt: skip
    assert {(row["prompt_index"], row["lambda"]) for row in result.rows} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert "p.jsonl: 1 of 2 prompts have a lambda of their own, which a sweep leaves aside" in caplog.text


# -- processes --------------------------------------------------------------------------------------------------------


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from dera_peft.evaluate import results, sweep
for name in {pictures!r}:
    setattr(results, name, lambda *arguments, **keywords: None)
result = sweep(**{settings!r}, output_dir={folder!r})
if result is not None:
    print("found", len(result.rows), "rows")
"""


def test_two_processes_find_what_one_does_and_a_killed_sweep_goes_on(model, file, tmp_path):
    """A sweep of two processes, of which one file is lost in the middle, goes on with one; against one by itself."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {
        "prompts": f"{tmp_path}/prompts.jsonl", "rewards": [f"{file}:count", "perplexity"], "lambdas": [0, 0.5, 1],
        "samples": 2, "max_new_tokens": 6, "judge": f"{file}:judge", **model,
    }  # fmt: skip
    script = tmp_path / "program.py"
    script.write_text(
        PROGRAM.format(root=str(ROOT), pictures=PICTURES, settings=settings, folder=str(tmp_path / "two"))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "found 36 rows\n", "the first process alone tells"
    parts = tmp_path / "two" / "parts"
    shares = [len(read(parts / f"completions.{rank}.jsonl")) for rank in range(2)]
    assert sum(shares) == 6 * 3 * 2
    assert min(shares) >= 12

    one = sweep(**settings, output_dir=str(tmp_path / "one"))
    two = read(tmp_path / "two" / "samples.jsonl")
    compare(by_key(one.rows), by_key(two))

    file_of_the_second = parts / "completions.1.jsonl"
    lines = file_of_the_second.read_text().splitlines(keepends=True)
    file_of_the_second.write_text("".join(lines[:3]) + lines[3][:30])  # as a kill leaves it
    (parts / "scores.1.jsonl").unlink()
    going_on = sweep(**settings, output_dir=str(tmp_path / "two"))
    assert going_on.reused == shares[0] + 3
    compare(by_key(one.rows), by_key(going_on.rows))


def compare(expected: dict[Key, dict], found: dict[Key, dict]) -> None:
    assert expected.keys() == found.keys()
    for key, row in expected.items():
        assert found[key]["completion"] == row["completion"]
        assert found[key]["kl"] == pytest.approx(row["kl"], abs=1e-3)
        assert found[key]["rewards"] == pytest.approx(row["rewards"], rel=1e-3)
        assert found[key]["judged"] == row["judged"]
