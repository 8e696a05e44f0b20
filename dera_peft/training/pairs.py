"""From completions with rewards to pairs of a better and a worse one."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from random import Random

from rich.table import Table

from dera_peft.decoding.chats import TEMPLATE_ARGUMENTS, TOOLS, Chat, as_chat, whole_prompt
from dera_peft.decoding.rows import RewardedRow

BEST_WORST, ALL = "best_worst", "all"

# Why a prompt gives no pair.
EMPTY = "the prompt is empty"
TOO_LONG = "prompt and max_new_tokens exceed the model's context"
UNFINISHED = "fewer than two completions say something and end within max_new_tokens"
UNSCORED = "fewer than two completions got a reward"
IDENTICAL = "all completions are the same text"
ALIKE = "no two rewards differ by more than min_margin"


def make_pairs(
    rows: Sequence[RewardedRow],
    pairs: str,
    min_margin: float,
    label_temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> tuple[list[dict], Counter]:
    """
    Pairs in TRL's preference format, and what became of the prompts.

    Args:
        rows: of completions.jsonl.
        pairs: "best_worst": of each prompt the best completion against the worst; "all": every two of them.
        min_margin: of a pair the better reward exceeds the worse by more than this.
        label_temperature: T; a is chosen over b with the probability σ((r_a - r_b)/T), as Bradley and Terry have it,
            drawn by `seed`; at 0 the better one always is.
        chat: whether the prompts were rendered with the chat template: a text is then a user message.

    Returns:
        Rows with prompt, chosen, rejected, chosen_reward and rejected_reward, by prompt, and where they have them tools
        and chat_template_kwargs; and for each number of pairs, or reason why there is none, how many prompts there are.
    """
    by_prompt = defaultdict(list)
    for row in rows:
        by_prompt[row.prompt_index].append(row)
    result, outcomes = [], Counter()
    for _, group in sorted(by_prompt.items()):
        usable, reason = _usable(group)
        found = [] if reason else list(_pairs_of(usable, pairs, min_margin, label_temperature, seed, chat))
        result.extend(found)
        outcomes[reason or len(found) or ALIKE] += 1
    return result, outcomes


def _usable(group: Sequence[RewardedRow]) -> tuple[list[RewardedRow], str | None]:
    """One prompt's completions that can stand in a pair, worst first; and the reason where there are no two."""
    # one that was cut would teach to stop in the middle, and from an empty one DPO can't learn
    ended = [row for row in group if row.finish_reason == "eos" and row.completion.strip()]
    scored = [row for row in ended if row.reward is not None]
    if len(ended) < 2:
        return [], UNFINISHED
    if len(scored) < 2:
        return [], UNSCORED
    if len({row.completion for row in scored}) < 2:
        return [], IDENTICAL
    return sorted(scored, key=lambda row: (row.reward, row.sample)), None


def _pairs_of(
    usable: Sequence[RewardedRow], pairs: str, min_margin: float, label_temperature: float, seed: int, chat: bool
) -> Iterator[dict]:
    candidates = [(usable[0], usable[-1])] if pairs == BEST_WORST else combinations(usable, 2)
    columns = usable[0].columns
    prompt = whole_prompt(usable[0].prompt, columns, chat)
    of_template = {name: columns[name] for name in (TOOLS, TEMPLATE_ARGUMENTS) if columns.get(name)}
    for worse, better in candidates:
        assert better.reward is not None  # of the usable ones
        assert worse.reward is not None
        margin = better.reward - worse.reward
        if margin <= min_margin or better.completion == worse.completion:
            continue
        chosen, rejected = better, worse
        if label_temperature:
            # random numbers of this very pair, so that others neither shift nor repeat them
            draw = Random(f"{seed} {better.prompt_index} {better.sample} {worse.sample}").random()
            if draw >= 1 / (1 + math.exp(-margin / label_temperature)):
                chosen, rejected = worse, better
        yield {
            "prompt": prompt,
            "chosen": _as_answer(chosen.completion, prompt),
            "rejected": _as_answer(rejected.completion, prompt),
            "chosen_reward": chosen.reward,
            "rejected_reward": rejected.reward,
            **of_template,
        }


def _as_answer(text: str, prompt: str | Chat) -> str | Chat:
    return text if isinstance(prompt, str) else as_chat(text, "assistant")


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
