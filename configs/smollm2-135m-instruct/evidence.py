"""
What the runs of this recipe say: keeps their figures in docs/evidence/, and makes docs/evidence.md of them.

    python configs/smollm2-135m-instruct/evidence.py
    python configs/smollm2-135m-instruct/evidence.py --runs nowhere     # of the figures that are kept, without a run

A run that is there replaces what is kept of it. What was never run is "not measured yet" on the page.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from dera_peft.quiet import be_quiet

be_quiet()

from figures import Figures
from page import draw, make_page

from dera_peft.cli.program import run_program
from dera_peft.messages import messages_on_stderr

NOISY = ("0.1", "0.05")  # β of those that were trained on pairs with errors
# what is kept -> its folder in the runs
SWEEPS = {
    "tone": "tone/sweep",
    "length": "length/sweep",
    **{f"tone-beta-{beta}": f"tone/sweep-beta-{beta}" for beta in ("0.05", "0.2", "0.0333")},
    **{f"tone-noisy-{beta}": f"tone/sweep-noisy-{beta}" for beta in NOISY},
    **{f"tone-seed-{seed}": f"tone/sweep-seed-{seed}" for seed in (2, 3, 4)},
    **{f"tone-temperature-{t}": f"tone/sweep-temperature-{t}" for t in ("0.4", "1")},
    "tone-elsewhere": "tone/sweep-elsewhere",
    "tone-again": "tone/sweep-again",
}
TRAININGS = (
    "tone/dpo",
    "length/dpo",
    *(f"tone/beta-{b}" for b in ("0.05", "0.2", "0.0333")),
    *(f"tone/noisy-{b}" for b in NOISY),
    *(f"tone/seed-{s}" for s in (2, 3, 4)),
    "tone/again",
)
PREFERENCES = ("tone/preferences", "length/preferences")
TEXTS = 12  # prompts whose texts are kept: the first held-out one of each topic


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/smollm2-135m-instruct"), metavar="DIR",
        help="where the runs are (default: runs/smollm2-135m-instruct)",
    )  # fmt: skip
    parser.add_argument(
        "--page", type=Path, default=Path("docs/evidence.md"), metavar="FILE",
        help="gets the page; figures and pictures go into a folder of its name beside it (default: docs/evidence.md)",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


def keep_sweep(samples: Path, kept: Path) -> None:
    """Of each answer the figures, and of the first prompts the text, beside what is kept of other arms and λ."""
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else []
    points: dict[tuple[str, float | None], dict[str, list]] = {}
    for row in map(json.loads, samples.read_text(encoding="utf-8").splitlines()):
        point = points.setdefault((row["arm"], row["lambda"]), {})
        figures = {
            "prompt": row["prompt_index"], "sample": row["sample"], "tokens": row["num_tokens"],
            "ended": int(row["finish_reason"] == "eos"), "kl": row["kl"], **row["rewards"],
        }  # fmt: skip
        for name, value in figures.items():
            point.setdefault(name, []).append(round(value, 4) if isinstance(value, float) else value)
        if row["prompt_index"] < TEXTS and row["sample"] == 0:
            text = {"prompt": row["prompt_index"], "asked": row["prompt"][-1]["content"], "answer": row["completion"]}
            point.setdefault("texts", []).append(text)
    found = [{"arm": arm, "lambda": lam, **point} for (arm, lam), point in points.items()]
    found += [point for point in known if (point["arm"], point["lambda"]) not in points]
    lines = [json.dumps(point, ensure_ascii=False) for point in sorted(found, key=lambda p: (p["arm"], p["lambda"]))]
    kept.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def keep_trainings(runs: Path, kept: Path) -> None:
    """Of each training and each set of preferences what its record says, and margins, beside what is kept already."""
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    for name in TRAININGS:
        record = runs / name / "dera.json"
        if record.is_file():
            training = json.loads(record.read_text(encoding="utf-8"))["training"]
            given = json.loads((runs / name / "run.json").read_text(encoding="utf-8"))["settings"]
            known[name] = {
                "beta": training["beta"], "seed": given["seed"], "pairs": training["rows"]["total"],
                "steps": training["steps"], "versions": training["versions"],
                **{
                    key: round(value, 4)
                    for key, value in training["metrics"].items()
                    if key in ("first_loss", "loss", "rewards/accuracies", "rewards/margins", "tokens_per_second")
                },
            }  # fmt: skip
    for name in PREFERENCES:
        file = runs / name / "completions.jsonl"
        if file.is_file() and (runs / name / "preferences.jsonl").is_file():
            rewards = [json.loads(line)["reward"] for line in file.read_text(encoding="utf-8").splitlines()]
            pairs = len((runs / name / "preferences.jsonl").read_text(encoding="utf-8").splitlines())
            known[name] = {
                "answers": len(rewards),
                "pairs": pairs,
                "mean_reward": round(sum(rewards) / len(rewards), 4),
            }
    for beta in NOISY:
        file = runs / "tone" / f"margin-noisy-{beta}.json"
        if file.is_file() and file.stat().st_size:  # it is there while it is made
            known[f"margin/noisy-{beta}"] = json.loads(file.read_text(encoding="utf-8"))["margin"]
    kept.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def keep_times(times: Path, kept: Path) -> None:
    """Of each command of run.sh the minutes that each machine took for it, summed over all its runs there."""
    minutes: dict[str, dict[str, float]] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    lines = [line.split("\t") for line in times.read_text(encoding="utf-8").splitlines()]
    minutes |= {machine: {} for begin, machine in lines if begin == "start"}
    machine, before = "", 0.0
    for spent, what in lines:
        if spent == "start":
            machine, before = what, 0.0
            continue
        now = sum(float(m) + float(s) / 60 for m, s in re.findall(r"(\d+)m([\d.]+)s", spent))
        minutes[machine][what] = round(minutes[machine].get(what, 0.0) + now - before, 2)
        before = now
    kept.write_text(json.dumps(minutes, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    folder = args.page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for name, run in SWEEPS.items():
        samples = args.runs / run / "samples.jsonl"
        if samples.is_file():
            keep_sweep(samples, folder / f"{name}.json")
    keep_trainings(args.runs, folder / "trainings.json")
    if (times := args.runs / "times.tsv").is_file():
        keep_times(times, folder / "times.json")
    figures = Figures(folder)
    draw(figures, folder)
    args.page.write_text(make_page(figures, folder), encoding="utf-8")
    print(f"written: {args.page}, and its pictures in {folder}")


def run() -> None:
    with messages_on_stderr():
        main()


if __name__ == "__main__":
    run_program(run, debug="--debug" in sys.argv)
