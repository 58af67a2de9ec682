"""Text, split, tokenizers, token files and packed windows: exact, and the same at every repetition and resumption."""

import gzip
import json
import os
import pickle
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import PACKAGE
from tiny_sigma import tiny_model
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from diffqkv.data import PackedDataset, byte_tokenizer, is_held_out, read_texts, train_bpe, write_tokens

UNICODE = (
    "".join(map(chr, [*range(0, 0xD800, 5), *range(0xE000, 0x110000, 499)])) + " <|endoftext|> <|pad|> <0x41>  a ,b"
)
END = 256
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def texts(count=40) -> list[str]:
    return [f"Text {i}: " + " ".join(f"word{i}{j}" for j in range(i % 7 + 3)) for i in range(count)]


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def packed(path: Path, tokens, context: int, **options) -> PackedDataset:
    """A dataset of these tokens, in file order and without documents unless told."""
    np.save(path / "tokens.npy", np.asarray(tokens, np.uint16))
    return PackedDataset(path / "tokens.npy", context, **{"end_of_text": None, **options})


def input_ids(dataset) -> torch.Tensor:
    return torch.stack([item["input_ids"] for item in dataset])


class TestReading:
    def test_a_file_is_a_document_and_so_is_a_record(self, tmp_path):
        (tmp_path / "b.txt").write_text("of text\r\nin two lines\n")
        (tmp_path / "a.md").write_text("# of markdown")
        (tmp_path / "c.py").write_text("not text")
        (tmp_path / "more").mkdir()
        write_lines(tmp_path / "more" / "d.jsonl", {"text": "one"}, {"text": "two", "late": [1, {"x": None}]})
        write_parquet(tmp_path / "more" / "e.parquet", text=["three", "four"], other=[1, 2])
        assert list(read_texts(tmp_path)) == [
            "# of markdown", "of text\nin two lines\n", "one", "two", "three", "four",
        ]  # fmt: skip
        assert list(read_texts(tmp_path / "c.py", tmp_path / "*.txt")) == ["not text", "of text\nin two lines\n"]
        assert list(read_texts(str(tmp_path / "**" / "*.parquet"), tmp_path / "more" / "e.parquet")) == [
            "three",
            "four",
        ]

    def test_compressed_lines_another_field_and_odd_names(self, tmp_path):
        content = b'{"body": "one"}\n\n{"body": "caf\xc3\xa9 \xe2\x80\xa8"}\n'
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
        (tmp_path / "[1] *?.jsonl").write_bytes(content)
        want = ["one", "café \u2028"]
        assert list(read_texts(tmp_path, field="body")) == 2 * want
        assert list(read_texts(tmp_path / "[1] *?.jsonl", field="body")) == want

    def test_needs_no_network(self, tmp_path, monkeypatch):
        def refuse(*args):
            raise AssertionError("a connection")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        write_lines(tmp_path / "a.jsonl", {"text": "one"})
        write_parquet(tmp_path / "b.parquet", text=["two"])
        assert list(read_texts(tmp_path)) == ["one", "two"]

    @PROPERTY
    @given(text=st.text(alphabet="ab \n", max_size=200), longest=st.integers(1, 50))
    def test_long_documents_are_cut_without_loss(self, tmp_path, text, longest):
        (tmp_path / "a.txt").write_text(text + ".")
        pieces = list(read_texts(tmp_path / "a.txt", longest=longest))
        assert "".join(pieces) == text + "." and max(map(len, pieces)) <= longest
        write_lines(tmp_path / "a.jsonl", {"text": text + "."})
        assert list(read_texts(tmp_path / "a.jsonl", longest=longest)) == pieces

    def test_cuts_are_at_paragraphs_then_lines_then_words(self, tmp_path):
        for text, first in (
            ("aa\n\nbb\ncc dd", "aa\n\n"),
            ("aaa\nbb cc dd", "aaa\n"),
            ("aaaa bb", "aaaa "),
            ("a" * 9, "a" * 6),
        ):
            (tmp_path / "a.txt").write_text(text)
            assert next(read_texts(tmp_path / "a.txt", longest=6)) == first

    def test_large_files_are_not_held_in_memory(self, tmp_path):
        with (tmp_path / "a.txt").open("w") as file:
            for _ in range(1 << 10):
                file.write("A line of text.\n" * (1 << 11))
        tracemalloc.start()
        characters = sum(map(len, read_texts(tmp_path / "a.txt")))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert characters == 1 << 25 and peak < 1 << 22

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", b"caf\xe9", "not UTF-8"),
            ("a.txt", b"", "empty file"),
            ("a.jsonl", b"", "empty file"),
            ("a.jsonl", b'{"text": "caf\xe9"}', "not UTF-8"),
            ("a.jsonl", b'{"text": "a"}\n{"other": "b"}\n', "record 2: got {'other': 'b'}, want a string in 'text'"),
            ("a.jsonl", b'{"text": "a"}\n\n{"text": null}\n', "record 3: got {'text': None}, want a string"),
            ("a.jsonl", b'[{"text": "a"}]\n', "record 1: got .*, want a string"),
            ("a.jsonl", b'{"text": "a"}\n{"text": \n', "record 2: Expecting value"),
            ("a.jsonl", b'{"text": "\\ud800"}\n', "record 1: .*surrogates not allowed"),
            ("a.jsonl.gz", gzip.compress(b'{"text": "a"}')[:-9], "ended before"),
            ("a.parquet", b"PAR1 and what follows", "magic bytes"),
        ],
    )
    def test_unusable_files_are_named(self, tmp_path, name, content, message):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            list(read_texts(path))
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)

    def test_damaged_parquet_is_named(self, tmp_path):
        path = write_parquet(tmp_path / "a.parquet", text=[f"text {i}" for i in range(2000)])
        content = bytearray(path.read_bytes())
        content[4:4000] = bytes(3996)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)):
            list(read_texts(path))

    def test_parquet_without_the_field(self, tmp_path):
        for path in (
            write_parquet(tmp_path / "none.parquet", other=["a"]),
            write_parquet(tmp_path / "null.parquet", text=["a", None]),
            write_parquet(tmp_path / "number.parquet", text=[1, 2]),
        ):
            with pytest.raises(ValueError, match=f"{path}: .*text"):
                list(read_texts(path))

    def test_paths_without_files(self, tmp_path):
        for path in (tmp_path, tmp_path / "missing.txt", tmp_path / "*.txt"):
            with pytest.raises(FileNotFoundError) as caught:
                read_texts(path)
            assert caught.value.filename == str(path)

    def test_bad_arguments(self, tmp_path):
        with pytest.raises(ValueError, match="paths: got none"):
            read_texts()
        with pytest.raises(ValueError, match="longest: got 0, want a positive number"):
            read_texts(tmp_path, longest=0)


class TestSplit:
    def test_depends_on_content_alone(self, tmp_path):
        for folder, order in (("one", 1), ("other", -1)):
            (tmp_path / folder).mkdir()
            for i, text in enumerate(texts(200)[::order]):
                (tmp_path / folder / f"{i}.txt").write_text(text)
        write_lines(tmp_path / "lines.jsonl", *({"text": text} for text in texts(200)))
        one, other, lines = (
            {text for text in read_texts(tmp_path / name) if is_held_out(text)}
            for name in ("one", "other", "lines.jsonl")
        )
        assert one == other == lines and 0 < len(one) < 30

    def test_fraction(self):
        drawn = texts(2000)
        for fraction in (0.0, 0.05, 0.5, 1.0):
            assert sum(is_held_out(text, fraction) for text in drawn) == pytest.approx(
                2000 * fraction, abs=100 * fraction**0.5
            )
        # A larger part holds the smaller.
        assert all(is_held_out(text, 0.2) for text in drawn if is_held_out(text, 0.1))
        with pytest.raises(ValueError, match="fraction: got 5, want"):
            is_held_out("", 5)


class TestTokenizers:
    def test_bytes_after_saving(self, tmp_path):
        byte_tokenizer(512).save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert tokenizer(UNICODE).input_ids == list(UNICODE.encode())
        assert tokenizer.decode(tokenizer(UNICODE).input_ids, skip_special_tokens=True) == UNICODE
        assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (258, 256, 257)

    def test_bpe_after_saving(self, tmp_path):
        trained = train_bpe(texts(), 300, max_length=512)
        trained.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert len(tokenizer) == 300 and tokenizer.model_max_length == 512
        for text in (UNICODE, texts()[3]):
            ids = tokenizer(text).input_ids
            assert ids == trained(text).input_ids and tokenizer.decode(ids, skip_special_tokens=True) == text
        assert len(tokenizer(texts()[3]).input_ids) < len(texts()[3].encode()) / 2

    def test_bpe_depends_on_content_alone(self):
        one, other = (train_bpe(iter(order), 300, 512).backend_tokenizer.to_str() for order in (texts(), texts()[::-1]))
        assert one == other

    def test_vocabularies_that_cannot_be(self):
        with pytest.raises(ValueError, match="vocab_size: got 257, want at least 258"):
            train_bpe(texts(), 257, 512)
        with pytest.raises(ValueError, match="vocab_size: got 400, want at most 262 for so little text"):
            train_bpe(["abcd abcd"], 400, 512)
        with pytest.raises(TypeError, match="texts: got one string"):
            train_bpe("abcd", 258, 512)

    def test_batches_are_padded_on_the_left(self):
        batch = byte_tokenizer(512)(["ab", "c"], padding=True, return_tensors="pt")
        assert batch.attention_mask.tolist() == [[1, 1], [0, 1]]


class TestTokenFile:
    @pytest.mark.parametrize("kind", ["bytes", "bpe"])
    def test_has_every_text_and_its_end(self, tmp_path, kind):
        tokenizer = byte_tokenizer(8) if kind == "bytes" else train_bpe(texts(), 300, 8)
        documents = [*texts(), "", UNICODE, "word " * 99_999]
        count = write_tokens(tmp_path / "tokens.npy", iter(documents), tokenizer)
        tokens = np.load(tmp_path / "tokens.npy")
        assert tokens.shape == (count,) and tokens.dtype == np.uint16
        assert tokens.tolist() == [
            i for text in documents for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        ]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens.npy"]

    def test_special_tokens_in_a_text_are_text(self, tmp_path):
        backend = byte_tokenizer(8).backend_tokenizer
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
        assert tokenizer("<|endoftext|>").input_ids == [END]
        write_tokens(tmp_path / "tokens.npy", ["a<|endoftext|>"], tokenizer)
        assert np.load(tmp_path / "tokens.npy").tolist() == [*b"a<|endoftext|>", END]

    def test_large_vocabularies(self, tmp_path):
        tokenizer = train_bpe(texts(), 258, 8)
        tokenizer.add_tokens([f"<{i}>" for i in range(70_000)])
        write_tokens(tmp_path / "tokens.npy", ["a<69999>"], tokenizer)
        tokens = np.load(tmp_path / "tokens.npy")
        assert tokens.dtype == np.uint32 and tokens.tolist()[1:] == [258 + 69_999, tokenizer.eos_token_id]

    def test_a_failure_leaves_the_file_of_before(self, tmp_path):
        path = tmp_path / "tokens.npy"
        write_tokens(path, ["before"], byte_tokenizer(8))

        def broken():
            yield "x" * (1 << 18)
            raise OSError("the disk")

        with pytest.raises(OSError, match="the disk"):
            write_tokens(path, broken(), byte_tokenizer(8))
        with pytest.raises(ValueError, match="texts: got none"):
            write_tokens(path, [], byte_tokenizer(8))
        assert bytes(np.load(path)[:-1].astype(np.uint8)) == b"before" and list(tmp_path.iterdir()) == [path]

    def test_bad_arguments(self, tmp_path):
        with pytest.raises(TypeError, match="texts: got one string"):
            write_tokens(tmp_path / "tokens.npy", "text", byte_tokenizer(8))
        endless = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(8).backend_tokenizer)
        with pytest.raises(ValueError, match="tokenizer: got one without eos_token"):
            write_tokens(tmp_path / "tokens.npy", ["text"], endless)


class TestPackedDataset:
    @PROPERTY
    @given(st.data())
    def test_an_epoch_has_every_token_once(self, tmp_path, data):
        context = data.draw(st.integers(2, 12))
        count = data.draw(st.integers(2 * context - 1, 300))
        seed = data.draw(st.none() | st.integers(0, 9))
        per_epoch = len(packed(tmp_path, range(count), context, seed=seed))
        rows = input_ids(packed(tmp_path, range(count), context, seed=seed, samples=2 * per_epoch))
        for epoch in rows.split(per_epoch):
            used = epoch.flatten().sort().values
            assert torch.equal(used, torch.arange(int(used[0]), int(used[-1]) + 1))
            assert count - len(used) < 2 * context
        if seed is None:
            assert rows[0, 0] == 0 and torch.equal(rows[:per_epoch], rows[per_epoch:])

    def test_order_is_by_seed_and_epoch(self, tmp_path):
        one, same, other = (input_ids(packed(tmp_path, range(908), 9, seed=s, samples=200)) for s in (1, 1, 2))
        assert torch.equal(one, same) and not torch.equal(one, other)
        first, second = one.split(100)  # an epoch each
        assert set(first[:, 0].tolist()) != set(second[:, 0].tolist()), "cut at another place"
        assert (first[1:, 0] - first[:-1, 0]).unique().numel() > 50

    @PROPERTY
    @given(st.lists(st.lists(st.integers(0, 255), max_size=20), min_size=1, max_size=12), st.integers(2, 16))
    def test_positions_and_labels_at_borders(self, tmp_path, documents, context):
        tokens = [token for document in documents for token in [*document, END]]
        tokens += [0] * max(0, context - len(tokens))
        for number, item in enumerate(packed(tmp_path, tokens, context, end_of_text=END)):
            window = tokens[number * context : (number + 1) * context]
            position, positions, labels = 0, [], []
            for token in window:
                positions.append(position)
                labels.append(token if position else -100)
                position = 0 if token == END else position + 1
            assert item["input_ids"].tolist() == window
            assert item["position_ids"].tolist() == positions and item["labels"].tolist() == labels
            assert all(value.dtype == torch.int64 for value in item.values())

    def test_without_borders(self, tmp_path):
        item = packed(tmp_path, [1, END, 2, END, 3], 5)[0]
        assert item["position_ids"].tolist() == [0, 1, 2, 3, 4] and item["labels"].tolist() == [-100, END, 2, END, 3]

    def test_attention_does_not_cross_borders(self, tmp_path):
        model = tiny_model()
        documents = [[5, 6, 7, 90], [8, 9, 90], [11, 90]]
        dataset = packed(tmp_path, sum(documents, []), 9, end_of_text=90)
        batch = {name: value[None] for name, value in dataset[0].items()}
        with torch.no_grad():
            together = model(**batch).loss
            apart = [model(torch.tensor([ids]), labels=torch.tensor([ids])).loss * (len(ids) - 1) for ids in documents]
        torch.testing.assert_close(together, sum(apart) / 6)

    @PROPERTY
    @given(st.integers(0, 29), st.sampled_from([1, 2, 3]))
    def test_resumes_anywhere_and_ranks_share(self, tmp_path, step, ranks):
        """Three rows of each rank per step; the dataset has more than two epochs."""
        documents = [i if i % 7 else END for i in range(500)]
        make = {"context": 8, "seed": 3, "end_of_text": END, "samples": 30 * 3 * ranks}
        whole = list(packed(tmp_path, documents, **make))
        again = packed(tmp_path, documents, **make)
        for rank in range(ranks):
            loader = DataLoader(again, 3, sampler=range(step * 3 * ranks + rank, len(again), ranks))
            assert len(loader) == 30 - step
            for batch, first in zip(loader, range(step * 3 * ranks + rank, len(again), 3 * ranks), strict=True):
                for row in range(3):
                    for name, value in whole[first + row * ranks].items():
                        assert torch.equal(batch[name][row], value)

    def test_workers(self, tmp_path):
        dataset = packed(tmp_path, range(999), 9, seed=0)
        loaded = torch.cat([batch["input_ids"] for batch in DataLoader(dataset, 10, num_workers=2)])
        assert torch.equal(loaded, input_ids(dataset))

    def test_large_files_stay_on_disk(self, tmp_path):
        """Two gigabytes, in a file with a hole."""
        tokens = np.lib.format.open_memmap(tmp_path / "tokens.npy", "w+", np.uint16, (1 << 30,))
        tokens[-3:] = 1, 2, 3
        del tokens
        tracemalloc.start()
        dataset = PackedDataset(tmp_path / "tokens.npy", 1 << 12, end_of_text=END)
        assert dataset[len(dataset) - 1]["input_ids"][-3:].tolist() == [1, 2, 3]
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(copy[5]["input_ids"], dataset[5]["input_ids"]) and len(copy) == 1 << 18
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 25

    def test_unusable_files_are_named(self, tmp_path):
        with pytest.raises(ValueError, match="tokens.npy: got 18 tokens, want at least 19"):
            packed(tmp_path, range(18), 10, seed=0)
        content = (tmp_path / "tokens.npy").read_bytes()
        for damage in (content[:-9], content[:50], b"", b"text" * 99):
            (tmp_path / "tokens.npy").write_bytes(damage)
            with pytest.raises(ValueError, match="tokens.npy: got no whole .npy file"):
                PackedDataset(tmp_path / "tokens.npy", 10, end_of_text=None)
        np.save(tmp_path / "tokens.npy", np.zeros((3, 4)))
        with pytest.raises(ValueError, match=r"tokens.npy: got float64 \[3, 4\], want unsigned integers \[tokens\]"):
            PackedDataset(tmp_path / "tokens.npy", 10, end_of_text=None)
        with pytest.raises(FileNotFoundError, match="missing.npy"):
            PackedDataset(tmp_path / "missing.npy", 10, end_of_text=None)

    def test_bad_arguments(self, tmp_path):
        for wrong in ({"context": 1}, {"samples": 0}):
            [(name, value)] = wrong.items()
            with pytest.raises(ValueError, match=f"{name}: got {value}, want"):
                packed(tmp_path, range(99), **{"context": 8, **wrong})
        with pytest.raises(IndexError):
            packed(tmp_path, range(99), 9)[11]


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_save = state.global_step == 3
        return control


def test_trainer_resumes_exactly(tmp_path):
    """Six steps at once, and three and three, by the Trainer of transformers; the order is that of the seed."""
    documents = [i % 89 + 1 if i % 11 else 90 for i in range(300)]
    seen: dict[str, list[torch.Tensor]] = {}

    def trainer(name: str, *callbacks: TrainerCallback) -> Trainer:
        dataset = packed(tmp_path, documents, 16, end_of_text=90, seed=1, samples=2 * 2 * 6)
        model = tiny_model().train()
        model.register_forward_pre_hook(
            lambda module, args, batch: seen.setdefault(name, []).append(batch["input_ids"].clone()), with_kwargs=True
        )
        arguments = TrainingArguments(
            output_dir=tmp_path / name, max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            train_sampling_strategy="sequential", save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=dataset, callbacks=list(callbacks))

    whole = trainer("whole")
    whole.train()
    trainer("parts", Stop()).train()
    resumed = trainer("parts")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert torch.equal(torch.cat(seen["whole"]), torch.cat(seen["parts"]))
    assert torch.equal(torch.cat(seen["whole"]), input_ids(whole.train_dataset))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def run(code: str) -> subprocess.CompletedProcess:
    folder = str(PACKAGE)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": folder}
    )


def test_is_imported_on_demand_and_says_what_is_missing():
    result = run("import sys, diffqkv; print({'datasets', 'diffqkv.data'} & set(sys.modules))")
    assert result.stdout == "set()\n", result.stderr
    result = run("import sys; sys.modules['datasets'] = None; import diffqkv.data")
    assert "ImportError: diffqkv.data: " in result.stderr and "pip install 'diffqkv[data]'" in result.stderr
