"""The demo's parts, and the demo itself in a few steps: it learns, resumes exactly, and tells what is wrong."""

import copy
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from paths import ROOT

import diffqkv
from diffqkv.convert.measure import compare
from diffqkv.data import PackedDataset, write_tokens

sys.path.append(str(ROOT / "examples" / "python"))

from demo import __main__ as demo_main  # noqa: E402
from demo import corpus as demo_corpus  # noqa: E402
from demo.__main__ import TOKENIZER, evaluation_batches  # noqa: E402
from demo.corpus import CorpusError, build_corpus, python_documentation, read_files  # noqa: E402
from demo.plot import plot_losses  # noqa: E402
from demo.training import CheckpointError, History, Recipe, Trainer, bits_per_byte, unigram_entropy  # noqa: E402

RECIPE = Recipe(steps=6, batch_size=2, context=16, warmup_steps=2, evaluate_every=2, save_every=2)


def documents(count=40, size=900) -> list[str]:
    return [f"Text {i}: " + " ".join(f"word{i}{j}" for j in range(size // 7)) for i in range(count)]


def trainer(folder: Path, recipe=RECIPE, identity="a corpus") -> Trainer:
    folder.mkdir(exist_ok=True)
    tokens = folder / "tokens.npy"
    write_tokens(tokens, documents(3), TOKENIZER)
    packing = {"context": recipe.context, "end_of_text": None}
    held_out = evaluation_batches(PackedDataset(tokens, **packing), 4)
    torch.manual_seed(recipe.seed)
    model = diffqkv.SigmaForCausalLM(
        diffqkv.SigmaConfig(
            vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_heads=1, num_value_heads=2, q_aug_dim=32, initializer_range=0.1,
        )
    )  # fmt: skip
    return Trainer(
        model,
        PackedDataset(tokens, **packing, seed=recipe.seed, samples=recipe.steps * recipe.batch_size),
        recipe,
        evaluate=lambda: bits_per_byte(model, held_out),
        checkpoint=folder / "checkpoint.pt",
        identity={"corpus": identity},
    )


def parameters(of: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in of.model.parameters()]


class TestCorpus:
    def test_split_depends_on_content_alone(self):
        texts = documents(300)
        one, other = build_corpus(texts), build_corpus(texts[::-1])
        assert one == other
        assert 5 <= len(one.held_out) <= 30 and len(one.train) + len(one.held_out) == 300

    def test_another_text_has_another_hash(self):
        texts = documents()
        changed = [*texts[:-1], texts[-1] + "!"]
        assert build_corpus(texts).sha256 != build_corpus(changed).sha256

    def test_a_paragraph_is_kept_once(self):
        shared = "A paragraph that many files have in common, such as a licence."
        corpus = build_corpus([f"{shared}\n\n{text}" for text in documents()])
        assert sum(text.count(shared) for text in corpus.train + corpus.held_out) == 1

    def test_the_end_of_few_files_is_held_out(self):
        corpus = build_corpus(documents(2, size=30_000))
        assert len(corpus.train) == len(corpus.held_out) == 2
        train, held_out = corpus.sizes
        assert 0.03 < held_out / (train + held_out) < 0.06

    def test_python_documentation_is_prose_that_can_be_trained_on(self):
        corpus = build_corpus(python_documentation())
        train, held_out = corpus.sizes
        assert train > 500_000 and held_out > 20_000
        assert not set(corpus.train) & set(corpus.held_out)
        assert any("Return" in text for text in corpus.held_out)

    def test_no_text(self, monkeypatch, tmp_path):
        monkeypatch.setattr(demo_corpus, "_help_topics", lambda: iter(()))
        monkeypatch.setattr(demo_corpus.sysconfig, "get_path", lambda name: str(tmp_path))
        with pytest.raises(CorpusError, match="no text found.*name text files instead"):
            python_documentation()

    def test_too_little_text(self):
        with pytest.raises(CorpusError, match="not enough text: got 5 bytes in 1 documents, 0 of them held out, want"):
            build_corpus(["Hello"])

    def test_unusable_files(self, tmp_path):
        binary = tmp_path / "picture.png"
        binary.write_bytes(b"\x89PNG\xff")
        (tmp_path / "empty").touch()
        for path, message in (
            (binary, "not UTF-8 text"),
            (tmp_path / "empty", "empty file"),
            (tmp_path / "no", "cannot be read"),
        ):
            with pytest.raises(CorpusError, match=message) as caught:
                read_files([path])
            assert str(path) in str(caught.value)


def test_evaluation_windows_are_spread(tmp_path):
    write_tokens(tmp_path / "tokens.npy", [bytes(range(100)).decode()], TOKENIZER)
    dataset = PackedDataset(tmp_path / "tokens.npy", 10, end_of_text=None)
    [batch] = evaluation_batches(dataset, limit=5)
    assert batch["input_ids"][:, 0].tolist() == [0, 20, 40, 70, 90]


def test_entropy_and_bits_count_bytes_alone():
    ids = torch.tensor([[7, 0, 1, 2, 1, 2, TOKENIZER.eos_token_id]])
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(7)[None]}
    assert unigram_entropy([batch]) == pytest.approx(2 * 0.4 * math.log2(2.5) + 0.2 * math.log2(5))

    class NineBits(torch.nn.Module):
        def forward(self, use_cache, **batch):
            return SimpleNamespace(loss=torch.tensor(9 * math.log(2)))

    # Six targets at nine bits each; five of them are bytes.
    assert bits_per_byte(NineBits(), [batch]) == pytest.approx(54 / 5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The demo's model on the demo's text, through the op and through SDPA; and windows of text held out."""
    folder, corpus = tmp_path_factory.mktemp("trained"), build_corpus(python_documentation())
    packing = {"context": 256, "end_of_text": TOKENIZER.eos_token_id}
    write_tokens(folder / "tokens.npy", corpus.train[:200], TOKENIZER)
    write_tokens(folder / "held_out.npy", corpus.held_out, TOKENIZER)
    held_out = evaluation_batches(PackedDataset(folder / "held_out.npy", **packing), 64)
    recipe = Recipe(steps=200, batch_size=4, evaluate_every=200, save_every=200)
    windows = PackedDataset(folder / "tokens.npy", **packing, seed=0, samples=800)
    runs = {}
    for attention in ("diffqkv", "sdpa"):
        torch.manual_seed(recipe.seed)
        model = diffqkv.SigmaForCausalLM(diffqkv.SigmaConfig(**demo_main.MODEL))
        model.set_attn_implementation(attention)
        checkpoint = folder / f"{attention}.pt"
        runs[attention] = Trainer(model, windows, recipe, evaluate=lambda: 0.0, checkpoint=checkpoint, identity={})
        list(runs[attention].run())
    return SimpleNamespace(runs=runs, held_out=torch.cat([batch["input_ids"] for batch in held_out]))


class TestTraining:
    def test_learns(self, tmp_path):
        run = trainer(tmp_path, Recipe(steps=60, batch_size=4, context=32, warmup_steps=5, evaluate_every=20))
        list(run.run())
        (first, before), *_, (last, after) = run.history.held_out
        assert (first, last) == (0, 60) and after < before - 2

    @pytest.mark.timeout(900)
    def test_losses_do_not_depend_on_attention(self, trained):
        """What float32 rounds differently grows from step to step, as a change of the weights' last bits does."""
        ours, theirs = (np.array(run.history.train) for run in trained.runs.values())
        assert theirs[-20:].mean() < theirs[0] - 3
        np.testing.assert_allclose(ours[:50], theirs[:50], rtol=0, atol=1e-3)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.1)
        assert abs(ours[-50:].mean() - theirs[-50:].mean()) < 0.02

    @pytest.mark.timeout(900)
    @pytest.mark.parametrize("weights, most", [("packed", 1e-5), ("int8", 0.005), ("int4", 0.03)])
    def test_integers_keep_the_perplexity_of_held_out_text(self, trained, library, weights, most):
        """By groups of 32 weights."""
        model = trained.runs["diffqkv"].model.eval()
        small = copy.deepcopy(model).fuse_for_inference(weights)
        measured = compare(model, small, trained.held_out)
        before, quotient = measured["perplexity"]["before"], measured["perplexity_quotient"]
        print(f"{weights}: {quotient:.5f} of the perplexity {before:.3f}, mean KL {measured['mean_kl']:.2g} nats")
        assert before < 12 and abs(quotient - 1) < most
        if weights == "int4":
            assert measured["mean_kl"] > 1e-4, "the weights have been rounded"

    def test_resumed_equals_uninterrupted(self, tmp_path):
        whole, begun = (trainer(tmp_path / name) for name in ("whole", "parts"))
        list(whole.run())
        for progress in begun.run():
            # Step 3 is lost: the last checkpoint is of step 2.
            if progress.step == 3:
                break
        resumed = trainer(tmp_path / "parts")
        assert resumed.step == 2
        list(resumed.run())
        assert resumed.history == whole.history
        assert all(torch.equal(a, b) for a, b in zip(parameters(resumed), parameters(whole), strict=True))

    def test_ctrl_c_saves_the_step(self, tmp_path):
        run = trainer(tmp_path)
        for progress in run.run():
            if progress.step == 3:
                os.kill(os.getpid(), signal.SIGINT)
        assert run.interrupted and run.step == 4
        resumed = trainer(tmp_path)
        assert resumed.step == 4
        assert all(torch.equal(a, b) for a, b in zip(parameters(resumed), parameters(run), strict=True))

    def test_a_finished_run_is_not_repeated(self, tmp_path):
        run = trainer(tmp_path)
        list(run.run())
        again = trainer(tmp_path)
        assert list(again.run()) == [] and again.history == run.history

    @pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "foreign"])
    def test_damaged_checkpoint(self, tmp_path, damage):
        run = trainer(tmp_path)
        list(run.run())
        content = run.checkpoint.read_bytes()
        if damage == "foreign":
            torch.save({"weights": torch.zeros(2)}, run.checkpoint)
        else:
            run.checkpoint.write_bytes(
                {"cut": content[: len(content) // 2], "garbage": b"text" * 99, "empty": b""}[damage]
            )
        with pytest.raises(CheckpointError, match="cannot be read .*; start anew with --restart"):
            trainer(tmp_path)

    def test_checkpoint_of_another_run(self, tmp_path):
        list(trainer(tmp_path).run())
        with pytest.raises(CheckpointError, match="is of another run: corpus is a corpus, not another"):
            trainer(tmp_path, identity="another")

    def test_plot(self, tmp_path):
        history = History(train=[5.0, 4.0, 3.5, 3.0], held_out=[(0, 8.0), (2, 4.2), (4, 3.2)])
        plot_losses(history, 4.5, tmp_path / "loss.png")
        picture = matplotlib.image.imread(tmp_path / "loss.png")
        assert picture.shape[0] > 400 and picture[..., :3].std() > 0.05


def run_demo(*args, **environment) -> subprocess.CompletedProcess:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("examples/python", "python"))
    return subprocess.run(
        [sys.executable, "-m", "demo", *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def test_demo_from_end_to_end(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n\n".join(documents()))
    result = run_demo(text, "--out", out, "--steps", 4)
    assert result.returncode == 0, result.stdout + result.stderr
    for part in (
        "SHA-256",
        "library",
        "held-out bits per byte",
        "byte-unigram entropy",
        "tokens/s",
        "Generating 64 tokens with this model",
        "as trained",
        "packed",
        "int8",
        "int4",
        "A training step of this model",
        "GQA-16",
        "sample",
    ):
        assert part in result.stdout
    for name in ("checkpoint.pt", "loss.png", "model/config.json", "model/model.safetensors", "model/tokenizer.json"):
        assert (out / name).stat().st_size > 0

    other = run_demo(text, "--out", out, "--steps", 5)
    assert other.returncode == 1
    assert other.stderr.startswith("demo: ") and "is of another run: steps is 4, not 5" in other.stderr
    assert "Traceback" not in other.stderr


def test_restart_forgets_the_checkpoint_alone(tmp_path, monkeypatch):
    text, checkpoint, notes = (tmp_path / name for name in ("text.txt", "checkpoint.pt", "notes.txt"))
    text.write_text("\n\n".join(documents()))
    for file in (checkpoint, notes):
        file.write_text("of another time")
    monkeypatch.setattr(demo_main, "decode_table", lambda: "")
    monkeypatch.setattr(demo_main, "forms_table", lambda folder, held_out: "")
    monkeypatch.setattr(demo_main, "training_table", lambda dtype, batch_size: "")
    # It would silence the tests that follow.
    monkeypatch.setattr(demo_main.transformers_logging, "set_verbosity_error", lambda: None)
    monkeypatch.setattr(sys, "argv", ["demo", str(text), "--out", str(tmp_path), "--steps", "1"])
    assert demo_main.main() == 1
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--restart"])
    assert demo_main.main() == 0
    assert torch.load(checkpoint, weights_only=True)["step"] == 1
    assert notes.read_text() == "of another time"


def test_demo_without_usable_text(tmp_path):
    result = run_demo(tmp_path / "missing.txt", "--out", tmp_path / "out")
    assert result.returncode == 1
    assert (
        result.stderr
        == f"demo: {tmp_path}/missing.txt: cannot be read (No such file or directory); name files of text\n"
    )
