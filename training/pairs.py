"""From completions with rewards to pairs of a better and a worse one."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations

from rich.table import Table

BEST_WORST, ALL = "best_worst", "all"

# Why a prompt gives no pair.
EMPTY = "the prompt is empty"
TOO_LONG = "prompt and max_new_tokens exceed the model's context"
UNFINISHED = "fewer than two completions end within max_new_tokens"
UNSCORED = "fewer than two completions got a reward"
IDENTICAL = "all completions are the same text"
ALIKE = "no two rewards differ by more than min_margin"


def make_pairs(rows: Sequence[dict], pairs: str, min_margin: float) -> tuple[list[dict], Counter]:
    """
    Pairs in TRL's preference format, and what became of the prompts.

    Args:
        rows: of completions.jsonl: "index" of the prompt, "prompt", "sample", "completion", "finish" and "reward".
        pairs: "best_worst": of each prompt the best completion against the worst; "all": every two of them.
        min_margin: of a pair the better reward exceeds the worse by more than this.

    Returns:
        Rows with prompt, chosen, rejected, chosen_reward and rejected_reward, by prompt; and for each number of pairs,
        or reason why there is none, how many prompts there are.
    """
    by_prompt = defaultdict(list)
    for row in rows:
        by_prompt[row["index"]].append(row)
    result, outcomes = [], Counter()
    for _, group in sorted(by_prompt.items()):
        usable, reason = _usable(group)
        found = [] if reason else list(_pairs_of(usable, pairs, min_margin))
        result.extend(found)
        outcomes[reason or len(found) or ALIKE] += 1
    return result, outcomes


def _usable(group: Sequence[dict]) -> tuple[list[dict], str | None]:
    """One prompt's completions that can stand in a pair, worst first; and the reason where there are no two."""
    # one that was cut would teach to stop in the middle
    ended = [row for row in group if row["finish"] == "eos"]
    scored = [row for row in ended if row["reward"] is not None]
    if len(ended) < 2:
        return [], UNFINISHED
    if len(scored) < 2:
        return [], UNSCORED
    if len({row["completion"] for row in scored}) < 2:
        return [], IDENTICAL
    return sorted(scored, key=lambda row: (row["reward"], row["sample"])), None


def _pairs_of(usable: Sequence[dict], pairs: str, min_margin: float) -> Iterator[dict]:
    candidates = [(usable[0], usable[-1])] if pairs == BEST_WORST else combinations(usable, 2)
    for worse, better in candidates:
        if better["reward"] - worse["reward"] > min_margin and better["completion"] != worse["completion"]:
            chat = isinstance(better["prompt"], list)
            yield {
                "prompt": better["prompt"],
                "chosen": _as_completion(better["completion"], chat),
                "rejected": _as_completion(worse["completion"], chat),
                "chosen_reward": better["reward"],
                "rejected_reward": worse["reward"],
            }


def _as_completion(text: str, chat: bool) -> str | list[dict]:
    return [{"role": "assistant", "content": text}] if chat else text


def outcome_table(outcomes: Counter) -> Table:
    """How many prompts gave how many pairs, and how many gave none and why."""
    total = outcomes.total()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("prompts", justify="right")
    table.add_column("share", justify="right")
    table.add_column("gave")
    numbers = sorted((outcome for outcome in outcomes if isinstance(outcome, int)), reverse=True)
    for outcome in (*numbers, EMPTY, TOO_LONG, UNFINISHED, UNSCORED, IDENTICAL, ALIKE):
        if count := outcomes[outcome]:
            text = f"no pair: {outcome}" if isinstance(outcome, str) else f"{outcome} pair{'s' if outcome > 1 else ''}"
            table.add_row(str(count), f"{count / total:.1%}", text)
    table.add_row(str(total), "", "in all", style="dim")
    return table
