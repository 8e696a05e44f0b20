"""
The paper's claim, on your own machine: to decode at λ is to have retrained at β/λ (Liu et al., arXiv 2402.02992).

    python examples/retrain_vs_dera.py
    python examples/retrain_vs_dera.py --lambda 0.5 2 --samples 16

One adapter is trained at β, and one more at β/λ for each λ: what DeRa saves. Held-out prompts are then decoded with
each of those as trained, and with the first one alone at each λ. Reward is drawn against KL for both, and the two are
compared prompt by prompt: they draw the same random numbers, so that their difference is sharper than either. At λ=1
the first adapter is compared with one trained at the same β from another seed: so far two trainings differ anyway.

The claim is exact for optimal policies and whole sequences, where the optimum is the one that the theory speaks of:
π(β) ∝ π_ref·exp(r/β). DPO's is that one if preferences are drawn by Bradley and Terry, σ(r_a - r_b), so they are drawn
like that here, in units in which r is the recipe's reward over `--temperature`. (If the better one of two is always
chosen, DPO has no finite optimum at any β.) Trained adapters are not optimal, and decoding mixes token by token, so how
far the claim holds is a question; the answer is printed.

The recipe's SFT model is made first if it is missing. An interrupted run goes on where it stopped: an adapter, and a
completion, that is there already is reused.
"""

import argparse
import csv
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from dera_peft.quiet import be_quiet

be_quiet()

import numpy
from rich.console import Console
from rich.table import Table

from dera_peft.checkpoint.devices import read_device_map
from dera_peft.cli.program import run_program
from dera_peft.engine.names import LOGITS
from dera_peft.errors import DeRaError
from dera_peft.evaluate import SweepConfig, SweepResult, sweep
from dera_peft.evaluate.analysis.resamples import Estimate, Resamples
from dera_peft.evaluate.analysis.summary import LambdaSummary
from dera_peft.messages import messages_on_stderr
from dera_peft.training import dpo, preferences, sft

LAMBDAS = (0.25, 0.5, 0.75, 1.5, 2.0, 4.0)
AGREE = 2.0  # standard errors of the paired difference
RETRAINED, DERA, NEUTRAL = "#c4572e", "#1b6ca8", "0.45"


@dataclass(frozen=True)
class Comparison:
    """
    One λ: an adapter trained at β/λ, and the first adapter decoded at λ.

    Attributes:
        difference: DeRa's reward minus the retrained adapter's, paired over prompts.
    """

    lam: float
    beta: float
    retrained: LambdaSummary
    dera: LambdaSummary
    difference: Estimate

    @property
    def in_errors(self) -> float:
        """The difference in its standard errors."""
        mean, error = self.difference.mean, self.difference.se
        return mean / error if error else 0.0 if mean == 0 else math.copysign(math.inf, mean)

    @property
    def agrees(self) -> bool:
        return abs(self.in_errors) <= AGREE


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", type=Path, default=Path("configs/tiny"), metavar="DIR",
        help="folder with sft.yaml, preferences.yaml, dpo.yaml and sweep.yaml (default: configs/tiny)",
    )  # fmt: skip
    parser.add_argument(
        "--lambda", dest="lambdas", type=float, nargs="+", default=LAMBDAS, metavar="λ",
        help=f"above 0 (default: {' '.join(f'{lam:g}' for lam in LAMBDAS)})",
    )  # fmt: skip
    parser.add_argument("--beta", type=float, default=1.0, metavar="β", help="of the first adapter (default: 1)")
    parser.add_argument(
        "--temperature", type=float, default=0.5, metavar="T", help="of the preferences (default: 0.5); see above"
    )
    parser.add_argument("--steps", type=int, default=50, help="of each training (default: 50)")
    parser.add_argument("--learning-rate", type=float, default=2.5e-3, help="of each training (default: 2.5e-3)")
    parser.add_argument("--samples", type=int, default=8, help="completions per prompt and λ (default: 8)")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/retrain_vs_dera"), metavar="DIR",
        help="gets the adapters, the completions, table.csv and retrain_vs_dera.png (default: runs/retrain_vs_dera)",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    for name in ("beta", "temperature", "steps", "learning_rate", "samples"):
        if not 0 < getattr(args, name) < math.inf:
            raise DeRaError(f"--{name} {getattr(args, name):g} must be above 0.")
    for lam in args.lambdas:
        if not 0 < lam < math.inf:
            raise DeRaError(f"--lambda {lam:g}: there is no β/λ to retrain at; λ must be above 0.")
    args.lambdas = sorted({1.0, *args.lambdas})
    for program in ("dpo", "preferences", "sft", "sweep"):
        if not (args.recipe / f"{program}.yaml").is_file():
            raise DeRaError(f"--recipe {str(args.recipe)!r} has no {program}.yaml (looked in {Path.cwd()}).")
    return args


def train(args: argparse.Namespace) -> tuple[Path, dict[float, Path]]:
    """The adapter trained at β, and by λ those trained at β/λ."""

    def config(program: str, folder: Path, *settings: object) -> list[str]:
        return ["--config", str(args.recipe / f"{program}.yaml"), "--output_dir", str(folder), *map(str, settings)]

    sft.main(["--config", str(args.recipe / "sft.yaml")])
    print("preferences, drawn by Bradley and Terry:")
    made = args.output_dir / "preferences"
    preferences.main(config("preferences", made, "--pairs", "best_worst", "--label_temperature", args.temperature))

    trainings = [(1.0, args.output_dir / f"beta-{args.beta:g}", 1)]
    trainings += [(lam, args.output_dir / f"retrained-beta-{args.beta / lam:.4g}", 2) for lam in args.lambdas]
    for number, (lam, folder, seed) in enumerate(trainings, start=1):
        print(f"[{number}/{len(trainings)}] training at β = {args.beta / lam:.4g}, seed {seed}: {folder}")
        settings = {
            "dataset_name": made / "preferences.jsonl",
            "beta": args.beta / lam,
            "seed": seed,
            "max_steps": args.steps,
            "learning_rate": args.learning_rate,
            "save_strategy": "steps",
            "save_steps": 10,
        }
        dpo.main(config("dpo", folder, *chain(*((f"--{name}", value) for name, value in settings.items()))))
    return trainings[0][1], {lam: folder for lam, folder, _ in trainings[1:]}


def decode(args: argparse.Namespace, first: Path, retrained: dict[float, Path]) -> SweepResult:
    """The recipe's sweep with the first adapter at every λ, and an arm for each of those that were retrained."""
    config = SweepConfig.read(
        str(args.recipe / "sweep.yaml"),
        adapter=str(first),
        lambdas=[0.0, *args.lambdas],
        arms=[{"adapter": str(folder), "name": arm_name(args.beta, lam)} for lam, folder in retrained.items()],
        samples=args.samples,
        output_dir=str(args.output_dir / "decoded"),
        device_map=read_device_map(None),
    )
    print(
        f"decoding with {first} at λ = {', '.join(f'{lam:g}' for lam in config.lambdas)}, and as trained with those "
        "that were retrained"
    )
    result = sweep(config)
    if result.failed:
        raise DeRaError(f"a reward failed on {result.failed} completions: see {config.output_dir}/samples.jsonl.")
    return result


def arm_name(beta: float, lam: float) -> str:
    return f"retrained at β={beta / lam:.4g}"


def decoded_with_dera(result: SweepResult) -> list[LambdaSummary]:
    """By ascending λ."""
    return [summary for summary in result.summaries if summary.arm == LOGITS]


def reward(summary: LambdaSummary) -> Estimate:
    """Of the recipe's first reward."""
    return next(iter(summary.rewards.values())).level


def by_prompt(rows: Sequence[dict], arm: str, lam: float) -> dict[int, float]:
    """Prompt -> its mean reward in one arm at one λ."""
    rewards = defaultdict(list)
    for row in rows:
        if (row["arm"], row["lambda"]) == (arm, lam):
            rewards[row["prompt_index"]].append(next(iter(row["rewards"].values())))
    return {index: sum(values) / len(values) for index, values in rewards.items()}


def compare(beta: float, lambdas: Sequence[float], result: SweepResult) -> list[Comparison]:
    at = {(summary.arm, summary.lam): summary for summary in result.summaries}
    comparisons = []
    for lam in lambdas:
        arm = arm_name(beta, lam)
        ours, theirs = by_prompt(result.rows, LOGITS, lam), by_prompt(result.rows, arm, 1.0)
        differences = numpy.array([ours[index] - theirs[index] for index in ours])
        difference = Resamples(len(ours)).means({lam: differences})[lam]
        comparisons.append(Comparison(lam, beta / lam, at[arm, 1.0], at[LOGITS, lam], difference))
    return comparisons


COLUMNS = ("λ", "β/λ", "reward: retrained", "DeRa", "difference", "± SE", "in SE", "KL: retrained", "DeRa", "reward")


def rows_of(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    return [
        (
            f"{c.lam:g}", f"{c.beta:.3g}", f"{reward(c.retrained).mean:+.3f}", f"{reward(c.dera).mean:+.3f}",
            f"{c.difference.mean:+.3f}", f"{c.difference.se:.3f}", f"{c.in_errors:+.1f}",
            f"{c.retrained.kl.mean:.2f}", f"{c.dera.kl.mean:.2f}", "agrees" if c.agrees else "differs",
        )
        for c in comparisons
    ]  # fmt: skip


def findings(comparisons: Sequence[Comparison], dera: Sequence[LambdaSummary]) -> list[str]:
    """What the comparison says, as sentences."""
    others = [c for c in comparisons if c.lam != 1]
    (control,) = (c for c in comparisons if c.lam == 1)
    agreeing = [f"{c.lam:g}" for c in others if c.agrees]
    differing = [f"{c.lam:g} ({c.difference.mean:+.3f}, {c.in_errors:+.1f} SE)" for c in others if not c.agrees]
    lines = [
        f"Two trainings at the same β = {control.beta:g} differ in reward by {control.difference.mean:+.3f} "
        f"({control.in_errors:+.1f} SE), in KL by a factor of {_factor(control)}.",
        f"In reward DeRa and retraining agree, within {AGREE:g} standard errors of the paired difference, at "
        f"{len(agreeing)} of {len(others)} λ" + (f": {', '.join(agreeing)}." if agreeing else "."),
    ]
    if differing:
        lines.append(f"They differ at λ = {', '.join(differing)}; above 0 DeRa's is the higher.")
    lines.append(
        "DeRa's KL over that of retraining: " + ", ".join(f"{_factor(c)} at λ={c.lam:g}" for c in others) + "."
    )
    curve = [summary.kl.mean for summary in dera], [reward(summary).mean for summary in dera]
    at_same_kl = [(c.lam, float(numpy.interp(c.retrained.kl.mean, *curve)) - reward(c.retrained).mean) for c in others]
    lines.append(
        "At the KL that retraining came to, DeRa's curve has a reward that is higher by "
        + ", ".join(f"{difference:+.3f} (β/λ of λ={lam:g})" for lam, difference in at_same_kl)
        + "."
    )
    broken = [c for c in others if c.lam > 1 and not c.agrees and c.difference.mean < 0]
    if broken:
        lines.append(f"Beyond λ=1 DeRa's reward falls short of retraining from λ = {broken[0].lam:g} on.")
    best = max(dera, key=lambda summary: reward(summary).mean)
    if best.lam < dera[-1].lam:
        lines.append(
            f"DeRa's reward is highest at λ = {best.lam:g}; further on it falls while KL goes on rising: there the "
            "mixture has left what either model knows."
        )
    return lines


def _factor(c: Comparison) -> str:
    return f"{c.dera.kl.mean / c.retrained.kl.mean:.2f}" if c.retrained.kl.mean else "-"


def draw(comparisons: Sequence[Comparison], dera: Sequence[LambdaSummary], file: Path) -> None:
    """Reward against KL for both, and their paired difference against λ; bars of one standard error over prompts."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files only, also where there is no screen
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9.6, 4.2), layout="constrained", gridspec_kw={"width_ratios": [1.7, 1]}
    )
    for summaries, color, marker, label in (
        (dera, DERA, "o", "DeRa: one adapter, decoded at λ"),
        ([dera[0], *(c.retrained for c in comparisons)], RETRAINED, "s", "retrained at β/λ"),
    ):
        left.errorbar(
            [s.kl.mean for s in summaries], [reward(s).mean for s in summaries], xerr=[s.kl.se for s in summaries],
            yerr=[reward(s).se for s in summaries], color=color, marker=marker, markersize=5, capsize=2.5,
            linewidth=1.6, label=label,
        )  # fmt: skip
    for c in comparisons:
        ours, theirs = (c.dera.kl.mean, reward(c.dera).mean), (c.retrained.kl.mean, reward(c.retrained).mean)
        left.plot(*zip(ours, theirs, strict=True), color="0.8", linewidth=4, zorder=0)
        # a label on the left of the first points would run into the axis
        near_axis = _root(c.dera.kl.mean / dera[-1].kl.mean) < 0.1
        place, side = (
            ((5, -12), "left") if c is comparisons[0] else ((-13, 8), "center") if near_axis else ((-7, 5), "right")
        )
        left.annotate(
            f"λ={c.lam:g}", ours, xytext=place, ha=side, textcoords="offset points", fontsize=8,
            color=DERA,
        )  # fmt: skip
    left.annotate(
        "reference",
        (0, reward(dera[0]).mean),
        xytext=(6, -10),
        textcoords="offset points",
        fontsize=8,
        color=NEUTRAL,
    )
    left.set_xscale("function", functions=(_root, _square))  # a KL grows as the square of what moves it
    left.set_xlim(left=0)
    largest = left.get_xlim()[1]
    ticks = [tick for tick in (0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if largest / 100 < tick < largest]
    left.set_xticks([0, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
    left.set_xlabel("KL to the reference (nats per completion, square-root scale)")
    left.set_ylabel("mean reward")
    left.legend(loc="lower right", frameon=False, fontsize=9)

    right.axhline(0, color="0.75", linewidth=0.9, zorder=0)
    right.errorbar(
        [c.lam for c in comparisons], [c.difference.mean for c in comparisons],
        yerr=[AGREE * c.difference.se for c in comparisons],
        color=NEUTRAL, linestyle="none", capsize=3, linewidth=1.4, zorder=1,
    )  # fmt: skip
    for c in comparisons:
        right.plot(
            c.lam,
            c.difference.mean,
            marker="o",
            markersize=6.5,
            color=NEUTRAL,
            markerfacecolor=NEUTRAL if c.agrees else "white",
        )
    right.set_xscale("log")
    right.set_xticks([c.lam for c in comparisons], [f"{c.lam:g}" for c in comparisons])
    right.xaxis.set_minor_locator(NullLocator())
    right.set_xlabel("λ  (at 1: another seed)")
    right.set_ylabel("reward: DeRa − retrained")
    right.set_title(f"same prompts, ±{AGREE:g} SE; filled: agrees", fontsize=9, color=NEUTRAL)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    summary = dera[0]
    left.set_title(
        f"β = {comparisons[0].beta * comparisons[0].lam:g}; {summary.prompts} held-out prompts, "
        f"{summary.samples // summary.prompts} samples each; bars: 1 SE",
        fontsize=9, color=NEUTRAL,
    )  # fmt: skip
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _root(values):
    return values**0.5


def _square(values):
    return values**2


def main(arguments: Sequence[str] | None = None) -> list[Comparison]:
    args = parse(arguments)
    first, retrained = train(args)
    result = decode(args, first, retrained)
    comparisons, dera = compare(args.beta, args.lambdas, result), decoded_with_dera(result)

    rows = rows_of(comparisons)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in COLUMNS:
        table.add_column(name.replace(": ", ":\n"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print()
    console.print(table)
    console.print()
    for line in findings(comparisons, dera):
        console.print(line, highlight=False)
    with (args.output_dir / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    draw(comparisons, dera, args.output_dir / "retrain_vs_dera.png")
    print(f"written to {args.output_dir}: table.csv, retrain_vs_dera.png")
    return comparisons


def run() -> None:
    with messages_on_stderr():
        main()


if __name__ == "__main__":
    run_program(run, debug="--debug" in sys.argv)
