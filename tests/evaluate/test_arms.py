"""The arms of a sweep: rules against two whole models, and what an added arm makes anew."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from two_models import load_two

from dera_peft import DeRaError
from dera_peft.decoding import decoder
from dera_peft.evaluate import SweepConfig, results, sweep
from dera_peft.evaluate.arms import by_model, make_arms
from dera_peft.model import DeRaModel

PROMPTS = ["Rain fell on the market", "A fox crossed"]
RULES = [
    {"combine": "aad:0.3"},
    {"combine": "plausible:0.30", "lambdas": [2, 0]},
    {"combine": "jsd", "lambdas": [3]},
    {"lambda_schedule": {0: 2.0, 2: 0.5}, "name": "falling"},
    {"particles": 3, "lambdas": [0.5]},
]


@pytest.fixture(scope="module")
def swept(tiny_base, tiny_adapter, tmp_path_factory):
    """Plain λ, and then the same folder with an arm of each rule: both results, and what the second run did."""
    folder = tmp_path_factory.mktemp("arms")
    did: dict[str, list] = {"loaded": [], "decoded": []}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_sweep", "plot_pareto", "write_report"):
            patch.setattr(results, name, lambda *arguments, **keywords: None)
        common = {"prompts": PROMPTS, "rewards": ["length", "perplexity"], "lambdas": [0, 1], "samples": 1,
                  "max_new_tokens": 5, "base": str(tiny_base), "adapter": str(tiny_adapter),
                  "output_dir": str(folder)}  # fmt: skip
        plain = sweep(**common)
        load, decode = DeRaModel.from_source, decoder.decode

        def noted(model, tokenizer, tokens, requests, *rest, **options):
            did["decoded"] += requests
            return decode(model, tokenizer, tokens, requests, *rest, **options)

        patch.setattr(
            DeRaModel, "from_source", lambda *args, **options: did["loaded"].append(1) or load(*args, **options)
        )
        patch.setattr(decoder, "decode", noted)
        more = sweep(**common, arms=RULES)
    return plain, more, did, folder


def test_an_added_arm_decodes_nothing_else_again_and_shares_the_model(swept):
    plain, more, did, _ = swept
    assert (len(did["loaded"]), more.reused, len(plain.rows)) == (1, 4, 4)
    assert len(did["decoded"]) == len(PROMPTS) * 6
    old = {key(row): row["completion"] for row in plain.rows}
    assert old.items() <= {key(row): row["completion"] for row in more.rows}.items()
    assert list(dict.fromkeys(row["arm"] for row in more.rows)) == [
        "logits", "aad:0.3", "plausible:0.3", "jsd", "falling", "3 particles"
    ]  # fmt: skip
    assert {row["lambda"] for row in more.rows if row["arm"] in ("aad:0.3", "falling")} == {None}


def key(row: dict) -> tuple:
    return row["arm"], row["prompt_index"], row["lambda"], row["sample"]


def test_rules_are_measured_as_two_whole_models_say(swept, tiny_base, tiny_adapter):
    """KL is that of what was drawn from, token by token, worked out from two models' logits."""
    _, more, _, folder = swept
    two, tokenizer = load_two(tiny_base, tiny_adapter), AutoTokenizer.from_pretrained(tiny_base)
    log_z = {key(row): row["log_z"] for row in read(folder / "parts/completions.0.jsonl") if "log_z" in row}
    seen = set()
    for row in more.rows:
        prompt, ids = tokenizer(row["prompt"])["input_ids"], row["token_ids"]
        with torch.no_grad():
            z_ref, z_aligned = (
                m(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double() for m in two
            )
        log_ref, log_aligned = z_ref.log_softmax(-1), z_aligned.log_softmax(-1)
        kept = log_aligned >= log_aligned.amax(-1, keepdim=True) + math.log(0.3)
        of_tokens = range(len(ids)), ids
        lam = torch.full((len(ids), 1), 1.0 if row["lambda"] is None else row["lambda"], dtype=torch.double)
        if row["arm"] == "falling":
            lam = torch.tensor([[2.0], [2.0], [0.5], [0.5], [0.5]], dtype=torch.double)[: len(ids)]
        if row["arm"] == "jsd":
            middle = ((log_ref.exp() + log_aligned.exp()) / 2).log()
            apart = [(p.exp() * (p - middle)).sum(-1, keepdim=True) for p in (log_ref, log_aligned)]
            lam = lam * sum(apart) / 2 / math.log(2)
        mixed = log_aligned - log_ref if row["arm"] == "aad:0.3" else (1 - lam) * log_ref + lam * log_aligned
        if row["arm"] in ("aad:0.3", "plausible:0.3"):
            mixed = mixed.masked_fill(~kept, -math.inf)
            assert kept[of_tokens].all()
            assert kept.sum() < kept.numel(), "something is left out"
        log_p = mixed.log_softmax(-1)
        kl = torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_ref), 0.0).sum().item()
        if row["arm"] == "3 particles":
            kl = 0.5 * (log_aligned[of_tokens] - log_ref[of_tokens]).sum().item() - log_z[key(row)]
        assert row["kl"] == pytest.approx(kl, abs=2e-3), row["arm"]
        perplexity = math.exp(-log_ref[of_tokens].mean().item())
        assert row["rewards"]["perplexity"] == pytest.approx(perplexity, rel=1e-3)
        if row["arm"] in ("jsd", "falling"):
            assert row["token_lambda"] == pytest.approx(lam[:, 0].tolist(), abs=1e-4)
        seen.add(row["arm"])
    assert len(seen) == 6


def test_the_best_of_all_arms_says_how_it_is_decoded(swept):
    _, more, _, folder = swept
    assert more.best is not None
    assert more.best.count == 8
    option = {
        "aad:0.3": "--combine aad:0.3", "plausible:0.3": "--combine plausible:0.3 --lambda", "jsd": "--combine jsd",
        "falling": "--lambda-schedule 0:2,2:0.5", "3 particles": "--particles 3 --lambda 0.5", "logits": "--lambda",
    }  # fmt: skip
    assert option[more.best.best.arm] in more.best.use
    assert more.best.use.startswith("dera generate --base ")
    lines = (folder / "summary.csv").read_text().splitlines()
    assert any(line.startswith("aad:0.3,,2,2,") for line in lines), "no λ in the table"
    assert more.recommendation.lam in (0, 1), "β* is computed of plain λ"


def test_arms_of_one_adapter_and_mixing_share_a_model(tiny_base, tiny_adapter):
    config = SweepConfig(
        prompts=PROMPTS, base=str(tiny_base), adapter=str(tiny_adapter), lambdas=[0, 1],
        arms=[{"mixing": "weights"}, {"combine": "jsd"}, {"adapter": str(tiny_adapter), "lambdas": [1, 2]},
              {"adapter": str(tiny_adapter), "combine": "jsd"}],
    )  # fmt: skip
    arms = make_arms(config)
    other = str(tiny_adapter)
    assert [[arm.name for arm in group] for group in by_model(arms)] == [
        ["logits", "jsd", other, f"{other}, jsd"], ["weights"]
    ]  # fmt: skip
    assert [arm.lambdas for arm in arms] == [(0, 1), (0, 1), (0, 1), (1, 2), (1,)]
    assert len({arm.run for arm in arms}) == 3, "the same adapter, named twice, gives the same completions"
    assert arms[1].use(0.5).startswith("dera export --base ")
    with pytest.raises(DeRaError, match=r"temperature=0\.5: the exact mixture is sampled at temperature 1"):
        make_arms(SweepConfig(prompts=PROMPTS, base=str(tiny_base), adapter=other, temperature=0.5,
                              arms=[{"particles": 2}]))  # fmt: skip


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]
