"""lm-evaluation-harness on a checkpoint: from the command line and by object, with the numbers that a loop gets."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from paths import ROOT
from tiny_sigma import character_tokenizer, save_with_tokenizer

import diffqkv

PAGE = (ROOT / "docs" / "serving.md").read_text()
TASKS = ROOT / "examples" / "python" / "evaluation"
sys.path.append(str(TASKS))

from python_docs import CHOICES, records  # noqa: E402

LIMIT, BATCH_SIZE = 6, 4  # requests of several lengths in a batch
METRICS = {
    "python_docs_bits": ["bits_per_byte,none"],
    "python_docs_choice": ["acc,none", "acc_norm,none"],
    "python_docs_word": ["exact_match,word"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where lm-eval runs: the data of the tasks, and a checkpoint."""
    path = tmp_path_factory.mktemp("evaluation")
    (path / "examples").symlink_to(ROOT / "examples")
    lines = [json.dumps(record) + "\n" for record in records()]
    assert len(lines) >= 30
    (path / "python_docs.jsonl").write_text("".join(lines))
    save_with_tokenizer(path / "checkpoint")
    return path


@pytest.fixture(scope="module")
def by_object(folder):
    """By attention function: the results, and what the model said to each request."""
    model, tokenizer = diffqkv.SigmaForCausalLM.from_pretrained(folder / "checkpoint"), character_tokenizer()
    evaluated = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "datasets"))
        for attention in ("diffqkv", "sdpa"):
            model.set_attn_implementation(attention)
            evaluated[attention] = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=BATCH_SIZE),
                tasks=["python_docs"],
                task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
                limit=LIMIT,
                bootstrap_iters=0,
            )
    return evaluated


def scores(evaluated) -> dict:
    return {metric: evaluated["results"][task][metric] for task, metrics in METRICS.items() for metric in metrics}


def said(evaluated, task) -> list:
    return [doc["resps"] for doc in evaluated["samples"][task]]


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, text: str) -> float:
    """Of the text behind the context, without batch, padding and cache."""
    before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in (context, text))
    before = before or [tokenizer.eos_token_id]
    log_p = model(torch.tensor([before + after]), use_cache=False).logits[0].log_softmax(-1)
    positions = range(len(before) - 1, len(before) + len(after) - 1)
    return sum(log_p[i, token].item() for i, token in zip(positions, after, strict=True))


def test_attention_functions_agree(by_object):
    ours, stock = by_object["diffqkv"], by_object["sdpa"]
    assert scores(stock) == pytest.approx(scores(ours), rel=1e-5)
    assert said(stock, "python_docs_word") == said(ours, "python_docs_word")


def test_scores_are_those_of_a_loop(by_object, folder):
    model, tokenizer = diffqkv.SigmaForCausalLM.from_pretrained(folder / "checkpoint"), character_tokenizer()
    model.set_attn_implementation("eager")
    chosen, generated = (said(by_object["diffqkv"], f"python_docs_{task}") for task in ("choice", "word"))
    docs = records()[:LIMIT]
    right, right_by_length, bits, size, words = 0, 0, 0.0, 0, 0
    for number, doc in enumerate(docs):
        assert len(doc["choices"]) == CHOICES and doc["following"].startswith(doc["choices"][doc["answer"]])
        likelihoods = [log_likelihood(model, tokenizer, doc["context"], "\n\n" + choice) for choice in doc["choices"]]
        got = [response[0][0] for response in chosen[number]]
        assert got == pytest.approx(likelihoods, rel=1e-4)
        per_character = [x / len(choice) for x, choice in zip(likelihoods, doc["choices"], strict=True)]
        right += max(range(CHOICES), key=likelihoods.__getitem__) == doc["answer"]
        right_by_length += max(range(CHOICES), key=per_character.__getitem__) == doc["answer"]

        text = doc["context"] + "\n\n" + doc["following"]
        bits -= log_likelihood(model, tokenizer, "", text) / math.log(2)
        size += len(text.encode())

        prompt = tokenizer(text.rpartition(" ")[0], return_tensors="pt")
        out = model.generate(**prompt, max_new_tokens=16, do_sample=False, use_cache=False)
        word = tokenizer.decode(out[0, prompt.input_ids.shape[1] :], skip_special_tokens=True).partition("\n")[0]
        assert generated[number] == [[word]]
        words += (word.split() or [""])[0] == text.split()[-1]

    want = {"acc,none": right, "acc_norm,none": right_by_length, "exact_match,word": words}
    want = {name: count / LIMIT for name, count in want.items()} | {"bits_per_byte,none": bits / size}
    assert scores(by_object["diffqkv"]) == pytest.approx(want, rel=1e-4)


def test_command_line_gives_the_scores_of_the_object(by_object, folder):
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    options = ["--device", "cpu", "--batch_size", str(BATCH_SIZE), "--limit", str(LIMIT), "--include_path", str(TASKS)]
    # Ours, whose models need no code of the checkpoint; and lm-eval alone, on the model files beside the weights.
    runs = {
        "ours": ["diffqkv", "run", "lm-eval", "run", "--model_args", "pretrained=checkpoint"],
        "alone": ["lm_eval", "run", "--model_args", "pretrained=checkpoint,trust_remote_code=True"],
    }
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", *command, "--model", "hf", *options, "--tasks", "python_docs", "-o", f"{name}.json"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, command in runs.items()
    }
    try:
        for name, process in running.items():
            printed, _ = process.communicate(timeout=200)
            assert process.returncode == 0, printed
            (written,) = folder.glob(f"{name}_*.json")
            assert scores(json.loads(written.read_text())) == pytest.approx(scores(by_object["diffqkv"]), rel=1e-6)
    finally:
        for process in running.values():
            process.kill()


def test_a_checkpoint_is_unknown_without_the_package_and_the_models_code(folder):
    """The day that it is not, lm-eval needs no `python -m diffqkv run`."""
    script = "from transformers import AutoConfig; AutoConfig.from_pretrained('checkpoint')"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "trust_remote_code" in done.stderr


def test_the_page_runs_as_printed(by_object, folder, monkeypatch, capsys):
    (block,) = re.findall(r"^```python\n(import lm_eval\n.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "datasets"))
    names: dict = {}
    exec(compile(block, "serving.md", "exec"), names)
    assert names["model"].is_fused
    bits = float(capsys.readouterr().out.splitlines()[-1])
    # Of fewer documents than by_object's.
    assert bits == pytest.approx(by_object["diffqkv"]["results"]["python_docs_bits"]["bits_per_byte,none"], rel=0.1)


def test_the_page_names_tasks_that_exist():
    (names,) = re.findall(r"--tasks (\S+,\S+)$", PAGE, re.MULTILINE)
    folders = Path(lm_eval.__file__).parent / "tasks"
    tasks = set(re.findall(r"^task: (\S+)$", "\n".join(x.read_text() for x in folders.rglob("*.yaml")), re.MULTILINE))
    assert set(names.split(",")) <= tasks
    assert set(re.findall(r"python_docs_\w+", PAGE)) <= {path.stem for path in TASKS.glob("*.yaml")}
