"""Each token of a completion with what each branch would have said there, as text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from dera_peft.decoding.scoring import Scored

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_BYTES = 4  # of a character in UTF-8


def token_views(
    scored: "Scored",
    prompt: Sequence[int],
    completion: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    cache: dict[tuple[int | None, int], str] | None = None,
) -> list[dict]:
    """
    The view of each token: its text, how much the branches disagree there, and each branch's most probable tokens.

    Args:
        scored: of this completion, with `top` > 0 and branches (`mixing="logits"`).
        prompt, completion: the token ids that were scored.
        cache: of one tokenizer, the texts of tokens behind others; a call adds to it.

    Returns:
        Per token `{"token": text, "js": nats, "reference": [[text, probability], …], "aligned": …}`, the most probable
        first. An end token has a view as well.
    """
    texts = token_texts(prompt, completion, tokenizer)
    cache = {} if cache is None else cache

    def kept_text(before: int | None, token: int) -> str:
        if (before, token) not in cache:
            cache[before, token] = text_after(before, token, tokenizer)
        return cache[before, token]

    assert scored.disagreement is not None  # it is of branches
    disagreement = scored.disagreement.tolist()
    best = {branch: (ids.tolist(), chances.tolist()) for branch, (ids, chances) in scored.best.items()}
    result = []
    for place, text in enumerate(texts):
        before = completion[place - 1] if place else (prompt[-1] if prompt else None)
        view: dict[str, Any] = {"token": text, "js": disagreement[place]}
        for branch, (ids, chances) in best.items():
            view[branch] = [
                [kept_text(before, token), chance] for token, chance in zip(ids[place], chances[place], strict=True)
            ]
        result.append(view)
    return result


def token_texts(prompt: Sequence[int], completion: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """
    The text that each token of a completion adds to what stands before it.

    A character that several tokens make up stands with the last of them, and "" with the others. Special tokens are
    written out, so that an end token has a text too.
    """
    ids = [*prompt[-1:], *completion]
    start, done = 0, len(ids) - len(completion)  # the texts of ids[:done] are told; ids[start:done] is their context
    texts: list[str] = []
    for end in range(done + 1, len(ids) + 1):
        text = _decode(ids[start:end], tokenizer)
        if text.endswith(REPLACEMENT) and end - done < MAX_BYTES and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(_decode(ids[start:done], tokenizer)) :])
        start, done = done, end
    return texts


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return cast("str", tokenizer.decode(ids))  # of one sequence one text


def text_after(before: int | None, token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token's text behind another, without which a leading space is lost; "�" for a part of a character."""
    context = [] if before is None else [before]
    text = _decode([*context, token], tokenizer)[len(_decode(context, tokenizer)) if context else 0 :]
    return text if text and REPLACEMENT not in text else REPLACEMENT
