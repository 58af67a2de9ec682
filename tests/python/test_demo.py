"""The demo's parts, and the demo itself in a few steps: it learns, resumes exactly, and tells what is wrong."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import diffqkv

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples" / "python"))

from demo import __main__ as demo_main  # noqa: E402
from demo import corpus as demo_corpus  # noqa: E402
from demo.corpus import CorpusError, Document, build_corpus, python_documentation, read_files  # noqa: E402
from demo.packing import Windows, evaluation_windows  # noqa: E402
from demo.plot import plot_losses  # noqa: E402
from demo.tokenizer import END_OF_TEXT, VOCAB_SIZE, byte_tokenizer, encode  # noqa: E402
from demo.training import CheckpointError, History, Recipe, Trainer, bits_per_byte, unigram_entropy  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

RECIPE = Recipe(steps=6, batch_size=2, context=16, warmup_steps=2, evaluate_every=2, save_every=2)


def documents(count=40, size=900) -> list[Document]:
    return [
        Document(f"{i}.txt", f"Text {i}: " + " ".join(f"word{i}{j}" for j in range(size // 7))) for i in range(count)
    ]


def trainer(folder: Path, recipe=RECIPE, identity="a corpus") -> Trainer:
    tokens = encode([document.text for document in documents(3)])
    held_out = evaluation_windows(tokens, recipe.context, 4)
    torch.manual_seed(recipe.seed)
    model = diffqkv.SigmaForCausalLM(
        diffqkv.SigmaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_heads=1, num_value_heads=2, q_aug_dim=32, initializer_range=0.1,
        )
    )  # fmt: skip
    return Trainer(
        model,
        Windows(tokens, recipe.context, recipe.batch_size, recipe.seed),
        recipe,
        evaluate=lambda: bits_per_byte(model, held_out),
        checkpoint=folder / "checkpoint.pt",
        identity={"corpus": identity},
    )


def parameters(of: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in of.model.parameters()]


class TestCorpus:
    def test_split_depends_on_content_alone(self):
        texts = documents()
        renamed = [Document(f"other/{d.name}", d.text) for d in texts]
        one, other = build_corpus(texts), build_corpus(renamed[::-1])
        assert one == other
        assert len(one.held_out) == 2 and len(one.train) == 38

    def test_another_text_has_another_hash(self):
        texts = documents()
        changed = [*texts[:-1], Document(texts[-1].name, texts[-1].text + "!")]
        assert build_corpus(texts).sha256 != build_corpus(changed).sha256

    def test_a_paragraph_is_kept_once(self):
        shared = "A paragraph that many files have in common, such as a licence."
        texts = [Document(d.name, f"{shared}\n\n{d.text}") for d in documents()]
        corpus = build_corpus(texts)
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
        with pytest.raises(CorpusError, match="not enough text: got 5 bytes in 1 files, want at least 20,000"):
            build_corpus([Document("a", "Hello")])

    def test_unusable_files(self, tmp_path):
        binary = tmp_path / "picture.png"
        binary.write_bytes(b"\x89PNG\xff")
        for path, message in (
            (binary, "not UTF-8 text"),
            (tmp_path, "cannot be read"),
            (tmp_path / "no", "cannot be read"),
        ):
            with pytest.raises(CorpusError, match=message) as caught:
                read_files([path])
            assert str(path) in str(caught.value)


class TestTokenizer:
    TEXT = (
        "".join(map(chr, [*range(0, 0xD800, 5), *range(0xE000, 0x110000, 499)])) + " <|endoftext|> <|pad|> <0x41>  a ,b"
    )

    def test_round_trip_after_saving(self, tmp_path):
        byte_tokenizer(512).save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert tokenizer.decode(tokenizer(self.TEXT).input_ids, skip_special_tokens=True) == self.TEXT
        assert len(tokenizer) == VOCAB_SIZE and tokenizer.eos_token_id == END_OF_TEXT

    def test_encode_is_the_tokenizer(self):
        assert encode([self.TEXT]).tolist() == [*byte_tokenizer(512)(self.TEXT).input_ids, END_OF_TEXT]

    def test_batches_are_padded_on_the_left(self):
        batch = byte_tokenizer(512)(["ab", "c"], padding=True, return_tensors="pt")
        assert batch.attention_mask.tolist() == [[1, 1], [0, 1]]


class TestWindows:
    def test_an_epoch_covers_the_stream_once(self):
        windows = Windows(np.arange(1000, dtype=np.int16), context=10, batch_size=3, seed=1)
        rows = torch.cat([windows.batch(step) for step in range(windows.per_epoch // 3)])
        inputs = rows[:, :-1].flatten()
        assert rows.shape == (99, 11) and len(inputs.unique()) == len(inputs)
        assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)

    def test_a_batch_depends_on_the_step_alone(self):
        stream = np.arange(1000, dtype=np.int16)
        one, other = (Windows(stream, context=10, batch_size=4, seed=1) for _ in range(2))
        late = one.batch(60)
        for step in range(61):
            last = other.batch(step)
        assert torch.equal(late, last)
        assert not torch.equal(late, Windows(stream, context=10, batch_size=4, seed=2).batch(60))

    def test_evaluation_windows_are_spread(self):
        windows = evaluation_windows(np.arange(1001, dtype=np.int16), context=10, limit=5)
        assert windows.shape == (5, 11)
        assert windows[0, 0] == 0 and windows[-1, -1] == 1000

    def test_too_short(self):
        with pytest.raises(ValueError, match="tokens: got 15, want"):
            Windows(np.zeros(15, dtype=np.int16), context=10, batch_size=1, seed=0)


def test_entropy_and_bits_count_bytes_alone():
    windows = torch.tensor([[0, 1, 2, 1, 2, END_OF_TEXT]])
    assert unigram_entropy(windows) == pytest.approx(1.0)

    class Uniform(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 256 + 256)})

    # Five targets at nine bits each; four of them are bytes.
    assert bits_per_byte(Uniform(), windows) == pytest.approx(45 / 4)


class TestTraining:
    def test_learns(self, tmp_path):
        run = trainer(tmp_path, Recipe(steps=60, batch_size=4, context=32, warmup_steps=5, evaluate_every=20))
        list(run.run())
        (first, before), *_, (last, after) = run.history.held_out
        assert (first, last) == (0, 60) and after < before - 2

    def test_resumed_equals_uninterrupted(self, tmp_path):
        whole, begun = (trainer(tmp_path / name) for name in ("whole", "parts"))
        for run in (whole, begun):
            run.checkpoint.parent.mkdir()
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
    text.write_text("\n\n".join(document.text for document in documents()))
    result = run_demo(text, "--out", out, "--steps", 4)
    assert result.returncode == 0, result.stdout + result.stderr
    for part in (
        "SHA-256",
        "library",
        "held-out bits per byte",
        "byte-unigram entropy",
        "tokens/s",
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
    text.write_text("\n\n".join(document.text for document in documents()))
    for file in (checkpoint, notes):
        file.write_text("of another time")
    monkeypatch.setattr(demo_main, "decode_table", lambda: "")
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
        == f"demo: {tmp_path}/missing.txt: cannot be read (No such file or directory); name files of plain text\n"
    )
