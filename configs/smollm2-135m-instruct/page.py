"""docs/evidence.md, of the figures that are kept."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from figures import NOT_YET, Figures, difference, interval, level, mean, spread, verdict
from pictures import draw_curves, draw_retrained
from prose import (
    CURVE,
    ELSEWHERE,
    EQUAL,
    INTRODUCTION,
    OTHERS,
    PROXY_AND_GOLD,
    RETRAINING,
    SIDE_BY_SIDE,
    TEMPERATURE,
    TOO_SHORT,
    TRAININGS,
    WISHED,
)

from dera_peft.engine.names import LOGITS
from dera_peft.evaluate.analysis.resamples import Estimate
from dera_peft.evaluate.analysis.summary import LambdaSummary


class Retrained(NamedTuple):
    """
    A λ of one adapter, and an adapter that was trained at β/λ.

    Attributes:
        sweep: of the one.
        other: the sweep of the other, of which λ=1 is meant.
        beta: β/λ, as the page has it.
    """

    lam: float
    sweep: str
    other: str
    beta: str

    def of(self, figures: Figures) -> tuple[LambdaSummary | None, LambdaSummary | None]:
        return figures.get(self.sweep, self.lam), figures.get(self.other, 1)


PROXY, GOLD, SECOND, LENGTH = "tone", "relevance", "second_tone", "wished_length"
LAMBDAS = (-1, 0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8)
SEEDS = (1, 2, 3, 4)
RANKED = [
    Retrained(0.5, "tone", "tone-beta-0.2", "0.2"),
    *(Retrained(1, "tone", f"tone-seed-{seed}", f"0.1, seed {seed}") for seed in SEEDS[1:]),
    Retrained(2, "tone", "tone-beta-0.05", "0.05"),
    Retrained(3, "tone", "tone-beta-0.0333", "0.033"),
]
WITH_ERRORS = [  # of the pairs
    Retrained(0.5, "tone-noisy-0.05", "tone-noisy-0.1", "0.1, of β = 0.05"),
    Retrained(2, "tone-noisy-0.1", "tone-noisy-0.05", "0.05, of β = 0.1"),
]
NOISY = {"tone-noisy-0.05": "0.05", "tone-noisy-0.1": "0.1"}  # sweep -> β of those trained on pairs with errors
WAYS = [("weights", (0.5, 2, 3, 4), "scaled adapter"), ("plausible:0.1", (1, 2, 4, 8), "plausible:0.1")]
BROKEN = 1.5  # times the perplexity at λ=0, and above: the text is no longer the reference's language
OF_TEXT = ("tokens", "tone", "second_tone", "repetition", "distinct-2")  # what two answers share that are the same
TEXTS = [(0, LOGITS), (1, LOGITS), (2, LOGITS), (4, LOGITS), (8, LOGITS), (8, "plausible:0.1")]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(figures: Figures, folder: Path) -> None:
    draw_curves(figures, PROXY, GOLD, folder / "curve.png")
    panels = {
        "pairs as ranked": (
            {"tone": "DeRa, one adapter"},
            {each.other: f"retrained, β = {each.beta}" for each in RANKED},
        ),
        "pairs with errors": ({sweep: f"DeRa, trained at β = {beta}" for sweep, beta in NOISY.items()}, {}),
    }
    draw_retrained(figures, PROXY, panels, folder / "retrained.png")


def make_page(figures: Figures, folder: Path) -> str:
    """The page's text; it stands beside `folder`, where its pictures are."""
    parts = [
        INTRODUCTION.format(**_facts(figures)),
        "## The curve over λ", CURVE, *picture(folder, "curve.png", "Tone and relevance over λ; tone against KL"),
        curve(figures, "tone", (PROXY, GOLD, SECOND), LAMBDAS),
        "## Proxy against gold", PROXY_AND_GOLD, parting(figures),
        "## The same strength, retrained", RETRAINING,
        *picture(folder, "retrained.png", "Tone against KL: DeRa, and retrained adapters"),
        retraining(figures, RANKED), TOO_SHORT.format(**_reached(figures)), retraining(figures, WITH_ERRORS),
        "## Other ways to the same λ", OTHERS, other_ways(figures),
        "## Temperature", TEMPERATURE, temperatures(figures),
        "## At equal length", EQUAL, at_equal_length(figures),
        "## A wished length", WISHED, curve(figures, "length", (LENGTH, GOLD), (0, 0.5, 1, 1.5, 2, 4, 8)),
        "## Four trainings", TRAININGS, four_trainings(figures),
        "## On another machine", ELSEWHERE, elsewhere(figures),
        "## Texts", SIDE_BY_SIDE, texts(figures),
        "## What holds, and what fails", "\n".join(f"- {line}" for line in conclusions(figures)),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def picture(folder: Path, name: str, what: str) -> list[str]:
    return [f"![{what}]({folder.name}/{name})"] if (folder / name).is_file() else []


def _facts(figures: Figures) -> dict[str, str]:
    known = figures.trainings
    preferences = known.get("tone/preferences")
    versions: dict[str, list[str]] = {}
    for its in (t["versions"] for t in known.values() if "versions" in t):
        for package, version in its.items():
            if version not in versions.setdefault(package, []):
                versions[package].append(version)
    return {
        "versions": ", ".join(f"{package} {' and '.join(its)}" for package, its in versions.items()) or NOT_YET,
        "times": "; ".join(f"{machine}, {sum(its.values()) / 60:.1f} hours" for machine, its in figures.minutes.items())
        or NOT_YET,
        "pairs": str(preferences["pairs"]) if preferences else NOT_YET,
        "mean_reward": f"{preferences['mean_reward']:+.2f}" if preferences else NOT_YET,
        "training": "\n".join(
            f"| {name} | {t['beta']:g} | {t['seed']} | {t['pairs']} | {t['steps']} "
            f"| {t['first_loss']:.3f} → {t['loss']:.3f} | {t['rewards/accuracies']:.2f} | {t['versions']['torch']} |"
            for name, t in known.items()
            if "beta" in t
        )
        or f"| {NOT_YET} | | | | | | | |",
    }


def _reached(figures: Figures) -> dict[str, str]:
    """How far trainings came: the KL of those on pairs as ranked, and the margins of those on pairs with errors."""
    pairs = [each.of(figures) for each in RANKED if each.lam != 1]
    decoded, trained = ([s.kl.mean for s in column if s is not None] for column in zip(*pairs, strict=True))
    margins = {sweep: figures.trainings.get(f"margin/{sweep.removeprefix('tone-')}") for sweep in NOISY}
    moved = {sweep: margin["mean"] / float(NOISY[sweep]) for sweep, margin in margins.items() if margin}
    points = [(by, f"trained at β = {NOISY[sweep]}", sweep, 1) for sweep, by in moved.items()]
    points += [
        (each.lam * moved[each.sweep], f"λ = {each.lam:g} of β = {NOISY[each.sweep]}", each.sweep, each.lam)
        for each in WITH_ERRORS
        if each.sweep in moved
    ]
    nats = []
    for by, what, sweep, lam in sorted(points):
        found = figures.get(sweep, lam)
        nats.append(f"{by:.0f} nats, {what}: KL {mean(found.kl if found else None)}")
    return {
        "kl": f"{min(trained):.1f} to {max(trained):.1f}" if trained else NOT_YET,
        "dial": f"{min(decoded):.1f} to {max(decoded):.1f}" if decoded else NOT_YET,
        "margins": ", ".join(f"{m['mean']:.2f} at β = {NOISY[sweep]}" for sweep, m in margins.items() if m) or NOT_YET,
        "nats": "; ".join(nats) or NOT_YET,
    }


def curve(figures: Figures, sweep: str, rewards: Sequence[str], lambdas: Sequence[float]) -> str:
    names = [f"{name.replace('_', ' ')} (95 %)" for name in rewards]
    head = ["λ", *names, "KL, nats (95 %)", "perplexity", "repetition", "distinct-2", "tokens", "ended"]
    rows = []
    for lam in lambdas:
        s = figures.get(sweep, lam)
        rows.append([f"{lam:g}", *(interval(level(s, name)) for name in rewards), *_text_figures(s)])
    return table(head, rows)


def _text_figures(s: LambdaSummary | None) -> list[str]:
    if s is None:
        return [NOT_YET] * 6
    return [
        interval(s.kl, ".2f"), mean(level(s, "perplexity"), ".3g"), mean(level(s, "repetition"), ".3f"),
        mean(level(s, "distinct-2"), ".3f"), f"{s.tokens:.0f}", f"{s.ended:.0%}",
    ]  # fmt: skip


def parting(figures: Figures) -> str:
    """Each λ against the adapter as it was trained: a choice that no figure on the page had a part in."""
    trained = figures.get("tone", 1)
    rows = []
    for lam in LAMBDAS:
        if lam != 1:
            changes = [difference(figures.get("tone", lam), trained, reward) for reward in (PROXY, GOLD)]
            rows.append([f"{lam:g}", *(cell for change in changes for cell in (interval(change), verdict(change)))])
    return table(["λ", "tone − that at λ=1 (95 %)", "", "relevance − that at λ=1 (95 %)", ""], rows)


def parted(figures: Figures) -> float | None:
    """The smallest λ above 1 where the trained reward is shown to be higher, and the held-out one lower, than at 1."""
    trained = figures.get("tone", 1)
    for lam in LAMBDAS:
        there = figures.get("tone", lam)
        if lam > 1 and [verdict(difference(there, trained, reward)) for reward in (PROXY, GOLD)] == ["higher", "lower"]:
            return lam
    return None


def retraining(figures: Figures, compared: Sequence[Retrained]) -> str:
    rows = []
    for each in compared:
        ours, theirs = each.of(figures)
        rows.append([
            f"{each.lam:g}", each.beta, interval(level(theirs, PROXY)), interval(level(ours, PROXY)),
            interval(difference(ours, theirs, PROXY)), verdict(difference(ours, theirs, PROXY)),
            mean(theirs.kl if theirs else None), mean(ours.kl if ours else None),
        ])  # fmt: skip
    head = ["λ", "β/λ", "retrained: tone (95 %)", "DeRa: tone (95 %)", "difference (95 %)", "DeRa is", "KL, retrained",
            "KL, DeRa"]  # fmt: skip
    return table(head, rows)


def other_ways(figures: Figures) -> str:
    rows = []
    for arm, lambdas, label in WAYS:
        for lam in lambdas:
            other, plain = figures.get("tone", lam, arm), figures.get("tone", lam)
            rows.append([
                label, f"{lam:g}", interval(level(other, PROXY)),
                interval(difference(other, plain, PROXY)), verdict(difference(other, plain, PROXY)),
                interval(difference(other, plain, GOLD)), verdict(difference(other, plain, GOLD)),
                *_text_figures(other)[:3],
            ])  # fmt: skip
    head = ["", "λ", "tone (95 %)", "tone − plain λ's", "", "relevance − plain λ's", "", "KL, nats", "perplexity",
            "repetition"]  # fmt: skip
    return table(head, rows)


def temperatures(figures: Figures) -> str:
    rows = []
    for name, sweep in (("0.4", "tone-temperature-0.4"), ("0.7", "tone"), ("1", "tone-temperature-1")):
        for lam in (0, 1, 2, 4):
            s = figures.get(sweep, lam)
            rows.append([name, f"{lam:g}", interval(level(s, PROXY)), interval(level(s, GOLD)), *_text_figures(s)[:3]])
    return table(["temperature", "λ", "tone (95 %)", "relevance (95 %)", "KL, nats", "perplexity", "repetition"], rows)


def at_equal_length(figures: Figures) -> str:
    rows = []
    for lam in LAMBDAS:
        s, reference = figures.get("tone", lam), figures.get("tone", 0)
        if lam != 0:
            plain = difference(s, reference, PROXY)
            controlled = figures.length_controlled("tone", lam, 0, PROXY)
            rows.append([f"{lam:g}", interval(plain), interval(controlled), f"{s.tokens:.0f}" if s else NOT_YET])
    return table(["λ", "tone − that at λ=0 (95 %)", "at equal length (95 %)", "tokens"], rows)


def four_trainings(figures: Figures) -> str:
    rows = []
    for lam in (0.5, 1, 2, 4):
        found = _by_seed(figures, lam)
        levels = [level(s, PROXY) for s in found]
        known = [e for e in levels if e is not None]
        row = [f"{lam:g}", *(mean(e, "+.3f") for e in levels)]
        if len(known) == len(SEEDS):
            row += [f"{spread([e.mean for e in known]):.3f}", f"{max(e.se for e in known):.3f}"]
        else:
            row += [NOT_YET, NOT_YET]
        rows.append([*row, ", ".join(mean(s.kl if s else None) for s in found)])
    head = ["λ", *(f"seed {seed}" for seed in SEEDS), "between trainings (SD)", "over prompts (SE)", "KL, nats"]
    return table(head, rows)


def _by_seed(figures: Figures, lam: float) -> list[LambdaSummary | None]:
    return [figures.get("tone" if seed == 1 else f"tone-seed-{seed}", lam) for seed in SEEDS]


def elsewhere(figures: Figures) -> str:
    rows = []
    for what, sweep, lambdas in [("decoded there, trained here", "tone-elsewhere", (0, 1, 3)),
                                 ("trained and decoded there", "tone-again", (1,))]:  # fmt: skip
        for lam in lambdas:
            there, here = (figures.points.get((name, LOGITS, lam)) for name in (sweep, "tone"))
            row = [NOT_YET, NOT_YET, NOT_YET]
            if there and here:
                ours, theirs = (list(zip(*(point[name] for name in OF_TEXT), strict=True)) for point in (here, there))
                same = sum(one == other for one, other in zip(ours, theirs, strict=True))
                apart = max(abs(one - other) for one, other in zip(here[GOLD], there[GOLD], strict=True))
                row = [str(len(ours)), str(same), f"{apart:.4f}"]
            rows.append([what, f"{lam:g}", *row])
    return table(["", "λ", "answers", "the same", "relevance apart by at most"], rows)


def texts(figures: Figures) -> str:
    found = figures.points.get(("tone", LOGITS, 0), {}).get("texts", [])
    if not found:
        return NOT_YET
    parts = []
    for text in found:
        parts.append(f"**{text['asked']}**")
        lines = []
        for lam, arm in TEXTS:
            answer = figures.text("tone", lam, text["prompt"], arm)
            label = f"λ={lam:g}" + ("" if arm == LOGITS else f", {arm}")
            lines.append([label, NOT_YET if answer is None else _in_a_cell(answer)])
        parts.append(table(["", "answer"], lines))
    return "\n\n".join(parts)


def _in_a_cell(text: str) -> str:
    """Neither Markdown nor the end of a row: a text as it is."""
    return " ⏎ ".join(re.sub(r"[^\w\s.,:;!?'()-]", lambda found: f"&#{ord(found[0])};", text).splitlines())


def conclusions(figures: Figures) -> list[str]:
    """What the figures say, as sentences; each is made of figures alone."""
    known = [s for s in figures.of("tone") if s.lam is not None and s.lam >= 0]
    if len(known) < 3:
        return [NOT_YET]
    lines = [_rises(known, PROXY, "the trained reward")]
    reference = figures.get("tone", 0)
    assert reference is not None  # λ=0 is in every one of these sweeps
    limit = BROKEN * reference.rewards["perplexity"].level.mean
    broken = [s for s in known if s.rewards["perplexity"].level.mean > limit]
    lines.append(
        f"Text breaks from λ = {broken[0].lam:g} on: perplexity under the reference is "
        f"{mean(level(broken[0], 'perplexity'))} there, over {BROKEN:g} times that of λ = 0 ({limit / BROKEN:.2f})."
        if broken
        else f"Up to λ = {known[-1].lam:g} perplexity is below {BROKEN:g} times that of λ = 0 ({limit / BROKEN:.2f})."
    )
    changes = [difference(figures.get("tone", 1), reference, reward) for reward in (PROXY, GOLD, SECOND)]
    lines.append(
        f"From λ = 0 to 1 the trained reward changes by {interval(changes[0])}, the held-out relevance by "
        f"{interval(changes[1])}, and the second tone by {interval(changes[2])}."
    )
    at = parted(figures)
    lines.append(
        f"λ = {at:g} is the first above 1 where, against λ = 1, the trained reward is shown to be higher, and the "
        "held-out one lower."
        if at is not None
        else "At no λ above 1 is the trained reward shown to be higher, and the held-out one lower, than at λ = 1."
    )
    ranked, with_errors = (
        {each.lam: difference(*each.of(figures), PROXY) for each in compared if each.lam != 1}
        for compared in (RANKED, WITH_ERRORS)
    )
    lines += [
        _compared("DeRa against retraining at β/λ, in tone", ranked)
        + f" β told little there: the KL of the retrained is {_reached(figures)['kl']}.",
        _compared("DeRa against retraining at β/λ, on pairs with errors, in tone", with_errors),
    ]
    for arm, lambdas, label in WAYS:
        for reward in (PROXY, GOLD):
            found = {
                lam: difference(figures.get("tone", lam, arm), figures.get("tone", lam), reward) for lam in lambdas
            }
            lines.append(_compared(f"{label} against plain λ, in {reward}", found))
    colder = difference(figures.get("tone-temperature-0.4", 0), figures.get("tone-temperature-1", 0), PROXY)
    lines.append(
        f"λ = 1 changes the tone by {interval(changes[0])}; a temperature of 0.4 in place of 1 by {interval(colder)}."
    )
    controlled = figures.length_controlled("tone", 1, 0, PROXY)
    lines.append(f"At equal length, λ = 1 has {interval(controlled)} more tone than λ = 0.")
    means = [s.rewards[PROXY].level.mean for s in _by_seed(figures, 1) if s is not None]
    if len(means) == len(SEEDS):
        lines.append(
            f"Four trainings that differ in their seed have {min(means):+.3f} to {max(means):+.3f} at λ = 1: "
            "what sets two adapters apart by so little may be chance, at λ = 0.5 and β/0.5 too."
        )
    if wished := figures.of("length"):
        lines.append(_rises(wished, LENGTH, "the wished length, of an adapter of its own,"))
    return lines


def _compared(what: str, found: dict[float, Estimate | None]) -> str:
    parts = []
    for said in ("higher", "lower", "not told apart"):
        if there := [f"{lam:g}" for lam, estimate in found.items() if verdict(estimate) == said]:
            parts.append(f"{said} at λ = {', '.join(there)}")
    return f"{what}: {'; '.join(parts) or NOT_YET}."


def _rises(known: Sequence[LambdaSummary], reward: str, what: str) -> str:
    best = max(known, key=lambda s: s.rewards[reward].level.mean)
    last = known[-1]
    end = difference(last, best, reward)
    said = f"{what[0].upper()}{what[1:]} is highest at λ = {best.lam:g} ({interval(level(best, reward))})"
    same = [s.lam for s in known if s is not best and not difference(best, s, reward).excludes_zero]
    said += f", not told from λ = {', '.join(f'{lam:g}' for lam in same)}" if same else ""
    return said + (
        "." if last is best else f"; at λ = {last.lam:g} it is {verdict(end)} ({interval(end)} from the highest)."
    )
