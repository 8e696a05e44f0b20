"""The prose of docs/evidence.md."""

INTRODUCTION = """\
# Evidence on a real chat model

Made by `sh configs/smollm2-135m-instruct/run.sh`, whose last command makes this page of the figures in `docs/evidence/`
(`python configs/smollm2-135m-instruct/evidence.py`). Stopped and run again, it goes on where it was; a row whose run is
not there yet says "not measured yet".

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

All in fp32, in part on a CPU and in part on a GPU, [which makes no difference](#on-another-machine); each training's
torch tells which. {versions}. Time by machine: {times}. Of the CPU it is processor time, but by the clock for the first
preferences and training; of the H200 by the clock, where nine commands ran at once, for six minutes in all.

| adapter | β | seed | pairs | steps | loss, first → last | accuracy at the end | torch |
| --- | --- | --- | --- | --- | --- | --- | --- |
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
TOO_SHORT = """\
β made little difference to these trainings: KL ends near 2 at whatever β. Each pair has one label, so that DPO has no
optimum on them (margins grow for as long as it is trained), and 36 steps end where the learning rate lets them. So the
same once more with an optimum: each pair is labelled four times as it was ranked and once the other way round, as by a
labeller who errs once in five, and β decides where the margins stop (`noisy.py`). The adapter of β = 0.1 is decoded at
λ, and others were trained at β/λ."""
OTHERS = """\
"Scaled adapter": the adapter's weights are scaled by λ, and no logits are mixed. "plausible:0.1": tokens that the
aligned model finds less than a tenth as probable as its best are left out before λ is applied. Both minus plain λ's,
paired."""
TEMPERATURE = "Can a lower temperature do what λ does? The same λ at three temperatures, and the reference at each."
EQUAL = """\
Does λ do more than change the length? The difference of each prompt is regressed on its difference in tokens; "at equal
length" is the value of that line where the lengths are the same."""
WISHED = """\
Another adapter, trained in the same way on pairs that are ranked by the wished length. An answer can be too long and
too short, so that this reward has its best λ in between."""
TRAININGS = """\
Four adapters from the same pairs, with other seeds (of the adapter's first values and of the order of the pairs), at
the same λ: mean tone. An interval over prompts knows nothing of this spread."""
SIDE_BY_SIDE = "The first held-out prompt of each topic, in their order: none was picked."
ELSEWHERE = """\
Answers that were decoded, and an adapter that was trained, on an H200 as well (torch 2.11.0+cu130, captured steps), by
`sh configs/smollm2-135m-instruct/elsewhere.sh`. The same: in number of tokens, tone, second tone, repetition and
distinct-2, which are the text's alone. Random numbers are a prompt's own, so that they are those of the CPU there."""
