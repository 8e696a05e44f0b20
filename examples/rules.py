"""
Which rule at a token is best? Reward against KL for each of them, and at equal KL who wins, with intervals.

    python examples/rules.py
    python examples/rules.py --samples 8 --page other.md

The demo's adapter (`make demo`) decodes its held-out prompts with every rule of `combine`, with its weights scaled, and
by sequential Monte Carlo, in one sweep. A rule is compared with plain λ at the KL that the rule came to: plain λ's
reward there is read off the line through its own points, over the square root of the KL, in each bootstrap resample of
the prompts. So the interval of the difference is paired over prompts, and knows that the KL is estimated too.

Some of it is made once more with greedy decoding, and with a second adapter, which is trained from the recipe at
another β and from another seed. An interrupted run goes on where it stopped.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain
from pathlib import Path

from dera_peft.quiet import be_quiet

be_quiet()

import numpy

from dera_peft.checkpoint.devices import read_device_map
from dera_peft.cli.program import run_program
from dera_peft.engine.names import LOGITS
from dera_peft.errors import DeRaError
from dera_peft.evaluate import SweepConfig, SweepResult, sweep
from dera_peft.evaluate.analysis.resamples import INTERVAL, Estimate
from dera_peft.evaluate.analysis.summary import LambdaSummary
from dera_peft.messages import messages_on_stderr
from dera_peft.progress import show_progress
from dera_peft.training import dpo
from dera_peft.versions import package_versions

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
CEILING = 4.0  # of the λ that kl and kl_total may choose
# family -> its arms; each adds points to one curve
FAMILIES: dict[str, list[dict]] = {
    "plausible": [{"combine": "plausible:0.1", "lambdas": [0.5, 1.0, 2.0, 3.0, 4.0]}],
    "aad": [{"combine": f"aad:{alpha}"} for alpha in (0.05, 0.1, 0.3)],
    "kl": [{"combine": f"kl:{bound}", "lambdas": [CEILING]} for bound in (0.02, 0.05, 0.1, 0.2, 0.4)],
    "kl_total": [{"combine": f"kl_total:{budget}", "lambdas": [CEILING]} for budget in (0.5, 1, 2, 4, 8)],
    "jsd": [{"combine": "jsd", "lambdas": [1.0, 2.0, 4.0, 8.0, 16.0]}],
    "weights": [{"mixing": "weights", "lambdas": [0.5, 1.5, 2.0, 3.0]}],
    "exact": [{"particles": 16, "lambdas": [0.5, 1.5, 2.0]}],
}
FEW = ("plausible", "aad")  # of greedy decoding, and of the second adapter
MEASURES = ("perplexity", "repetition", "distinct-2")
BROKEN = 1.5  # times the perplexity at λ=1, and above: the text is no longer the reference's language
COLORS = {
    "linear": "#1b6ca8", "plausible": "#c4572e", "aad": "#8c3b8f", "kl": "#3f8f4f", "kl_total": "#8fb339",
    "jsd": "#c79a1b", "weights": "0.45", "exact": "#000000",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """
    One way to decode, measured.

    Attributes:
        family: the curve that it is on.
        label: the rule and its λ.
        difference: its reward minus plain λ's at the same KL; None for plain λ itself, and where no plain λ has so
            much.
        distinct: the share of a prompt's samples that differ from its others, mean over prompts.
    """

    family: str
    label: str
    summary: LambdaSummary
    distinct: float
    difference: Estimate | None

    @property
    def reward(self) -> Estimate:
        return next(iter(self.summary.rewards.values())).level

    def measure(self, name: str) -> float:
        return self.summary.rewards[name].level.mean

    @property
    def verdict(self) -> str:
        if self.difference is None:
            return "beyond plain λ" if self.family != "linear" else ""
        if not self.difference.excludes_zero:
            return "not told apart"
        return "higher" if self.difference.mean > 0 else "lower"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", type=Path, default=Path("configs/tiny"), metavar="DIR",
        help="folder with dpo.yaml and sweep.yaml (default: configs/tiny)",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=3, help="completions per prompt and point (default: 3)")
    parser.add_argument("--max-prompts", type=int, metavar="N", help="use the first so many (default: all)")
    parser.add_argument("--beta", type=float, default=0.3, metavar="β", help="of the second adapter (default: 0.3)")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/rules"), metavar="DIR",
        help="gets the second adapter and the completions (default: runs/rules)",
    )  # fmt: skip
    parser.add_argument(
        "--page", type=Path, default=Path("docs/rules.md"), metavar="FILE",
        help="gets the page, and its pictures beside it (default: docs/rules.md)",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    for program in ("dpo", "sweep"):
        if not (args.recipe / f"{program}.yaml").is_file():
            raise DeRaError(f"--recipe {str(args.recipe)!r} has no {program}.yaml (looked in {Path.cwd()}).")
    return args


def train(args: argparse.Namespace) -> Path:
    """The second adapter, from the recipe's preferences."""
    folder = args.output_dir / f"beta-{args.beta:g}"
    settings = {"output_dir": folder, "beta": args.beta, "seed": 2}
    given = chain.from_iterable((f"--{name}", str(value)) for name, value in settings.items())
    dpo.main(["--config", str(args.recipe / "dpo.yaml"), *given])
    return folder


def decode(args: argparse.Namespace, families: Sequence[str], folder: Path, **changed) -> SweepResult:
    """The recipe's sweep with an arm for each rule, and with what is changed."""
    config = SweepConfig.read(str(args.recipe / "sweep.yaml"))
    result = sweep(
        config,
        lambdas=LAMBDAS,
        arms=list(chain.from_iterable(FAMILIES[family] for family in families)),
        rewards=(config.rewards[0], *MEASURES),
        max_prompts=args.max_prompts,
        output_dir=str(folder),
        device_map=read_device_map(None),
        progress=show_progress,
        **{"samples": args.samples, **changed},
    )
    assert result is not None  # of one process
    if result.failed:
        raise DeRaError(f"a reward failed on {result.failed} completions: see {folder}/samples.jsonl.")
    return result


def read_points(result: SweepResult) -> list[Point]:
    """By family, each in the order of its KL."""
    linear = sorted((s for s in result.summaries if s.arm == LOGITS), key=lambda s: s.kl.mean)
    points = [Point("linear", _label(s), s, distinct_share(result.rows, s), None) for s in linear]
    for family in FAMILIES:
        found = [s for s in result.summaries if family_of(s.arm) == family]
        for summary in sorted(found, key=lambda s: s.kl.mean):
            difference = at_equal_kl(summary, linear)
            points.append(Point(family, _label(summary), summary, distinct_share(result.rows, summary), difference))
    return points


def family_of(arm: str) -> str:
    if arm == LOGITS:
        return "linear"
    return "exact" if arm.endswith("particles") else arm.partition(":")[0]


def _label(summary: LambdaSummary) -> str:
    lam = "" if summary.lam is None else f"λ={summary.lam:g}"
    arm = "" if summary.arm == LOGITS else summary.arm
    is_ceiling = family_of(summary.arm) in ("kl", "kl_total")
    return f"{arm}, {lam.replace('=', '≤') if is_ceiling else lam}".strip(", ")


def at_equal_kl(summary: LambdaSummary, linear: Sequence[LambdaSummary]) -> Estimate | None:
    """
    The reward of one way to decode minus plain λ's at the same KL; None where no plain λ has so much.

    Both are known in each bootstrap resample of the prompts: there plain λ's reward is interpolated over √KL.
    """
    if not linear[0].kl.mean <= summary.kl.mean <= linear[-1].kl.mean:
        return None
    reward, rewards = _reward(summary), [_reward(s) for s in linear]
    draws = [e.draws for e in (reward, summary.kl, *rewards, *(s.kl for s in linear))]
    assert all(values is not None for values in draws)  # of a sweep's estimates
    table = numpy.stack([values for values in draws if values is not None])  # [2 + 2·L, 1000]
    count = len(linear)

    def difference(column: numpy.ndarray) -> float:
        ours, kl, theirs, at = column[0], column[1], column[2 : 2 + count], column[2 + count :]
        order = numpy.argsort(at)
        kl, at = numpy.maximum(kl, 0), numpy.maximum(at, 0)  # an estimate of the exact mixture's can be below 0
        return float(ours - numpy.interp(_root(kl), _root(at[order]), theirs[order]))

    means = numpy.array([reward.mean, summary.kl.mean, *(r.mean for r in rewards), *(s.kl.mean for s in linear)])
    drawn = numpy.array([difference(column) for column in table.T])
    low, high = numpy.percentile(drawn, INTERVAL)
    return Estimate(difference(means), float(drawn.std(ddof=1)), float(low), float(high), drawn)


def _reward(summary: LambdaSummary) -> Estimate:
    return next(iter(summary.rewards.values())).level


def distinct_share(rows: Sequence[dict], summary: LambdaSummary) -> float:
    """How many of a prompt's samples are different texts, over their number; mean over prompts."""
    texts: dict[int, list[str]] = {}
    for row in rows:
        if (row["arm"], row["lambda"]) == (summary.arm, summary.lam):
            texts.setdefault(row["prompt_index"], []).append(row["completion"])
    return sum(len(set(each)) / len(each) for each in texts.values()) / len(texts)


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats in both reward and KL, by ascending KL."""
    best, found = -math.inf, []
    for point in sorted(points, key=lambda p: (p.summary.kl.mean, -p.reward.mean)):
        if point.reward.mean > best:
            best = point.reward.mean
            found.append(point)
    return found


# -- the page ----------------------------------------------------------------------------------------------------------


def table(points: Sequence[Point]) -> list[str]:
    lines = [
        "| | reward (95 %) | KL, nats | minus plain λ at equal KL (95 %) | | perplexity | repetition | distinct-2 | "
        "different samples |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for point in points:
        difference = "" if point.difference is None else _interval(point.difference)
        lines.append(
            f"| {point.label} | {_interval(point.reward)} | {point.summary.kl.mean:.2f} | {difference} | "
            f"{point.verdict} | {point.measure('perplexity'):.2f} | {point.measure('repetition'):.3f} | "
            f"{point.measure('distinct-2'):.3f} | {point.distinct:.2f} |"
        )
    return lines


def _interval(estimate: Estimate) -> str:
    return f"{estimate.mean:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"


def findings(points: Sequence[Point]) -> list[str]:
    """What the figures say, as sentences."""
    lines = []
    for family in dict.fromkeys(p.family for p in points if p.family != "linear"):
        own = [p for p in points if p.family == family]
        compared = [p for p in own if p.difference is not None]
        parts = []
        for verdict, words in (("higher", "higher"), ("lower", "lower"), ("not told apart", "not told apart")):
            if found := [p.label for p in compared if p.verdict == verdict]:
                parts.append(f"{words} at {len(found)} of {len(compared)} points ({'; '.join(found)})")
        beyond = [p.label for p in own if p.difference is None]
        if beyond:
            parts.append(f"with more KL than any plain λ here: {'; '.join(beyond)}")
        lines.append(f"**{family}**: {', '.join(parts)}.")
    plain = next(p for p in points if p.family == "linear" and p.summary.lam == 1)
    limit = BROKEN * plain.measure("perplexity")
    for family in dict.fromkeys(p.family for p in points):
        own = [p for p in points if p.family == family]
        broken = [p for p in own if p.measure("perplexity") > limit]
        said = f"from {broken[0].label} on" if broken else "at no point"
        lines.append(
            f"{family}: perplexity under the reference passes {BROKEN:g} times that of λ=1 "
            f"({limit:.2f}) {said}; the highest is {max(p.measure('perplexity') for p in own):.2f}, the highest "
            f"repetition {max(p.measure('repetition') for p in own):.3f}."
        )
    return lines


def draw(points: Sequence[Point], file: Path, title: str) -> None:
    """Reward against KL, and perplexity against KL, a curve for each family; bars are 95 % over prompts."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files only, also where there is no screen
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.4, 4.6), layout="constrained")
    for family in dict.fromkeys(p.family for p in points):
        own = [p for p in points if p.family == family]
        kl, color = [p.summary.kl.mean for p in own], COLORS[family]
        style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1.5, "label": family}
        bars = [
            [p.reward.mean - p.reward.low for p in own],
            [p.reward.high - p.reward.mean for p in own],
        ]
        left.errorbar(kl, [p.reward.mean for p in own], yerr=bars, capsize=2, elinewidth=0.8, **style)
        right.plot(kl, [p.measure("perplexity") for p in own], **style)
    for panel in (left, right):
        panel.set_xscale("function", functions=(_root, _square))
        panel.set_xlim(left=0)
        ticks = [tick for tick in (0.1, 0.5, 1, 2, 5, 10, 20, 50, 100) if tick < panel.get_xlim()[1]]
        panel.set_xticks([0, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
        panel.set_xlabel("KL to the reference (nats per completion, square-root scale)")
        panel.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("mean reward")
    left.set_title(title, fontsize=9, color="0.45")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    right.set_ylabel("perplexity under the reference")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _root(values):
    return values**0.5


def _square(values):
    return values**2


def section(points: Sequence[Point], heading: str, picture: Path, about: str) -> list[str]:
    best = "; ".join(f"{p.label} ({p.reward.mean:+.3f} at {p.summary.kl.mean:.2f} nats)" for p in front(points))
    return [
        f"## {heading}", "", about, "", f"![Reward and perplexity against KL, a curve for each rule]({picture.name})",
        "", *table(points), "", *(f"- {line}" for line in findings(points)),
        f"- The Pareto front (no other point has more reward at less KL): {best}.", "",
    ]  # fmt: skip


INTRODUCTION = """\
# Rules at a token, compared

Made by `python examples/rules.py` after `make demo`. What each rule computes is in [the guide](guides/decode.md).

"Minus plain λ at equal KL" is the reward of a row minus the reward that plain λ has at the same KL, read off the line
through plain λ's own points over √KL, in each of 1,000 bootstrap resamples of the prompts: "higher" and "lower" are
said where its 95 % interval leaves out 0. They are many comparisons; of twenty without any difference one is expected
to be told apart. Reward is the demo's; perplexity is under the reference, per token, mean over completions; repetition
is the share of 4-grams that a completion repeats; distinct-2 the share of its 2-grams that are different; different
samples the share of a prompt's samples that are different texts.
"""


def main(arguments: Sequence[str] | None = None) -> list[list[Point]]:
    args = parse(arguments)
    second = train(args)
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    lines, made = [INTRODUCTION, f"{date.today().isoformat()}; {versions}.\n"], []
    runs: tuple[tuple[str, str, Sequence[str], dict], ...] = (
        ("The demo's adapter", "demo", tuple(FAMILIES), {}),
        ("The demo's adapter, greedy", "greedy", FEW, {"temperature": 0.0, "samples": 1}),
        (f"A second adapter, β = {args.beta:g}, another seed", "second", FEW, {"adapter": str(second)}),
    )
    for heading, name, families, changed in runs:
        points = read_points(decode(args, families, args.output_dir / name, **changed))
        picture = args.page.with_name(f"{args.page.stem}_{name}.png")
        first = points[0].summary
        each = first.samples // first.prompts
        about = f"{first.prompts} held-out prompts, {each} sample{'s' if each > 1 else ''} each"
        draw(points, picture, f"{about}; bars: 95 % over prompts")
        lines += section(points, heading, picture, f"{about}.")
        made.append(points)
    args.page.write_text("\n".join(lines), encoding="utf-8")
    print(f"written to {args.page}")
    return made


def run() -> None:
    with messages_on_stderr():
        main()


if __name__ == "__main__":
    run_program(run, debug="--debug" in sys.argv)
