"""The prose of docs/evidence.md."""

INTRODUCTION = """\
# Evidence on a real chat model

Made by `sh configs/smollm2-135m-instruct/run.sh`, whose last command makes this page of the figures in `docs/evidence/`
(`python configs/smollm2-135m-instruct/evidence.py`). Stopped and run again, it goes on where it was; a row that is not
there yet says "not measured yet".

The model is SmolLM2-135M-Instruct: real, but small, and from a file in four bits, written out in fp32. 240 prompts on
12 topics are answered four times each by the model itself at temperature 0.7; of each prompt the answer with the best
tone is chosen and the one with the worst is rejected: {pairs} pairs (mean tone of all answers: {mean_reward}). DPO
trains a LoRA adapter of rank 16 on them for three epochs, β = 0.1. What is measured below is measured on 120 other
prompts, one answer each, of 64 tokens at most, at temperature 0.7. All ways to decode draw the same random numbers, and
are compared prompt by prompt; intervals are 95 %, bootstrap over prompts. None is corrected for there being many.

- **tone**, the proxy that was trained on: VADER's compound score, mean over an answer's sentences, from -1 to 1.
- **relevance**, the gold that was not: how much more probable the unaligned model finds the question after it has read
  the answer, in nats a token. 0 is an answer to any question.
- **second tone**: TextBlob's polarity, from -1 to 1, held out too: another word list than VADER's.
- **wished length**: 0 for an answer of 10 to 30 words, and -1 else, as in the paper's first experiment.

KL is that of the distributions at temperature 1, along answers sampled at 0.7. Perplexity is under the reference, mean
over answers.

Two cores of an AMD EPYC without AVX-512, fp32: {hours} hours so far, of
processor time (of the first preferences and the first training by the clock); {versions}.

| adapter | β | seed | pairs | steps | loss, first → last | accuracy at the end |
| --- | --- | --- | --- | --- | --- | --- |
{training}
"""
CURVE = "λ = 0 is the model as it was, λ = 1 the adapter as trained. The bars are 95 %."
PROXY_AND_GOLD = """\
Whoever optimises a proxy too far loses what it stood for. With one adapter that can be read off the dial, without any
retraining: where the trained reward still rises, and the held-out one falls."""
RETRAINING = """\
By the theory, to decode at λ is to have trained at β/λ. One more adapter was trained for each, from the same pairs and
the same seed, and decoded as trained. The rows of λ = 1 are trainings that differ from the first one in nothing but
their seed: so far two trainings are apart anyway."""
OTHERS = """\
"Scaled adapter": the adapter's weights are scaled by λ, and no logits are mixed. "plausible:0.1": tokens that the
aligned model finds less than a tenth as probable as its best are left out before λ is applied. Both minus plain λ's,
paired."""
TEMPERATURE = "Can a lower temperature do what λ does? The same λ at three temperatures, and the reference at each."
EQUAL = """\
Does λ do more than change the length? The difference of each prompt is regressed on its difference in tokens; "at equal
length" is the value of that line where the lengths are the same."""
WISHED = "Another adapter, trained in the same way on pairs that are ranked by the wished length."
TRAININGS = """\
Four adapters from the same pairs, with other seeds (of the adapter's first values and of the order of the pairs), at
the same λ: mean tone. An interval over prompts knows nothing of this spread."""
SIDE_BY_SIDE = "The first held-out prompt of each topic, in their order: none was picked."
