"""Rules at a token in `generate` and `forward`, against two whole models that go along each completion anew."""

import pytest
import torch
from captured import assert_bit_equal, padded, run, watch
from compatibility import BASES, ENCODER_DECODERS, LINEAR
from scipy import stats
from tiny_bases import adapt, make_base
from transformers import AutoTokenizer
from two_models import RuledModels, combined_by_hand, decode_by_hand, load_two

from dera_peft import DeRaError, DeRaModel

TEXTS = ["The old lighthouse", "A fox crossed the frozen river and", "Rain", "My sister repairs"]
RULES = [
    ("linear", {0: 2.0}),
    ("plausible:0.3", {0: 2.0}),
    ("plausible:0.3", {0: -1.0}),
    ("aad:0.3", {0: 1.0}),
    ("kl:0.3", {0: 3.0}),
    ("kl_total:1.5", {0: 1.5}),
    ("jsd", {0: 2.5}),
    ("linear", {0: 2.0, 4: 0.5, 7: -1.0}),
    ("kl_total:6", {0: -0.5, 3: 2.0}),
    ("plausible:0.2", {0: 1.0}),
    ("kl:0.1", {0: 0.0}),
    ("linear", {0: 0.0}),
]
STEPS = 10
OPTIONS = {"max_new_tokens": STEPS, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}


def arguments(rules) -> dict:
    """Of `plan` and `generate`, for these rules."""
    schedules = [schedule if len(schedule) > 1 else None for _, schedule in rules]
    lam = [schedule[0] for _, schedule in rules]
    return {"lam": lam, "combine": [rule for rule, _ in rules], "lambda_schedule": schedules}


class Setting:
    def __init__(self, base, adapter):
        tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        texts = [TEXTS[place % 4] for place in range(len(RULES))]
        self.inputs = dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))
        self.length = self.inputs["input_ids"].shape[1]
        self.models = load_two(base, adapter)
        self.model = DeRaModel.from_pretrained(base, adapter)

    def ruled(self, rules=RULES, expand: int = 1) -> RuledModels:
        return RuledModels(*self.models, [rule for rule in rules for _ in range(expand)], self.length)

    def rows(self, places: list[int]) -> dict:
        return {name: value[places] for name, value in self.inputs.items()}

    def generate(self, inputs=None, **kwargs) -> list:
        inputs = self.inputs if inputs is None else inputs
        return self.model.generate(**inputs, **{**OPTIONS, **kwargs})[:, self.length :].tolist()


@pytest.fixture(scope="module", params=["tiny", "top"])
def setting(request, tiny_base):
    return Setting(tiny_base, request.getfixturevalue(f"{request.param}_adapter"))


@pytest.fixture(scope="module")
def by_hand(setting) -> list:
    with torch.no_grad():
        tokens = decode_by_hand(setting.ruled(), **setting.inputs, steps=STEPS).tolist()
        plain = setting.ruled([("linear", {0: schedule[0]}) for _, schedule in RULES])
        linear = decode_by_hand(plain, **setting.inputs, steps=STEPS).tolist()
    same = [place for place in range(len(RULES)) if tokens[place] == linear[place]]
    assert set(same) <= {0, 1, 2, 9, 10, 11}, "a rule must decode other texts for a comparison to mean something"
    return tokens


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}, {"use_cache": False}],
    ids=str,
)
def test_all_rules_in_one_batch(setting, by_hand, kwargs):
    assert setting.generate(**arguments(RULES), **kwargs) == by_hand


def test_the_lambda_of_each_token(setting, by_hand):
    asked = arguments(RULES)
    plan = setting.model.plan(asked.pop("lam"), len(RULES), **asked)
    assert plan.num_rows == 2 * len(RULES) - 3, "λ=1 of plausible, and λ=0, need one branch"
    for _ in range(2):  # each call starts anew
        assert setting.generate(lam=plan) == by_hand
        assert plan.token_lambda.shape == (len(RULES), STEPS)
    ruled = setting.ruled()
    with torch.no_grad():
        whole = torch.cat([setting.inputs["input_ids"], torch.tensor(by_hand)[:, :-1]], dim=1)
        ruled(whole, torch.cat([setting.inputs["attention_mask"], torch.ones(len(RULES), STEPS - 1).long()], dim=1))
    for (rule, schedule), found, chosen in zip(RULES, plan.token_lambda.tolist(), ruled.chosen, strict=True):
        if rule.startswith("aad"):
            assert all(lam != lam for lam in found)
        elif rule.startswith("kl_total"):
            assert found == pytest.approx(chosen, abs=0.03)  # 1e-5 of the budget is kept back, and shows at its end
        elif rule in ("linear", "plausible:0.3", "plausible:0.2"):
            of_schedule = [next(v for s, v in sorted(schedule.items(), reverse=True) if t >= s) for t in range(STEPS)]
            assert found == of_schedule
        else:
            assert found[-1] == pytest.approx(chosen[-1], rel=1e-3, abs=1e-6)


def test_one_rule_for_all_is_that_of_each_alone(setting, by_hand):
    for place in (1, 3, 5, 7):
        rule, schedule = RULES[place]
        kwargs = {"lambda_schedule": schedule} if len(schedule) > 1 else {"lam": schedule[0]}
        alone = setting.generate(setting.rows([place]), combine=rule, **kwargs)
        assert alone == [by_hand[place]]


def test_sampling(setting):
    torch.manual_seed(7)
    with torch.no_grad():
        expected = decode_by_hand(setting.ruled(), **setting.inputs, steps=STEPS, sample=True).tolist()
    torch.manual_seed(7)
    assert setting.generate(**arguments(RULES), do_sample=True, top_k=0) == expected


@pytest.mark.parametrize(
    "kwargs",
    [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2, "cache_implementation": "static"}],
    ids=str,
)
def test_beams(setting, kwargs):
    places = [3, 5, 7, 8]
    rules = [RULES[place] for place in places]
    beams = {name: value for name, value in kwargs.items() if name != "cache_implementation"}
    ruled = setting.ruled(rules, kwargs["num_beams"])
    expected = ruled.generate(**setting.rows(places), use_cache=False, **OPTIONS, **beams)[:, setting.length :]
    assert setting.generate(setting.rows(places), **arguments(rules), **kwargs) == expected.tolist()


def test_several_sequences_a_prompt(setting, by_hand):
    places = [4, 8]
    rules = [RULES[place] for place in places]
    torch.manual_seed(3)
    expected = setting.ruled(rules, 3).generate(
        **setting.rows(places), use_cache=False, **{**OPTIONS, "do_sample": True}, top_k=0, num_return_sequences=3
    )[:, setting.length :]
    torch.manual_seed(3)
    sample = {"do_sample": True, "top_k": 0, "num_return_sequences": 3}
    assert setting.generate(setting.rows(places), **arguments(rules), **sample) == expected.tolist()


def test_prompt_lookup(setting):
    ids = setting.inputs["input_ids"][1:2].repeat(1, 2)
    for rule, schedule in (RULES[1], RULES[4]):
        options = {**OPTIONS, "lam": schedule[0], "combine": rule}
        plain = setting.model.generate(ids, **options)
        assert setting.model.generate(ids, **options, prompt_lookup_num_tokens=3).tolist() == plain.tolist()
    for asked in ({"lam": 2.0, "combine": "kl_total:4"}, {"lambda_schedule": {0: 2.0}}):
        with pytest.raises(DeRaError, match=r"(kl_total:4'|lambda_schedule) with prompt_lookup_num_tokens"):
            setting.model.generate(ids, **OPTIONS, **asked, prompt_lookup_num_tokens=3)


@torch.no_grad()
def test_forward(setting):
    """Each place by itself; the loss is that of these logits; all branches where they are asked for."""
    rules = [RULES[place] for place in (0, 1, 2, 3, 4, 6)]
    asked = arguments(rules)
    inputs = {name: value[:6] for name, value in setting.inputs.items()}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    lam, combine = asked["lam"], ["kl:0.3" if rule == "aad:0.3" else rule for rule in asked["combine"]]
    output = setting.model(**inputs, lam=lam, combine=combine, output_branches=True)
    alone = setting.model(**inputs, lam=lam, combine=combine)
    torch.testing.assert_close(output.logits, alone.logits, atol=1e-4, rtol=1e-4)
    for row, rule in enumerate(combine):
        for place in (setting.length - 1, setting.length - 2):
            z_ref, z_aligned = (output.branch_logits[name][row, place] for name in ("reference", "aligned"))
            expected, chosen, _ = combined_by_hand(rule, z_ref, z_aligned, lam[row], 0.0)
            torch.testing.assert_close(
                output.logits[row, place].softmax(-1).double(), expected.softmax(-1), atol=1e-4, rtol=1e-3
            )
            assert float(output.token_lambda[row, place]) == pytest.approx(chosen, rel=1e-3)
    kl = {**inputs, "labels": labels, "lam": 2.0, "combine": "kl:0.3"}
    logits = setting.model(**inputs, lam=2.0, combine="kl:0.3").logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert float(setting.model(**kl).loss) == pytest.approx(float(loss), rel=1e-5)
    with torch.enable_grad(), pytest.raises(DeRaError, match=r"combine='kl:0.3' with labels: the gradient"):
        setting.model(**kl)
    with pytest.raises(DeRaError, match="combine='kl_total:4' depends on the tokens of a completion"):
        setting.model(**inputs, lam=2.0, combine="kl_total:4")
    plan = setting.model.plan(None, 6, lambda_schedule={0: 2.0})
    with pytest.raises(DeRaError, match="lambda_schedule depends on the tokens of a completion"):
        setting.model(**inputs, labels=labels, lam=plan)


def test_linear_is_as_it_is(setting):
    model = setting.model
    for combine in (None, "linear", ["linear"] * len(RULES)):
        plan = model.plan(0.5, len(RULES), combine=combine)
        assert plan.rules is None
        assert plan.structure == model.plan(0.5, len(RULES)).structure
    heads = []
    handle = model.base.lm_head.register_forward_hook(lambda module, args, output: heads.append(output.shape[0]))
    with torch.no_grad():
        linear = model(**setting.inputs, lam=0.5).logits
        scheduled = model(**setting.inputs, lam=model.plan(None, len(RULES), lambda_schedule={0: 0.5, 3: 1.0})).logits
        model(**setting.inputs, lam=0.5, combine="jsd")
    handle.remove()
    assert heads == [len(RULES), len(RULES), 2 * len(RULES)], "one head for both branches where all is linear"
    assert torch.equal(linear, scheduled)


@torch.no_grad()
def test_first_token_frequencies(setting):
    ids = setting.inputs["input_ids"][1:2]
    (z_ref, z_aligned) = (model(ids).logits[0, -1] for model in setting.models)
    exact = combined_by_hand("plausible:0.05", z_ref, z_aligned, 1.7, 0.0)[0].softmax(-1)
    assert 3 < (exact > 0).sum() < len(exact)
    torch.manual_seed(0)
    options = {"lam": 1.7, "combine": "plausible:0.05", "do_sample": True, "top_k": 0, "max_new_tokens": 1}
    tokens = torch.cat([setting.model.generate(ids, **options, num_return_sequences=2000)[:, -1] for _ in range(4)])
    observed = torch.bincount(tokens, minlength=len(exact)).double()
    assert observed[exact == 0].sum() == 0
    possible = exact > 0
    assert stats.chisquare(observed[possible], exact[possible] * len(tokens)).pvalue > 0.001


@pytest.fixture(scope="module")
def llama(device):
    model = DeRaModel.from_peft(adapt(make_base(BASES[0]), target_modules=LINEAR))
    return model, watch(model, device), padded(device)


@pytest.mark.parametrize(
    "rules",
    [RULES[1:5], RULES[5:9], [("linear", {0: 2.0, 5: 0.5})] * 4],
    ids=lambda rules: ",".join(rule for rule, _ in rules),
)
def test_captured(llama, rules):
    model, recorder, inputs = llama
    before = recorder.recordings
    tokens = assert_bit_equal(model, **inputs, **arguments(rules))
    assert recorder.recordings == before + 1
    # other numbers of the same rules replay the same graph
    other = [(rule.replace("0.3", "0.9"), {start: lam * 0.4 for start, lam in at.items()}) for rule, at in rules]
    other = [(rule, at) if not rule.startswith("aad") else ("aad:0.9", {0: 1.0}) for rule, at in other]
    again = run(model, True, **inputs, **arguments(other))[0]
    assert recorder.recordings == before + 1
    assert again.tolist() == run(model, False, **inputs, **arguments(other))[0].tolist() != tokens.tolist()


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "mpt", "jamba", "opt", "t5"])
def test_other_bases(name):
    """A head with soft-capping, a fork at the input, recurrent states, an encoder."""
    base = next(base for base in (*BASES, *ENCODER_DECODERS) if base.model_type == name)
    task = {"task_type": "SEQ_2_SEQ_LM"} if base in ENCODER_DECODERS else {}
    model = DeRaModel.from_peft(adapt(make_base(base), target_modules=base.targets, **task))
    inputs = padded(torch.device("cpu"))
    for rules in (RULES[1:5], RULES[5:9]):
        asked = arguments(rules)
        tokens = model.generate(**inputs, **{**OPTIONS, "max_new_tokens": 5}, **asked)
        both = model.plan(asked["lam"], 4, every_branch=True)
        ids = tokens[:, :1] if base in ENCODER_DECODERS else inputs["input_ids"]
        start, mask, left = ids.shape[1], inputs["attention_mask"], [float((r + ":0").split(":")[1]) for r, _ in rules]
        for step in range(5):
            given = {**inputs, "decoder_input_ids": ids} if base in ENCODER_DECODERS else {"input_ids": ids}
            if base not in ENCODER_DECODERS:
                given["attention_mask"] = mask
                if name not in ("mpt", "jamba"):
                    given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                z = model(**given, lam=both, output_branches=True, use_cache=False).branch_logits
            new = []
            for row, (rule, schedule) in enumerate(rules):
                lam = next(value for at, value in sorted(schedule.items(), reverse=True) if step >= at)
                pair = z["reference"][row, -1], z["aligned"][row, -1]
                logits, _, spent = combined_by_hand(rule, *pair, lam, left[row])
                left[row] -= spent
                new.append(int(logits.argmax()))
            assert tokens[:, start + step].tolist() == new
            ids = torch.cat([ids, torch.tensor(new)[:, None]], dim=1)
            mask = torch.cat([mask, mask.new_ones(4, 1)], dim=1)


def test_what_does_not_fit(setting, tiny_base, tiny_adapter):
    model, inputs = setting.model, setting.rows([0, 1])
    for asked, said in [
        ({"lam": 2.0, "combine": "aad:0.1"}, "lam=2: combine='aad:0.1' knows no λ"),
        ({"combine": "aad:0.1", "lambda_schedule": {0: 1.0}}, "combine='aad:0.1' knows no λ"),
        ({"lam": 0.5, "lambda_schedule": {0: 1.0}}, "lam=0.5: lambda_schedule gives λ"),
        ({"lam": 2.0, "combine": ["jsd"]}, "combine has 1 entries, and the batch 2 sequences"),
        ({"lam": 2.0, "combine": "nonsense"}, "is not a rule"),
        ({"lam": model.plan(2.0, 2), "combine": "jsd"}, "give them to plan"),
        (
            {"lam": 2.0, "combine": "kl_total:1", "num_beams": 2, "use_cache": False},
            "kl_total:1' with beams and use_cache=False",
        ),
    ]:
        with pytest.raises(DeRaError, match=said):
            setting.generate(inputs, **asked)
    weights = DeRaModel.from_pretrained(tiny_base, tiny_adapter, mixing="weights")
    several = DeRaModel.from_pretrained(tiny_base, adapters={"a": tiny_adapter, "b": tiny_adapter})
    for asked in ({"combine": "jsd", "lam": 1.0}, {"lambda_schedule": {0: 1.0}}):
        with pytest.raises(DeRaError, match='needs the logits of two branches, which mixing="weights"'):
            weights.generate(**inputs, **OPTIONS, **asked)
        with pytest.raises(DeRaError, match=r"for one aligned branch, and the model has 2: \['a', 'b'\]"):
            several.generate(**inputs, **OPTIONS, **asked)
    assert model.plan(None, 2, combine=["aad:0.1", "linear"]).lam.tolist() == [[1.0], [1.0]]
