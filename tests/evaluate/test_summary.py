"""The statistics of a sweep, on numbers worked out by hand."""

import csv
import math

import pytest

from dera_peft.evaluate.plot import plot_sweep
from dera_peft.evaluate.summary import mean_and_se, summarise, write_csv


def sample(lam, index, reward, kl=0.0, tokens=4, finish="eos") -> dict:
    return {"lambda": lam, "index": index, "reward": reward, "kl": kl, "tokens": tokens, "finish": finish}


# two prompts of two samples each at λ=0.5: prompt means 1 and 3, so mean 2 and standard error sqrt(2)/sqrt(2) = 1
SAMPLES = [
    sample(0.5, 0, 0.0, kl=1.0, tokens=2),
    sample(0.5, 0, 2.0, kl=3.0, tokens=6, finish="length"),
    sample(0.5, 1, 3.0, kl=2.0),
    sample(0.5, 1, 3.0, kl=2.0),
    sample(0.0, 0, -1.0),
]


def test_mean_and_standard_error():
    assert mean_and_se([1.0, 3.0]) == (2.0, 1.0)
    assert mean_and_se([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]) == (5.0, pytest.approx(math.sqrt(32 / 7 / 8)))
    assert math.isnan(mean_and_se([1.0])[1])


def test_standard_errors_are_over_prompts():
    zero, half = summarise(SAMPLES)
    assert (zero.lam, zero.prompts, zero.samples, zero.reward) == (0.0, 1, 1, -1.0)
    assert (half.prompts, half.samples) == (2, 4)
    assert (half.reward, half.reward_se) == (2.0, 1.0)
    assert (half.kl, half.kl_se) == (2.0, 0.0)
    assert half.kl_per_token == 8 / 16
    assert (half.tokens, half.ended) == (4.0, 0.75)


def test_csv_and_picture(tmp_path):
    summaries = summarise(SAMPLES)
    write_csv(summaries, tmp_path / "summary.csv")
    with (tmp_path / "summary.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["lambda"] for row in rows] == ["0.0", "0.5"]
    assert float(rows[1]["reward_se"]) == 1.0
    plot_sweep(summaries, tmp_path / "sweep.png", title="λ")
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["summary.csv", "sweep.png"], "no temporary file is left"
