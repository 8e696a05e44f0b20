"""The samples on the report page: which rows, and the data that the page's script reads."""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dera_peft.decoding.lambdas import Lambda, NamedLambda, values_of
from dera_peft.evaluate.report.findings import Findings

VIEWED_TOKENS = 50_000  # a token with its view takes about 14 bytes of the page
OF_TEXTS = 0.8  # of the page's room; the rest is for views of tokens
OWN_KEYS = ("token", "js")  # of a view; the others are its branches
HEAD = 120  # letters of a prompt in the list of prompts

Pair = list[dict]  # the rows of one prompt and sample, at every arm and λ


@dataclass(frozen=True)
class Samples:
    """
    What the page shows of the samples.

    Attributes:
        data: what its script reads: `arms` ([{arm, name, lambdas}]), `branches` (names), `recommended` ([arm, λ] or
            None), and `pairs`, each with `index`, `sample`, `head` (how its prompt begins) and `packed` (`_packed`).
        shown: how many (prompt, sample) pairs are there.
        total: how many were sampled.
        viewed: how many of those shown have views of their tokens.
    """

    data: dict[str, Any]
    shown: int
    total: int
    viewed: int


def viewed_rows(rows: Sequence[dict]) -> list[dict]:
    """
    The rows whose tokens the page may show with what each branch would have said: whole (prompt, sample) pairs with
    VIEWED_TOKENS tokens at most, but one pair at least. The first sample of each prompt comes first.
    """
    viewed: list[dict] = []
    tokens = 0
    for pair in _pairs(rows):
        tokens += sum(row["num_tokens"] for row in pair)
        if viewed and tokens > VIEWED_TOKENS:
            break
        viewed += pair
    return viewed


def pack_samples(rows: Sequence[dict], findings: Findings, room: int) -> Samples:
    """
    As many (prompt, sample) pairs as there is room for, in bytes of the page, one at least; first samples first. Texts
    come before views of tokens.
    """
    pairs = _pairs(rows)
    branches = next(
        ([key for key in row["token_views"][0] if key not in OWN_KEYS] for row in rows if row.get("token_views")), []
    )
    entries: list[dict[str, Any]] = []
    used = 0
    for pair in pairs:
        entry = _entry(pair)
        used += len(script_json(entry))
        if entries and used > room * (OF_TEXTS if branches else 1):
            used -= len(script_json(entry))
            break
        entries.append(entry)
    viewed = 0
    for pair, entry in zip(pairs, entries, strict=False):
        if not any(row.get("token_views") for row in pair):
            break
        packed = _packed(pair, branches)
        used += len(packed) - len(entry["packed"])
        if used > room:
            break
        entry["packed"] = packed
        viewed += 1
    lambdas: dict[str, set[Lambda | None]] = {}
    for row in rows:
        lambdas.setdefault(row["arm"], set()).add(row["lambda"])
    arms = [
        {
            "arm": arm,
            "name": findings.name_of(arm),
            "lambdas": [*map(script_lambda, sorted(values, key=lambda lam: () if lam is None else values_of(lam)))],
        }
        for arm, values in lambdas.items()
    ]
    best = findings.recommended
    recommended = None if best is None else [best[0], script_lambda(best[1])]
    data = {"arms": arms, "branches": branches, "recommended": recommended, "pairs": entries}
    return Samples(data, len(entries), len(pairs), viewed)


def script_lambda(lam: Lambda | None) -> float | str | None:
    """λ as the script has it: of several adapters a text."""
    return f"{lam:g}" if isinstance(lam, NamedLambda) else lam


def _pairs(rows: Sequence[dict]) -> list[Pair]:
    pairs: dict[tuple[int, int], Pair] = {}
    for row in sorted(rows, key=lambda row: (row["sample"], row["prompt_index"])):
        pairs.setdefault((row["sample"], row["prompt_index"]), []).append(row)
    return list(pairs.values())


def _entry(pair: Pair) -> dict[str, Any]:
    turns = _turns(pair[0]["prompt"])
    return {
        "index": pair[0]["prompt_index"],
        "sample": pair[0]["sample"],
        "head": (turns[-1][1] or "")[:HEAD] if turns else "",
        "packed": _packed(pair, None),
    }


def _packed(pair: Pair, branches: Sequence[str] | None) -> str:
    """
    JSON, compressed (zlib) and in base64: a text of a sample can be no part of the page. It has `prompt`
    ([[role or null, text], …]), `texts` and `rows` (by arm, one per λ). A row has `lambda`, `text`, `num_tokens`,
    `finish_reason`, `kl`, `rewards`, `judged`, `errors`, and `token_views`: null, or per token [text, JS, then text and
    probability of each of a branch's best, branch by branch], where a text is its number in `texts`; and of a rule
    `token_lambda`, the λ of each token.

    Args:
        branches: of the views; None leaves views out.
    """
    texts: dict[str, int] = {}
    rows: dict[str, list[dict]] = {}
    for row in pair:
        views = row.get("token_views") if branches is not None else None
        packed = {
            "lambda": script_lambda(row["lambda"]),
            "text": row["completion"],
            "num_tokens": row["num_tokens"],
            "finish_reason": row["finish_reason"],
            "kl": _digits(row["kl"]),
            "rewards": {name: value if value is None else _digits(value) for name, value in row["rewards"].items()},
            "judged": row.get("judged", {}),
            "errors": row.get("errors", {}),
            "token_views": [_short(view, branches or (), texts) for view in views] if views else None,
            **({"token_lambda": [*map(_digits, row["token_lambda"])]} if row.get("token_lambda") else {}),
        }
        rows.setdefault(row["arm"], []).append(packed)
    data = {"prompt": _turns(pair[0]["prompt"]), "rows": rows, "texts": list(texts)}
    return base64.b64encode(zlib.compress(_json(data).encode(), 9)).decode()


def _short(view: dict, branches: Sequence[str], texts: dict[str, int]) -> list[int | float]:
    """One token's view; `texts` numbers the texts as they come."""
    short: list[int | float] = [texts.setdefault(view["token"], len(texts)), round(view["js"], 3)]
    for branch in branches:
        for text, probability in view[branch]:
            short += [texts.setdefault(text, len(texts)), round(probability, 3)]
    return short


def _digits(value: float) -> float:
    """As many as a reader needs."""
    return float(f"{value:.5g}")


def _turns(prompt: str | Sequence[dict]) -> list[list[str | None]]:
    """A prompt as turns: one without a role, or a chat's; content other than text as JSON."""
    if isinstance(prompt, str):
        return [[None, prompt]]
    return [
        [
            str(turn.get("role", "")),
            turn["content"]
            if isinstance(turn.get("content"), str)
            else json.dumps(turn.get("content"), ensure_ascii=False),
        ]
        for turn in prompt
    ]


def script_json(data: Mapping[str, Any]) -> str:
    """JSON that can stand inside a <script>: no letter of it can end the element or start a comment there."""
    return _json(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _json(data: Any) -> str:
    """In ASCII, so that U+2028 and the like are escaped; with null for NaN and infinities, which JSON does not have."""
    try:
        return json.dumps(data, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_finite(data), separators=(",", ":"))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    if isinstance(data, float) and data - data != 0:
        return None
    return data
