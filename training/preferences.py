"""
Makes preferences: samples completions from an SFT model, and ranks them by a reward into chosen and rejected ones.

    python -m training.preferences --config configs/tiny/preferences.yaml
    python -m training.preferences --config configs/tiny/preferences.yaml --samples 8 --output_dir runs/more

The folder gets completions.jsonl (every sample with its reward; a killed run goes on from it) and preferences.jsonl, in
TRL's preference format: prompt, chosen and rejected, and the two rewards. Of each prompt's completions the best is set
against the worst; a prompt whose completions score alike gives no pair, which is counted and said.
"""

import json
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from dera_peft.errors import DeRaError
from dera_peft.quiet import be_quiet
from training.program import OutputFolder, ProgramArguments, parse, settings_of, start

UNFINISHED = "fewer than two completions that end within max_new_tokens"
ALIKE = "best and worst differ by no more than min_margin"


@dataclass
class PreferenceArguments(ProgramArguments):
    """What to sample, and how to rank it."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The SFT model: hub id or folder."})
    prompts: str | None = field(
        default=None,
        metadata={"help": "A .txt or .jsonl file, or path.py:function, with a text or chat messages a prompt."},
    )
    reward: str | None = field(
        default=None, metadata={"help": "path.py:name of f(prompts, completions, **columns) -> list[float], as in TRL."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder for completions and preferences."})
    samples: int = field(default=4, metadata={"help": "Completions per prompt."})
    min_margin: float = field(
        default=0.0, metadata={"help": "The best completion's reward must exceed the worst's by more than this."}
    )
    chat: bool = field(default=False, metadata={"help": "Render the prompts with the tokenizer's chat template."})
    max_new_tokens: int = field(default=256, metadata={"help": "At most so many new tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the fewest tokens that hold this probability."})
    seed: int = field(default=0, metadata={"help": "Of all random numbers."})
    batch_size: int = field(default=64, metadata={"help": "Completions sampled at once."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto, float32, bfloat16 or float16."})


def make_parser():
    from trl import TrlParser

    return TrlParser(
        (PreferenceArguments,), prog="python -m training.preferences", description=__doc__, allow_abbrev=False
    )


def main(arguments: list[str] | None = None) -> None:
    be_quiet()
    (args,) = parse(make_parser(), arguments)
    for name in ("model_name_or_path", "prompts", "reward", "output_dir"):
        if not getattr(args, name):
            raise DeRaError(f"{name} must be set, in the config or on the command line.")
    if args.samples < 2:
        raise DeRaError(f"samples={args.samples} must be at least 2, for one to be better than another.")

    from dera_peft.evaluate.rewards import load_reward
    from dera_peft.fingerprint import file_fingerprint, settings_fingerprint, weights_fingerprint
    from dera_peft.prompts import from_file
    from dera_peft.results import Results

    reward = load_reward(args.reward)
    prompts = from_file(args.prompts)
    inputs = {
        "model": weights_fingerprint(args.model_name_or_path) or args.model_name_or_path,
        "reward": file_fingerprint(args.reward.rpartition(":")[0]),
        "prompts": settings_fingerprint([prompt.content for prompt in prompts]),
    }
    output = OutputFolder(args.output_dir, settings_of(args, ignore=("batch_size",)), inputs, args.overwrite)
    if output.is_complete:
        output.say_reused()
        return
    file = Path(args.output_dir) / "completions.jsonl"
    if args.overwrite:
        file.unlink(missing_ok=True)
    results = Results(file, settings_fingerprint(output.record))
    sample(args, prompts, results, reward)
    pairs, unpaired = rank(results.rows, args.samples, args.min_margin)
    write_jsonl(Path(args.output_dir) / "preferences.jsonl", pairs)
    output.complete()
    print(f"{len(pairs)} pairs from {len(prompts)} prompts in {Path(args.output_dir) / 'preferences.jsonl'}")
    for reason, count in unpaired.items():
        print(f"{count} prompts gave no pair: {reason}")


def sample(args: PreferenceArguments, prompts: list, results, reward) -> None:
    """Adds the completions that are not there yet to `results`, each with its reward."""
    from transformers import AutoModelForCausalLM

    from dera_peft.commands.common import progress
    from dera_peft.decoding import Request, decode
    from dera_peft.evaluate.rewards import score
    from dera_peft.loading import load_config, load_tokenizer_of
    from dera_peft.prompts import encode
    from dera_peft.sampling import Sampling

    requests = [Request(prompt.index, None, sample) for prompt in prompts for sample in range(args.samples)]
    finished = results.finished(prompts)
    todo = [request for request in requests if request not in finished]
    if not todo:
        return
    sampling = Sampling(args.max_new_tokens, args.temperature, top_p=args.top_p, seed=args.seed)
    tokenizer = load_tokenizer_of(args.model_name_or_path)
    tokens = encode(prompts, tokenizer, load_config(args.model_name_or_path), args.max_new_tokens, args.chat)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype, use_safetensors=True).eval()
    with progress("sampling", len(requests), len(finished)) as advance:
        for completions in decode(model, tokenizer, tokens, todo, sampling, args.batch_size):
            of = [prompts[completion.request.index] for completion in completions]
            columns = {name: [prompt.columns.get(name) for prompt in of] for name in of[0].columns}
            texts = [completion.text for completion in completions]
            rewards = score(reward, [prompt.content for prompt in of], texts, columns)
            results.append(
                {**completion.row(prompt), "reward": value}
                for prompt, completion, value in zip(of, completions, rewards, strict=True)
            )
            advance(len(completions))


def rank(rows: list[dict], samples: int, min_margin: float) -> tuple[list[dict], Counter]:
    """The best of each prompt's finished completions against the worst; and the prompts without a pair, by reason."""
    by_prompt = defaultdict(list)
    for row in rows:
        by_prompt[row["index"]].append(row)
    pairs, unpaired = [], Counter()
    for _, group in sorted(by_prompt.items()):
        # one that was cut would teach to stop in the middle
        group = sorted((row for row in group if row["finish"] == "eos"), key=lambda row: (row["reward"], row["sample"]))
        if len(group) < 2:
            unpaired[UNFINISHED] += 1
        elif group[-1]["reward"] - group[0]["reward"] <= min_margin:
            unpaired[ALIKE] += 1
        else:
            best, worst = group[-1], group[0]
            chat = isinstance(best["prompt"], list)
            pairs.append(
                {
                    "prompt": best["prompt"],
                    "chosen": as_completion(best["completion"], chat),
                    "rejected": as_completion(worst["completion"], chat),
                    "chosen_reward": best["reward"],
                    "rejected_reward": worst["reward"],
                }
            )
    return pairs, unpaired


def as_completion(text: str, chat: bool) -> str | list[dict]:
    return [{"role": "assistant", "content": text}] if chat else text


def write_jsonl(file: Path, rows: list[dict]) -> None:
    """Whole or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, file)


if __name__ == "__main__":
    start(main)
