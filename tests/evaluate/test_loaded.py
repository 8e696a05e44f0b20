"""A sweep as a notebook runs it: of a model that is loaded, with numpy's λ, a Dataset, paths, and pandas."""

import builtins
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dera_peft import DeRaError, DeRaModel
from dera_peft.evaluate import SweepConfig, sweep

ROWS = [{"prompt": "Rain fell", "kind": "a", "kl": 3}, {"prompt": "A fox crossed", "kind": "b", "kl": 4}]
SETTINGS = {"lambdas": [0.0, 1.0], "samples": 2, "max_new_tokens": 4, "seed": 1, "rewards": "length"}
KEY = ("arm", "prompt_index", "lambda", "sample")


def count(prompts, completions, **columns):
    return [float(text.count("e")) for text in completions]


pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(scope="module")
def named(tiny_base, tiny_adapter, tmp_path_factory):
    """The sweep of a base and an adapter by name: what the others have to equal."""
    prompts = Dataset.from_list(ROWS)
    folder = tmp_path_factory.mktemp("named")
    return sweep(base=tiny_base, adapter=tiny_adapter, prompts=prompts, output_dir=folder, judge=never, **SETTINGS)


def never(prompts, pairs):
    raise RuntimeError("the judge is out")


def told(result) -> list:
    """Its rows, without the fingerprint and the judge, by what they are of."""
    left_out = ("run", "judged", "errors")
    rows = [{name: value for name, value in row.items() if name not in left_out} for row in result.rows]
    return sorted(rows, key=lambda row: [row[name] for name in KEY])


def test_a_loaded_model_is_swept_as_its_names_are(named, tiny_base, tiny_adapter, tmp_path):
    settings = {**SETTINGS, "lambdas": np.array([0, 1], np.float32), "temperature": np.float32(1), "prompts": ROWS}
    model = DeRaModel.from_pretrained(tiny_base, tiny_adapter)
    texts = {lam: {row["completion"] for row in named.rows if row["lambda"] == lam} for lam in (0.0, 1.0)}
    assert texts[0.0] != texts[1.0], "the two ends must differ for the comparison to say something"
    assert told(sweep(model=model, output_dir=tmp_path / "loaded", **settings)) == told(named)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    trained = DeRaModel.from_peft(PeftModel.from_pretrained(base, tiny_adapter))
    tokenizer = AutoTokenizer.from_pretrained(tiny_base, padding_side="right")
    settings["lambdas"] = torch.tensor([0.0, 1.0])
    folder = tmp_path / "from-peft"
    assert told(sweep(model=trained, tokenizer=tokenizer, output_dir=folder, **settings)) == told(named)
    assert tokenizer.padding_side == "right", "the caller's own is left as it is"
    again = sweep(model=trained, tokenizer=tokenizer, output_dir=folder, **settings)
    assert again.reused == len(again.rows)
    with torch.no_grad():
        next(p for name, p in trained.named_parameters() if "lora_B" in name).add_(0.1)
    with pytest.raises(DeRaError, match="completions of other settings"):  # it was trained on meanwhile
        sweep(model=trained, tokenizer=tokenizer, output_dir=folder, **settings)


def test_what_a_loaded_model_can_not_be(tiny_model, tiny_base, tiny_adapter, tmp_path):
    settings = {**SETTINGS, "prompts": ["Rain"], "output_dir": tmp_path}
    for changes, message in (
        ({"base": tiny_base}, "base=.*: the model is loaded already"),
        ({"quantization": "nf4"}, "quantization='nf4': the model is loaded already"),
        ({"arms": [{"adapter": str(tiny_adapter)}]}, r"arms\[0\]: adapter=.* needs another model than the one that is"),
        ({"arms": [{"mixing": "weights"}]}, r"arms\[0\]: mixing='weights' needs another model than the one that is"),
        ({"model": tiny_model.base}, "model must be a DeRaModel .*; got a LlamaForCausalLM"),
        ({"model": DeRaModel.from_pretrained(tiny_base, tiny_adapter, mixing="weights")}, "needs one with mixing="),
        ({"model": None, "tokenizer": object()}, "tokenizer belongs to a model that is loaded"),
    ):
        with pytest.raises(DeRaError, match=message):
            sweep(**{"model": tiny_model, **settings, **changes})


def test_results_are_tables(named, monkeypatch):
    samples = named.to_pandas()
    assert len(samples) == len(named.rows) == 8
    assert {*KEY, "prompt", "completion", "kl", "length", "kind", "column kl", "judge 0", "judge 1"} <= {*samples}
    assert samples["column kl"].tolist() == [ROWS[index]["kl"] for index in samples["prompt_index"]]
    means = named.summary_to_pandas()
    assert means["lambda"].tolist() == [0.0, 1.0]
    by_hand = samples.groupby("lambda")["length"].mean()  # as many samples of each prompt
    assert means["length"].tolist() == by_hand.tolist()
    own_import = builtins.__import__

    def without_pandas(name, *arguments, **options):
        if name == "pandas":
            raise ImportError(name)
        return own_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(DeRaError, match="needs pandas, which is not installed"):
        named.to_pandas()


def test_a_judge_that_is_out_gives_no_win_rate(named):
    (zero, one) = named.summaries
    texts = {(row["lambda"], row["prompt_index"], row["sample"]): row["completion"] for row in named.rows}
    equal = sum(texts[0.0, *place] == texts[1.0, *place] for (lam, *place) in texts if lam == 0)
    assert 0 < equal < 4, "a tie without a call, which alone would make up the rate"
    assert named.failed == 2 * (4 - equal)
    assert np.isnan([zero.judged[1.0].rate.mean, one.judged[0.0].rate.mean]).all()


def test_shown_objects_are_short(named, tiny_model):
    shown = [repr(each) for each in (named, tiny_model, named.summaries[0])]
    assert [text.partition("(")[0] for text in shown] == ["SweepResult", "DeRaModel", "LambdaSummary"]
    assert all(len(text) < 600 and "\n" not in text for text in shown[:2]), shown
    assert "rows=<list of 8>" in shown[0] or "rows=<list" in shown[0]
    assert "lam=1.0, mixing='logits'" in shown[1]


@pytest.mark.parametrize("prompts", [None, [], {"prompt": "a"}, Dataset.from_list([]), 3])
def test_prompts_that_are_none_are_refused(prompts):
    with pytest.raises(DeRaError, match=r"^prompts="):
        SweepConfig(prompts=prompts)


def test_numbers_and_paths_as_notebooks_have_them(tiny_base, tiny_adapter, tiny_model, tmp_path):
    (tmp_path / "p.txt").write_text("Rain\n")
    config = SweepConfig(
        prompts=tmp_path / "p.txt", base=tiny_base, adapter=Path(tiny_adapter), lambdas=np.linspace(0, 1, 3),
        samples=np.int64(2), temperature=np.float32(0.5), output_dir=tmp_path, rewards=[count],
    )  # fmt: skip
    assert config.lambdas == (0.0, 0.5, 1.0)
    assert (config.samples, config.temperature, type(config.samples)) == (2, 0.5, int)
    assert (config.prompts, config.output_dir) == (str(tmp_path / "p.txt"), str(tmp_path))
    for wrong in (np.array(["a"]), np.array([np.nan]), "0.5", np.array(0.5), [[0.5]]):
        with pytest.raises(DeRaError, match=r"^lambdas="):
            SweepConfig(prompts=["a"], lambdas=wrong)
    ids = torch.arange(3, 9).view(2, 3)
    expected = tiny_model(ids, lam=[0.25, 0.75]).logits
    assert (expected - tiny_model(ids, lam=0.25).logits).abs().max() > 0.1
    for lam in (np.array([0.25, 0.75], np.float32), torch.tensor([0.25, 0.75]), list(np.float32([0.25, 0.75]))):
        assert torch.equal(tiny_model(ids, lam=lam).logits, expected)
    quarter = tiny_model(ids, lam=0.25).logits
    for lam in (np.float32(0.25), np.array(0.25), torch.tensor(0.25)):
        assert torch.equal(tiny_model(ids, lam=lam).logits, quarter)
        loaded = DeRaModel.from_pretrained(tiny_base, tiny_adapter, lam=lam)
        assert type(loaded.lam) is float
        assert loaded.lam == 0.25
