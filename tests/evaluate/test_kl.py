"""KL per token against two whole models, each sequence by itself."""

import torch
from two_models import load_two

from dera_peft import DeRaModel
from dera_peft.evaluate import kl
from dera_peft.evaluate.kl import token_kl

PROMPTS = [[5, 9, 17], [40, 41, 42, 43, 44, 45, 46], [8], [8]]
COMPLETIONS = [[20, 21, 22, 23], [60], [], [70, 71]]
LAM = [0.5, 1.5, 1.0, 0.0]


@torch.no_grad()
def test_kl_of_each_sequence_by_itself(tiny_base, tiny_adapter, monkeypatch):
    reference, aligned = load_two(tiny_base, tiny_adapter)
    expected = []
    for prompt, completion, lam in zip(PROMPTS, COMPLETIONS, LAM, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        z_ref, z_aligned = reference(ids).logits[0].double(), aligned(ids).logits[0].double()
        p = ((1 - lam) * z_ref + lam * z_aligned).softmax(-1)
        each = (p * (p.log() - z_ref.log_softmax(-1))).sum(-1)
        expected.append(each[len(prompt) - 1 : -1])
    assert expected[0].min() > 0.01, "the branches must differ for the comparison to mean something"

    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter)
    found = token_kl(model, PROMPTS, COMPLETIONS, LAM)
    assert [len(values) for values in found] == [4, 1, 0, 2]
    for values, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(values.double(), exact, atol=2e-4, rtol=1e-3)
    assert found[3].tolist() == [0.0, 0.0]

    monkeypatch.setattr(kl, "MAX_LOGITS", 1)  # one sequence at a time
    for values, exact in zip(token_kl(model, PROMPTS, COMPLETIONS, LAM), expected, strict=True):
        torch.testing.assert_close(values.double(), exact, atol=2e-4, rtol=1e-3)
