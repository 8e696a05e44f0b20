"""The model card (README.md) of an adapter's folder: what it stands on, how it was trained, and its use at any λ."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from dera_peft.checkpoint.record import Record
from dera_peft.engine.names import REFERENCE
from dera_peft.files import write_atomically

FILE_NAME = "README.md"
PROMPT = "Once upon a time"
METHODS = {"dpo": "aligned by DPO", "sft": "fine-tuned on texts (SFT)", "distill": "distilled from DeRa at one λ"}
CARD = """{head}
# {title}

{what}

{facts}

## Use at any λ

λ=0 is the reference, λ=1 the model as it was trained; between them lies a weaker alignment, beyond 1 a stronger
one.{beta}

```bash
{command}
```

```python
{python}
```

The base is not in this folder. With PEFT alone the adapter is what λ=1 is. λ mixes the logits of the two models at each
token: decoding-time realignment (DeRa, [arXiv 2402.02992](https://arxiv.org/abs/2402.02992)).
"""
EXPORTED = """{head}
# {what} at {lam}

Made by `dera export` from {sources}: {made}, whose weights are scaled once.

It is an approximation of decoding-time realignment (DeRa, arXiv 2402.02992), which mixes the models' logits; here their
weights are mixed.

{fit}

{facts}

## Use

{use}

Its λ is fixed{but}.{command}
"""
WHAT = {
    "peft": ("A LoRA adapter exported", "a plain LoRA adapter for the base alone"),
    "safetensors": ("A model exported", "the base with a LoRA adapter merged into it"),
    "gguf": ("A LoRA adapter for llama.cpp, exported", "a LoRA adapter for the base alone, as a GGUF file"),
}
USE = {
    "peft": """Any program that loads LoRA adapters takes it as it is:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, {folder!r})
```""",
    "safetensors": """Any program that loads the base takes it in its place:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({folder!r})
```""",
    "gguf": """With the base as a GGUF file (llama.cpp's `convert_hf_to_gguf.py` makes it):

```bash
llama-server --model base.gguf --lora adapter.gguf
llama-server --model base.gguf --lora-scaled adapter.gguf:0.5
```

The second command scales the weights once more, here by 0.5. For Ollama, put base.gguf beside the Modelfile:
`ollama create NAME -f Modelfile`.""",
}


def write_card(record: Record, folder: str | os.PathLike, name: str | None = None) -> None:
    """The card of a folder with a `dera.json`, in place of the one that PEFT writes; `name` is its hub id, if any."""
    folder, training = Path(folder), record.training
    named = str(folder) if name is None else name
    aligned = [branch for branch in record.branches if branch != REFERENCE]
    beta = training.get("beta")
    text = CARD.format(
        head=_head(record.base, ["lora", "dera", *filter(None, [training.get("method")])]),
        title=folder.resolve().name if name is None else name,
        what=f"{'A LoRA adapter' if len(aligned) == 1 else 'LoRA adapters'} over `{record.base}`"
        + (f", {METHODS[training['method']]}." if training.get("method") in METHODS else "."),
        facts=_table(_facts(record, folder)),
        beta=f" With a β of {beta:g}, λ stands for a training with β/λ: λ=0.5 for {beta / 0.5:g}." if beta else "",
        command=_command(record, named, aligned),
        python=_python(record, folder, named, aligned),
    )
    write_atomically(folder / FILE_NAME, text)


def write_export_card(
    folder: Path, target: Path, record: Record | None, base: str, lam: str, sources: Mapping[str, float], fit: str,
    format: str,
) -> None:  # fmt: skip
    """
    The card of an export.

    Args:
        folder: that it is written into.
        target: where it will lie.
        record: of the model that is exported, if it was loaded from files.
        base: its name.
        lam: λ in words.
        sources: adapter -> the factor that its weights are multiplied by.
        fit: how far it is from DeRa, in words.
        format: of `export.Format`.
    """
    facts = {"base": f"`{base}`"} if record is None else _facts(record)
    what, made = WHAT[format]
    text = EXPORTED.format(
        head=_head(base, ["lora", "dera"], "transformers" if format == "safetensors" else "peft"),
        lam=lam,
        sources=" and ".join(f"`{name}` (times {factor:g})" for name, factor in sources.items()),
        fit=fit,
        facts=_table(facts),
        what=what,
        made=made,
        use=USE[format].format(base=base, folder=str(target)),
        but=", but for llama.cpp's own scale" if format == "gguf" else "",
        command=_command_of_sources(record),
    )
    write_atomically(folder / FILE_NAME, text)


def _head(base: str, tags: Sequence[str], library: str = "peft") -> str:
    """The hub's metadata, which name a base of the hub alone."""
    of_hub = None if os.path.isdir(base) or not base else base
    data = ModelCardData(base_model=of_hub, library_name=library, pipeline_tag="text-generation", tags=list(tags))
    return f"---\n{data.to_yaml()}\n---\n"


def _table(facts: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items())])


def _facts(record: Record, folder: Path | None = None) -> dict[str, str]:
    """What is known of base, reference and training, by its heading; with paths from `folder`, of what is in it."""
    training = record.training
    under = [Path(record.adapters[name]) for name in record.branches[REFERENCE]]
    if folder is not None:
        under = [each.relative_to(folder) if each.is_relative_to(folder) else each for each in under]
    rows = training.get("rows")
    facts = {
        "base": f"`{record.base}`" + (f" at `{record.base_revision}`" if record.base_revision else ""),
        "reference (λ=0)": "the base" + "".join(f" with the adapter `{adapter}`" for adapter in under),
        **_distilled(training),
        "β": None if training.get("beta") is None else f"{training['beta']:g}",
        "loss": ", ".join(training["loss_type"]) if isinstance(training.get("loss_type"), list) else None,
        "data": training.get("dataset"),
        "rows": str(rows["total"]) if isinstance(rows, dict) and "total" in rows else None,
        "steps": training.get("steps"),
        "base in training": "quantized to " + training["quantization"] if training.get("quantization") else None,
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def _distilled(training: Mapping[str, Any]) -> dict[str, str]:
    """What is known of a distilled adapter's teacher, by its heading."""
    if training.get("method") != "distill":
        return {}
    scaled, distilled = (training["kl"][name] for name in ("scaled", "distilled"))
    return {
        "distilled from": f"DeRa at λ={training['lambda']:g}, which it is at λ=1",
        "KL(DeRa ‖ this adapter)": f"{distilled['kl']:.4g} nats a token ({distilled['tokens']} held-out tokens)",
        "KL(DeRa ‖ the adapter scaled by λ)": f"{scaled['kl']:.4g} nats a token",
    }


def _command(record: Record, folder: str, aligned: Sequence[str]) -> str:
    if len(aligned) > 1:
        weights = ",".join(f"{name}={1 / len(aligned):.2g}" for name in aligned)
        return f"dera export --adapter {shlex.quote(folder)} --lambda {weights} --output mixed  # one λ for each"
    quantization = record.training.get("quantization")
    options = "" if quantization is None else f" --quantization {quantization}"
    return f"dera generate --adapter {shlex.quote(folder)}{options} --lambda 0,0.5,1 --prompt {shlex.quote(PROMPT)}"


def _command_of_sources(record: Record | None) -> str:
    """How the adapter that an export was made of is decoded at any λ; nothing where that is not known."""
    if record is None:
        return ""
    own = {branch: record.adapters[names[-1]] for branch, names in record.branches.items() if branch != REFERENCE}
    under = [record.adapters[name] for name in record.branches[REFERENCE]]
    options = [("--base", record.base), *(("--reference", adapter) for adapter in under)]
    if len(own) == 1:
        (adapter,) = own.values()
        options = [] if Record.is_in(adapter) else options
        options += [("--adapter", adapter)]
        command, end = "dera generate", f"--lambda 0,0.5,1 --prompt {shlex.quote(PROMPT)}"
    else:
        options += [("--adapters", f"{name}={adapter}") for name, adapter in own.items()]
        command, end = "dera export", f"--lambda {','.join(f'{name}=0.5' for name in own)} --output another"
    words = [command, *(f"{option} {shlex.quote(value)}" for option, value in options), end]
    return f" At any other λ use what it was made of:\n\n```bash\n{' '.join(words)}\n```"


def _python(record: Record, folder: Path, named: str, aligned: Sequence[str]) -> str:
    quantization = record.training.get("quantization")
    arguments = f"adapter={named!r}" + ("" if quantization is None else f", quantization={quantization!r}")
    has_tokenizer = any(folder.glob("tokenizer*.json"))
    lam = "0.5" if len(aligned) == 1 else repr(dict.fromkeys(aligned, round(1 / len(aligned), 2)))
    return f"""from transformers import AutoTokenizer

from dera_peft import DeRaModel

model = DeRaModel.from_pretrained({arguments})
tokenizer = AutoTokenizer.from_pretrained({(named if has_tokenizer else record.base)!r})
inputs = tokenizer({PROMPT!r}, return_tensors="pt").to(model.device)
tokens = model.generate(**inputs, lam={lam}, max_new_tokens=64)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))"""
