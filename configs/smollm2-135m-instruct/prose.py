"""The prose of docs/evidence.md."""

INTRODUCTION = """\
# Evidence on a real chat model

Made by `sh configs/smollm2-135m-instruct/run.sh`, whose last command makes this page of the figures in `docs/evidence/`
(`python configs/smollm2-135m-instruct/evidence.py`). Stopped and run again, it goes on where it was; a row whose run is
not there yet says "not measured yet".

The model is SmolLM2-135M-Instruct: real, but small, and from a file in four bits, written out in fp32. 240 prompts on
12 topics are answered four times each by the model itself at temperature 0.7, in 80 tokens at most. Of each prompt the
answer with the best tone is chosen and the one with the worst is rejected, if both came to an end and are over 0.1
apart: {pairs} pairs, of short answers therefore (mean tone of all answers: {mean_reward}). DPO trains a LoRA adapter of
rank 16 on them for three epochs, β = 0.1. What is measured below is measured on 120 other prompts, one answer each, of
64 tokens at most, at temperature 0.7 unless another is named. All ways to decode draw the same random numbers, and are
compared prompt by prompt; intervals are 95 %, bootstrap over prompts. None is corrected for there being many, and one
that ends next to zero tells little either way.

- **tone**, the proxy that was trained on: VADER's compound score, mean over an answer's sentences, from -1 to 1.
- **relevance**, the gold that was not: how much more probable the unaligned model finds the question after it has read
  the answer, in nats a token. 0: the answer tells nothing of its question.
- **second tone**: TextBlob's polarity, from -1 to 1, held out too: another word list than VADER's.
- **wished length**: 0 for an answer of 10 to 30 words, and -1 else, as in the paper's first experiment.

KL is the sum over an answer's tokens of the KL of the distributions at temperature 1. Perplexity is under the
reference, mean over answers.

All in fp32, in part on a CPU and in part on a GPU, which [made no difference where both were
run](#on-another-machine); each training's torch tells which (2.13: the CPU). {versions}. Time by machine: {times}; of
the CPU it is processor time, but by the clock for the first preferences and training; of the H200 the sum over
commands, up to nine of which ran at once.

| adapter | β | seed | pairs | steps | loss, first five steps → last | accuracy, last step | torch |
| --- | --- | --- | --- | --- | --- | --- | --- |
{training}
"""
CURVE = "λ = 0 is the model as it was, λ = 1 the adapter as trained. The bars are 95 %."
PROXY_AND_GOLD = """\
Whoever optimises a proxy too far loses what it stood for. With one adapter that can be read off the dial, without any
retraining: the trained reward rises over most of it, and the held-out one falls over all of it. Below each λ is
compared with the adapter as it was trained."""
RETRAINING = """\
By the theory, to decode at λ is to have trained at β/λ. One more adapter was trained for each, from the same pairs and
the same seed, and decoded as trained. The rows of λ = 1 are trainings that differ from the first one in nothing but
their seed: that is how far apart two trainings are anyway."""
TOO_SHORT = """\
β made little difference to these trainings: their KL is {kl}, where λ gives {dial}. Each pair has one label, so that
DPO has no finite optimum on them (margins grow for as long as it is trained), and 36 steps end where the learning
rate lets them. So once more with an optimum: each pair is labelled four times as it was ranked and once the other way
round, as by a labeller who errs once in five (`noisy.py`). There DPO's margin is log 4 = 1.39 whatever β is, and β
decides how far the policy moves for it: by log 4 / β. The steps are of 4 pairs in place of 8, 117 of them at β = 0.1
and twice as many at half of it. Each of the two adapters is decoded at the λ that stands for the other.

Here β tells. The margins that they reached on these pairs: {margins}. Divided by β, and multiplied by λ, that is how
far log π/π_ref of the better answer has moved against the worse: {nats}. β/λ speaks of optima; these four are in the
order of how far the policy was moved, which λ multiplies."""
OTHERS = """\
"Scaled adapter": the adapter's weights are scaled by λ, and no logits are mixed. "plausible:0.1": tokens that the
aligned model finds less than a tenth as probable as its best are left out before λ is applied. Both minus plain λ's,
paired."""
TEMPERATURE = "Can a lower temperature do what λ does? The same λ at three temperatures, and the reference at each."
EQUAL = """\
Does λ do more than change the length? The difference of each prompt is regressed on its difference in tokens; "at equal
length" is the value of that line where the lengths are the same. Most answers end at the limit of 64 tokens whatever λ
is, so that length could change but little here."""
WISHED = """\
Another adapter, trained in the same way on pairs that are ranked by the wished length. An answer can be too long and
too short, so that this reward has its best λ in between."""
TRAININGS = """\
Four adapters from the same pairs, with other seeds (of the adapter's first values and of the order of the pairs), at
the same λ: mean tone. An interval over prompts knows nothing of this spread; the largest of the four standard errors
over prompts stands beside it."""
SIDE_BY_SIDE = "The first held-out prompt of each topic, in their order: none was picked."
ELSEWHERE = """\
What was decoded here, and what was trained and decoded here, once more on an H200 (torch 2.11.0+cu130, captured steps):
`sh configs/smollm2-135m-instruct/elsewhere.sh`. The same: in number of tokens, tone, second tone, repetition and
distinct-2, which are the text's alone. Random numbers belong to a prompt, and are the same there as on the CPU."""
