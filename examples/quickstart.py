"""
The Python API in thirty lines, on what `make demo` made:

    python examples/quickstart.py
"""

import torch
from transformers import AutoTokenizer, TextStreamer

from dera_peft import DeRaModel

ADAPTER = "runs/tiny/dpo"  # its dera.json names the base


def main(adapter: str = ADAPTER) -> None:
    model = DeRaModel.from_pretrained(adapter=adapter)  # also: ("base", adapter="adapter", quantization="nf4")
    tokenizer = AutoTokenizer.from_pretrained(adapter, padding_side="left")
    prompts = ["Before sunrise, Clara the potter wanted to paint a clay jug for an old friend."] * 4
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)

    # one λ per prompt, in one batched pass: the reference, half way, as trained, beyond
    lam = [0.0, 0.5, 1.0, 2.0]
    torch.manual_seed(0)
    texts = model.generate(**inputs, lam=lam, do_sample=True, max_new_tokens=60)
    for strength, text in zip(lam, tokenizer.batch_decode(texts, skip_special_tokens=True), strict=True):
        print(f"λ={strength}: {text}\n")

    # everything else of `generate` as ever: beams, streamers, logits processors, pipelines, ...
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    model.generate(**one, lam=0.5, do_sample=False, max_new_tokens=60, streamer=TextStreamer(tokenizer))

    # the mixture's logits, and each branch's own
    with torch.no_grad():
        output = model(**one, lam=0.5, output_branches=True)
    mixed = 0.5 * output.branch_logits["reference"] + 0.5 * output.branch_logits["aligned"]
    print("mixed logits, largest difference to the formula:", (output.logits - mixed).abs().max().item())


if __name__ == "__main__":
    main()
