"""The rows of a small sweep, made by hand, with everything in them that a page may stumble over."""

import math
from dataclasses import replace

from dera_peft.evaluate.analysis.best import best_arm
from dera_peft.evaluate.analysis.choice import Rule
from dera_peft.evaluate.analysis.curve import Curve, Gap, Point
from dera_peft.evaluate.analysis.recommend import recommend
from dera_peft.evaluate.analysis.summary import Estimate, summarise
from dera_peft.evaluate.report.findings import Findings

LN2 = math.log(2)
# what could end a script or an element, turn the direction of text, ring a bell, or come apart over tokens
HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)> & \u202eabc\u202c \x07 مرحبا"
TOKENS = ["</script>", "<script>", "document.title = 'taken'", "</script>", "<img src=x onerror=alert(1)>", " & "]
TOKENS += ["\u202eabc\u202c", " \x07", " مرحبا", "", "", "", "🎉", "\n", "</s>"]
CHAT = [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": "مرحبا"}]
PROMPTS = ["Say </textarea><script>alert(1)</script>.", CHAT, "plain"]
LAMBDAS = (-0.5, 0.0, 0.5, 1.0)
RULE, RULE_REWARD = "falling", 2.0  # an arm that knows no λ of its own, a schedule, and is the best


def row(arm: str, index: int, lam: float | None, sample: int, reward: float | None) -> dict:
    strength = 1.0 if lam is None else lam
    made = {
        "arm": arm, "prompt_index": index, "prompt": PROMPTS[index], "lambda": lam, "sample": sample,
        "columns": {"group": "<i>g</i>"},
        "completion": f"λ={strength:g} of {index}, {sample}", "num_tokens": 3, "finish_reason": "eos",
        "kl": strength**2,
        "rewards": {"$fun$": reward, "length": 3.0},
    }  # fmt: skip
    if reward is None:
        made["errors"] = {"$fun$": "ValueError: <b>no</b>"}
    return made


def rows(views: bool = True, arms: tuple[str, ...] = ("logits",)) -> list[dict]:
    """Three prompts of two samples at four λ; one row failed, and one completion is `HOSTILE`."""
    made = [
        row(arm, index, lam, sample, index / 4 + (RULE_REWARD if lam is None else lam))
        for arm in arms
        for index in range(3)
        for lam in (LAMBDAS if arm in ("logits", "weights") else (None,) if arm == RULE else (1.0,))
        for sample in range(2)
    ]
    for r in made:
        if r["arm"] == RULE:
            r["token_lambda"] = [2.0, 0.25, 0.0]  # λ of each token
    failed = next(r for r in made if (r["arm"], r["prompt_index"], r["lambda"], r["sample"]) == ("logits", 2, 1.0, 1))
    failed["rewards"]["$fun$"], failed["errors"] = None, {"$fun$": "ValueError: <b>no</b>"}
    hostile = next(r for r in made if (r["prompt_index"], r["lambda"], r["sample"]) == (0, 1.0, 0))
    hostile["completion"] = HOSTILE + "🎉\n"
    if views:
        for r in made:
            if r["arm"] in ("logits", RULE):
                texts = TOKENS if r is hostile else [" one", f" λ={r['lambda'] or 0:g}", "</s>"]
                r["token_views"] = [
                    {
                        "token": text,
                        "js": LN2 * place / len(texts),
                        "reference": [[text, 0.5], [f"<b>r{place}</b>", 0.25], ["\x07", 0.125]],
                        "aligned": [[f"a{place}", 0.75], ["\u202e", 0.0625], ["�", 0.03125]],
                    }
                    for place, text in enumerate(texts)
                ]
    return made


def curve() -> Curve:
    """Known up to λ=0.5, where it lies on 10·λ, and not beyond."""

    def estimate(value: float) -> Estimate:
        return Estimate(value, 0.1, value - 1, value + 1)

    points = [
        Point(lam, 40.0, 1.0, estimate(lam**2), {"$fun$": estimate(10 * lam), "length": estimate(3.0)})
        if lam <= 0.5
        else Point(lam, 2.0, 0.1, None, {"$fun$": None, "length": None})
        for lam in (-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    return Curve(points, samples=24, needed=4.5, gaps=[Gap(0.5, 1.0, 0.75)])


def swept(views: bool = True, arms: tuple[str, ...] = ("logits",), **changes) -> tuple[Findings, list[dict]]:
    """What was found, and the rows that it is from."""
    made = rows(views, arms)
    summaries = summarise(made, "group")
    found = Findings(
        summaries,
        curve(),
        recommend(summaries, None, "reward", "$fun$", beta=0.5),
        best=best_arm(summaries, None, Rule("reward"), "$fun$"),
        adapter="runs/dpo",
    )
    return replace(found, **changes), made
