"""The samples on the report page: which rows, and the data that the page's script reads."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dera_peft.decoding.lambdas import Lambda, NamedLambda, values_of

# A token with its view takes about 70 bytes of the page.
SAMPLE_PAIRS = 50
SAMPLE_TOKENS = 100_000
OWN_KEYS = ("token", "js")  # of a view; the others are its branches


def sample_rows(rows: Sequence[dict]) -> list[dict]:
    """
    The rows that the page has room for: whole (prompt, sample) pairs, each at every arm and λ.

    The first sample of each prompt comes first, then further samples; to at most SAMPLE_PAIRS pairs and SAMPLE_TOKENS
    tokens, but one pair at least.
    """
    pairs: dict[tuple[int, int], list[dict]] = {}
    for row in sorted(rows, key=lambda row: (row["sample"], row["prompt_index"])):
        pairs.setdefault((row["sample"], row["prompt_index"]), []).append(row)
    samples, tokens = [], 0
    for number, pair in enumerate(pairs.values()):
        tokens += sum(row["num_tokens"] for row in pair)
        if number and (number >= SAMPLE_PAIRS or tokens > SAMPLE_TOKENS):
            break
        samples += pair
    return samples


def samples_data(rows: Sequence[dict], names: Mapping[str, str]) -> dict[str, Any]:
    """
    What the page's script reads, short: texts are listed once, and tokens name them by number.

    Args:
        rows: of `sample_rows`.
        names: how arms are called on the page.

    Returns:
        `arms` ([{arm, name, lambdas}]); `branches` (names); `texts`; and `pairs`, each with `index`, `sample`,
        `prompt` ([[role or null, text], …]) and `rows` (by arm, one per λ). A row has `lambda`, `text`, `num_tokens`,
        `finish_reason`, `kl`, `rewards`, `judged`, `errors`, and `token_views`: null, or per token [text, JS, then text
        and probability of each of a branch's best, branch by branch]; and of a rule `token_lambda`, the λ of
        each token.
    """
    texts: dict[str, int] = {}
    branches = next(
        ([key for key in row["token_views"][0] if key not in OWN_KEYS] for row in rows if row.get("token_views")), []
    )
    lambdas: dict[str, set[Lambda | None]] = {}
    pairs: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        lambdas.setdefault(row["arm"], set()).add(row["lambda"])
        place = pairs.setdefault(
            (row["sample"], row["prompt_index"]),
            {"index": row["prompt_index"], "sample": row["sample"], "prompt": _turns(row["prompt"]), "rows": {}},
        )
        place["rows"].setdefault(row["arm"], []).append(
            {
                "lambda": script_lambda(row["lambda"]),
                "text": row["completion"],
                "num_tokens": row["num_tokens"],
                "finish_reason": row["finish_reason"],
                "kl": row["kl"],
                "rewards": row["rewards"],
                "judged": row.get("judged", {}),
                "errors": row.get("errors", {}),
                "token_views": [_short(view, branches, texts) for view in row["token_views"]]
                if row.get("token_views")
                else None,
                **({"token_lambda": row["token_lambda"]} if row.get("token_lambda") else {}),
            }
        )
    return {
        "arms": [
            {
                "arm": arm,
                "name": names.get(arm, arm),
                "lambdas": [*map(script_lambda, sorted(values, key=lambda lam: () if lam is None else values_of(lam)))],
            }
            for arm, values in lambdas.items()
        ],
        "branches": branches,
        "texts": list(texts),
        "pairs": list(pairs.values()),
    }


def script_lambda(lam: Lambda | None) -> float | str | None:
    """λ as the script has it: of several adapters a text."""
    return f"{lam:g}" if isinstance(lam, NamedLambda) else lam


def _short(view: dict, branches: Sequence[str], texts: dict[str, int]) -> list[int | float]:
    """One token's view; `texts` numbers the texts as they come."""
    short: list[int | float] = [texts.setdefault(view["token"], len(texts)), round(view["js"], 5)]
    for branch in branches:
        for text, probability in view[branch]:
            short += [texts.setdefault(text, len(texts)), round(probability, 4)]
    return short


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


def script_json(data: Any) -> str:
    """JSON that can stand inside a <script>: no letter of it can end the element or start a comment there."""
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)  # ASCII: U+2028 and the like are escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(data: Any) -> Any:
    """With null for NaN and infinities, which JSON does not have."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    if isinstance(data, float) and data - data != 0:
        return None
    return data
