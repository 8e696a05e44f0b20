"""
DeRa itself, and not an export, over one GGUF file: llama.cpp loads the base once, and computes it in two contexts, of
which one has the adapter. At each token the logits of both are mixed.

    pip install llama-cpp-python
    dera export --adapter dpo --lambda 1 --format gguf --output gguf
    python examples/two_llama_cpp_contexts.py --base base.gguf --adapter gguf/adapter.gguf --lambda 1.5 --prompt "Hello"

--adapter is exported at λ=1; base.gguf is the base, as llama.cpp's convert_hf_to_gguf.py makes it, in any quantization.
λ=0 and λ=1 need one context, which then is the only one that is computed.
"""

import argparse
import ctypes
import sys
from collections.abc import Iterator

import llama_cpp
import numpy as np
from llama_cpp import Llama


def adapted_context(llama: Llama, adapter: str, scale: float = 1.0) -> llama_cpp.llama_context_p:
    """A further context of a model, over the same weights, with an adapter."""
    context = llama_cpp.llama_init_from_model(llama.model, llama.context_params)
    if not context:
        raise MemoryError("there is no room for another context: give a smaller --context.")
    loaded = llama_cpp.llama_adapter_lora_init(llama.model, adapter.encode())
    if not loaded:
        raise ValueError(f"{adapter!r} is not an adapter of this base; --verbose shows what llama.cpp says.")
    adapters, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded), (ctypes.c_float * 1)(scale)
    if llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales):
        raise ValueError(f"{adapter!r} can't be used in this context; --verbose shows what llama.cpp says.")
    return context


class Context:
    """One sequence of a model."""

    def __init__(self, llama: Llama, context: llama_cpp.llama_context_p):
        self.llama, self.context = llama, context

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def read(self, tokens: list[int]) -> np.ndarray:
        """The logits behind `tokens`, which go on from those that were read before: `[V]`, float64."""
        for start in range(0, len(tokens), self.llama.n_batch):
            part = tokens[start : start + self.llama.n_batch]
            held = (llama_cpp.llama_token * len(part))(*part)  # which the batch points to, and does not keep
            if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(held, len(part))):
                raise ValueError("prompt and completion do not fit into the context: give a larger --context.")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.llama.n_vocab(),)).astype(np.float64)


class TwoContexts:
    """A base and an adapter that decode at any λ."""

    def __init__(self, llama: Llama, adapter: str):
        self.llama = llama
        self.reference, self.aligned = Context(llama, llama.ctx), Context(llama, adapted_context(llama, adapter))

    def generate(
        self, prompt: list[int], lam: float, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[int]:
        """Tokens, up to one that ends a text; the most likely ones at temperature 0."""
        rng = np.random.default_rng(seed)
        branches = [(1 - lam, self.reference), (lam, self.aligned)]
        branches = [(weight, context) for weight, context in branches if weight]
        for _, context in branches:
            context.clear()
        new = prompt
        for _ in range(max_new_tokens):
            logits = sum(weight * context.read(new) for weight, context in branches)
            if temperature:
                logits = logits / temperature + rng.gumbel(size=len(logits))  # its argmax is a sample
            new = [int(logits.argmax())]
            if llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(self.llama.model), new[0]):
                return
            yield new[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="FILE", help="the base, a GGUF file")
    parser.add_argument("--adapter", required=True, metavar="FILE", help="the adapter at λ=1, a GGUF file")
    parser.add_argument("--lambda", dest="lam", type=float, default=1.0, metavar="λ", help="the strength (1)")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="of sampling; 0 is greedy")
    parser.add_argument("--seed", type=int, default=0, metavar="SEED")
    parser.add_argument("--context", type=int, default=4096, metavar="TOKENS", help="of prompt and completion")
    parser.add_argument("--verbose", action="store_true", help="show what llama.cpp says")
    given = parser.parse_args(arguments)
    llama = Llama(given.base, n_ctx=given.context, verbose=given.verbose)
    prompt = llama.tokenize(given.prompt.encode(), special=True)
    tokens: list[int] = []
    for token in TwoContexts(llama, given.adapter).generate(
        prompt, given.lam, given.max_new_tokens, given.temperature, given.seed
    ):
        before = llama.detokenize(tokens, prev_tokens=prompt)
        tokens.append(token)
        sys.stdout.buffer.write(llama.detokenize(tokens, prev_tokens=prompt)[len(before) :])
        sys.stdout.buffer.flush()
    print()


if __name__ == "__main__":
    main()
