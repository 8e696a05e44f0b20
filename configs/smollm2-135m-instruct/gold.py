"""
What the answers are judged by and were not trained on: whether they still say something about the question, and a
second opinion on their tone.

Both are proxies too, but of another source, and the training never saw them.
"""

import functools
from pathlib import Path

import torch
from textblob import TextBlob
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = Path("runs/smollm2-135m-instruct/model")
ASKED = "Which question or request does this answer?\n\n"


def relevance(prompts, completions, **columns) -> list[float]:
    """
    What an answer tells of its question, in nats a token of the question: log p(question | answer) - log p(question).

    p is the chat model as it was before any alignment, asked which question a text answers. 0: it could be the answer
    to any question. (Pointwise mutual information, read backwards; Li et al., NAACL 2016, rank answers by it.)
    """
    questions = [prompt[-1]["content"] for prompt in prompts]
    answers = [text_of(completion) for completion in completions]
    return [
        log_probability(question, answer) - log_probability(question, "")
        for question, answer in zip(questions, answers, strict=True)
    ]


@functools.cache
def log_probability(question: str, answer: str) -> float:
    """Of a question after an answer, mean over its tokens."""
    model, tokenizer = load()
    chat = [{"role": "user", "content": ASKED + answer}]
    before = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    after = tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = model(torch.cat([before, after], dim=1).to(model.device)).logits[0, before.shape[1] - 1 : -1]
    return float(logits.cpu().log_softmax(-1).gather(1, after[0, :, None]).mean())


@functools.cache
def load():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(MODEL).to(device), AutoTokenizer.from_pretrained(MODEL)


def second_tone(prompts, completions, **columns) -> list[float]:
    """The mean polarity, from -1 to 1, of an answer's words that TextBlob's list has; by another hand than VADER's."""
    return [TextBlob(text_of(completion)).sentiment.polarity for completion in completions]


def text_of(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]
