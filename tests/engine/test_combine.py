"""The rules at a token: by hand on rows of a few tokens, and their bounds on many."""

import math

import pytest
import torch

from dera_peft import DeRaError
from dera_peft.engine.combine import FUNCTIONS, divergence, log_probs, mix
from dera_peft.engine.rules import Rule, read_rule, read_rules, read_schedule

INF = math.inf
# p_ref = (1/2, 1/4, 1/4, 0), p_aligned = (1/8, 3/4, 1/8, 0)
REFERENCE = torch.tensor([0.5, 0.25, 0.25, 0.0]).log()
ALIGNED = torch.tensor([0.125, 0.75, 0.125, 0.0]).log()


def combine(rule: str, lam: float, reference=REFERENCE, aligned=ALIGNED) -> tuple[list[float], float]:
    """The probabilities, and λ."""
    read = read_rule(rule)
    rows = [each.reshape(1, -1) for each in (reference, aligned)]
    logits, chosen = FUNCTIONS[read.name](*rows, torch.tensor([lam]), torch.tensor([read.value or 0.0]))
    assert not logits.isnan().any()
    return logits[0].softmax(-1).tolist(), float(chosen)


@pytest.mark.parametrize(
    ("rule", "lam", "expected"),
    [
        ("linear", 0.0, [0.5, 0.25, 0.25, 0]),
        ("linear", 1.0, [0.125, 0.75, 0.125, 0]),
        # p_ref^-1 p_aligned^2 = 1/32, 9/4, 1/16
        ("linear", 2.0, [1 / 75, 72 / 75, 2 / 75, 0]),
        # p_ref^2 p_aligned^-1 = 2, 1/12, 1/2
        ("linear", -1.0, [24 / 31, 1 / 31, 6 / 31, 0]),
        ("plausible:0.2", 2.0, [0, 1, 0, 0]),  # 1/8 < 0.2 · 3/4
        ("plausible:0.15", 1.0, [0.125, 0.75, 0.125, 0]),
        ("plausible:0.6", -1.0, [1, 0, 0, 0]),  # of the reference's own: 1/4 < 0.6 · 1/2
        ("plausible:0.5", -1.0, [24 / 31, 1 / 31, 6 / 31, 0]),
        ("plausible:1", 0.0, [0, 1, 0, 0]),
        # p_aligned / p_ref = 1/4, 3, 1/2
        ("aad:0.1", 1.0, [1 / 15, 12 / 15, 2 / 15, 0]),
        ("aad:0.5", 1.0, [0, 1, 0, 0]),
        ("kl:0", 2.0, [0.5, 0.25, 0.25, 0]),
        ("kl:inf", 2.0, [1 / 75, 72 / 75, 2 / 75, 0]),
    ],
)
def test_by_hand(rule, lam, expected):
    found, _ = combine(rule, lam)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=1e-5)


def test_jsd_by_hand():
    # means (5/16, 1/2, 3/16)
    of_ref = 0.5 * math.log(8 / 5) + 0.25 * math.log(1 / 2) + 0.25 * math.log(4 / 3)
    of_aligned = 0.125 * math.log(2 / 5) + 0.75 * math.log(3 / 2) + 0.125 * math.log(2 / 3)
    _, lam = combine("jsd", 3.0)
    assert lam == pytest.approx(3 * (of_ref + of_aligned) / 2 / math.log(2), rel=1e-5)
    assert combine("jsd", 3.0, ALIGNED, ALIGNED)[1] == pytest.approx(0, abs=1e-6)


def test_kl_by_hand():
    """Halves of two tokens: KL(λ) is ln 2 minus the entropy of sigmoid(λ·d)."""
    reference, aligned = torch.zeros(2), torch.tensor([0.0, 2.0])
    p = 1 / (1 + math.exp(-2 * 0.7))
    bound = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    for lam in (5.0, -5.0):
        _, chosen = combine(f"kl:{bound}", lam, reference, aligned)
        assert chosen == pytest.approx(math.copysign(0.7, lam), rel=1e-4)
    assert combine(f"kl:{bound}", 0.6, reference, aligned)[1] == pytest.approx(0.6)
    assert combine(f"kl:{bound}", 0.0, reference, aligned)[1] == 0


def random_rows(rows: int = 400, tokens: int = 257) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference, noise = torch.randn(2, rows, tokens, generator=generator)
    scale = torch.logspace(-2, 1, rows)[:, None]
    lam = torch.linspace(-4, 4, rows)[torch.randperm(rows, generator=generator)]
    return 3 * reference, 3 * reference + scale * noise, lam


@pytest.mark.parametrize("bound", [0.0, 1e-4, 0.05, 2.0])
def test_the_bound_holds_at_every_token_and_is_reached(bound):
    reference, aligned, lam = random_rows()
    logits, chosen = FUNCTIONS["kl"](reference, aligned, lam, torch.full_like(lam, bound))
    for dtype in (torch.float32, torch.float64):
        log_p, log_ref = logits.to(dtype).log_softmax(-1), reference.to(dtype).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_ref)).sum(-1)
        assert (kl <= bound).all() or bound == 0
    assert (chosen.abs() <= lam.abs()).all()
    assert (chosen * lam >= 0).all()
    cut = chosen != lam
    assert cut.any()
    assert bound == 0 or not cut.all()
    torch.testing.assert_close(kl[cut], torch.full_like(kl[cut], bound), atol=3e-6, rtol=1e-4)


@pytest.mark.parametrize("rule", ["plausible:1e-30", "kl:1e9", "kl_total:inf"])
def test_a_limit_is_linear(rule):
    reference, aligned, lam = random_rows(50)
    read = read_rule(rule)
    found, chosen = FUNCTIONS[read.name](reference, aligned, lam, torch.full_like(lam, read.value))
    assert torch.equal(found, FUNCTIONS["linear"](reference, aligned, lam, lam)[0])
    assert torch.equal(chosen, lam)
    torch.testing.assert_close(found, (reference + lam[:, None] * (aligned - reference)), atol=1e-4, rtol=1e-4)


LOWEST = torch.finfo(torch.bfloat16).min


@pytest.mark.parametrize("never", [-INF, LOWEST])
@pytest.mark.parametrize("rule", ["linear", "plausible:0.1", "plausible:1", "aad:0.1", "kl:0.1", "kl:10", "jsd"])
def test_impossible_tokens(rule, never):
    """In one branch, in the other, in both: no NaN, and at λ between and beyond 0 and 1 none of them is drawn."""
    reference = torch.tensor([never, 0.5, never, 1.0, 0.0])
    aligned = torch.tensor([4.0, never, never, 0.0, 1.0])
    for lam in (1.0,) if rule.startswith("aad") else (-1.0, 0.5, 2.0):
        found, chosen = combine(rule, lam, reference, aligned)
        assert sum(found) == pytest.approx(1)
        assert found[2] == 0
        assert chosen == 0 or found[:2] == [0, 0]
    if not rule.startswith(("aad", "kl:0.1", "jsd")):
        assert combine(rule, 0.0, reference, aligned)[0][0] == 0
        # the reference's zero has no part at λ=1
        assert (combine(rule, 1.0, reference, aligned)[0][0] > 0) == (rule != "kl:10")


def test_divergence_of_zeros():
    log_p, log_q = log_probs(torch.tensor([[0.0, -INF, LOWEST]])), log_probs(torch.tensor([[0.0, 0.0, -INF]]))
    assert float(divergence(log_p, log_q)) == pytest.approx(math.log(2))
    assert float(divergence(log_q, log_p)) == INF


def test_texts():
    for text in ("linear", "plausible:0.1", "aad:0.05", "kl:0.0512345678901", "kl_total:5", "jsd"):
        assert str(read_rule(text)) == text
        assert read_rule(str(read_rule(text))) == read_rule(text)
    assert read_rule(" kl : 5e-2 ") == Rule("kl", 0.05)
    schedule = ((0, 2.0), (20, 1.0))
    for form in ({0: 2.0, 20: 1.0}, {20: 1, 0: 2}, "0:2.0,20:1.0", schedule, [[0, 2], [20, 1.0]]):
        assert read_schedule(form) == schedule
        assert read_rules(None, form, 3).schedules == (schedule,) * 3
    assert read_rules(None, [None, {0: 1.0}], 2).schedules == ((), ((0, 1.0),))
    assert read_rules(["linear"] * 2, [(), ()], 2) is None


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("kll:0.1", "combine='kll:0.1' is not a rule; there are linear, plausible:α, aad:α, kl:ε, kl_total:E, jsd"),
        ("plausible", r"write plausible:α with α in \(0, 1\]"),
        ("plausible:0", r"α in \(0, 1\]"),
        ("aad:1.5", r"α in \(0, 1\]"),
        ("kl:-0.1", "ε at least 0 nats"),
        ("kl:nan", "ε at least 0 nats"),
        ("kl_total:x", "E at least 0 nats"),
        ("jsd:1", "jsd takes no number"),
        (0.5, "combine=0.5 is not a rule"),
    ],
)
def test_a_rule_that_is_none(rule, said):
    with pytest.raises(DeRaError, match=said):
        read_rule(rule)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({1: 2.0}, "start at position 0"),
        ({}, "start at position 0"),
        ("0:2,0:1", "position 0 is there twice"),
        ("0=2", "as 0:2.0,20:1.0"),
        ({0: math.inf}, "inf is not a number"),
        ({0.5: 1.0}, "0.5 is not a position"),
        (3, "as 0:2.0,20:1.0"),
    ],
)
def test_a_schedule_that_is_none(schedule, said):
    with pytest.raises(DeRaError, match=said):
        read_schedule(schedule)


def test_amulets_update_is_a_plain_lambda():
    """Amulet's steps (arXiv 2502.19148) on rows of log-probabilities, against the λ that its settings alone give."""
    alpha, strength, eta, steps = 2.0, 2.0, 10.0, 60
    rows = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2
    reference, aligned = rows.log_softmax(-1)
    policy, gains, lambdas = aligned, [], [1.0]
    for step in range(1, steps + 1):
        gains.append(alpha * (policy - reference))
        policy = strength * aligned + sum(gains) / step + policy / (eta * step)
        policy = (policy / (strength + 1 / (eta * step))).log_softmax(-1)
        share = strength + alpha * sum(lambdas) / step + lambdas[-1] / (eta * step)
        lambdas.append(share / (strength + 1 / (eta * step)))
    assert lambdas[-1] == pytest.approx(5.649, abs=1e-3)  # as the guide says
    mixed = mix(reference, aligned, torch.tensor([lambdas[-1]], dtype=torch.float64))
    torch.testing.assert_close(mixed.log_softmax(-1), policy)
