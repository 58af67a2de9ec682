"""Text for language models: read as a stream, split by content, tokenised into one file, packed into windows.

    read_texts -> is_held_out -> byte_tokenizer or train_bpe -> write_tokens -> PackedDataset

Nothing here holds a corpus in memory, and nothing has a state: a window depends on its number alone, so the number of
the next one is all that a resumed run needs.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

try:
    import numpy as np
    from datasets import load_dataset
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
except ImportError as error:
    raise ImportError(f"diffqkv.data: {error}; pip install 'diffqkv[data]'", name=error.name) from error

__all__ = ["PackedDataset", "byte_tokenizer", "is_held_out", "read_texts", "train_bpe", "write_tokens"]

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
TEXT_SUFFIXES = {".txt", ".md"}
RECORD_SUFFIXES = {".json", ".jsonl", ".parquet"}
COMPRESSED_SUFFIXES = {".bz2", ".gz", ".xz", ".zst"}
# In characters: of a document, and of the documents that are tokenised together. Tokenizers take about a kilobyte of
# memory for each, and from here on more time too.
LONGEST = 1 << 18


def read_texts(*paths: str | Path, field: str = "text", longest: int = LONGEST) -> Iterator[str]:
    """The documents of text files, one `str` each.

    A file is one document; of .jsonl, .json (one object per line, also compressed as .gz, .bz2, .xz, .zst) and .parquet
    files, every record is one, with its text in `field`. Line ends become \\n. Documents without text are left out.

    Args:
        paths: files, folders (every .txt, .md, .jsonl, .json and .parquet file below), or globs; order is kept, and by
            name within a folder or glob.
        longest: characters. What is longer becomes several documents, cut after a blank line, a line or a word: no text
            file needs to fit in memory, and one large file can be split too.

    Raises:
        FileNotFoundError: a path, folder or glob has no file. ValueError: a file is empty, not UTF-8, or not what its
            name says; the message names it and the record.
    """
    if not paths:
        raise ValueError("paths: got none, want files, folders or globs")
    if longest < 1:
        raise ValueError(f"longest: got {longest}, want a positive number")
    files = dict.fromkeys(file for path in paths for file in _files(Path(path)))
    return itertools.chain.from_iterable(_documents(file, field, longest) for file in files)


def is_held_out(text: str, fraction: float = 0.05) -> bool:
    """Whether a document is for measuring and not for training: the SHA-256 of its content alone decides."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: got {fraction}, want one of 0 to 1")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < fraction * 2**64


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Ids 0..255 are bytes, 256 is end of text, 257 padding. `max_length`: the longest input that its model takes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _with_special_tokens(backend, max_length)


def train_bpe(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any UTF-8 text goes in and comes out unchanged. The order of the texts is of no account.

    Args:
        vocab_size: of all tokens: end of text (0), padding (1), 256 bytes, merges.
        max_length: the longest input that its model takes.

    Raises:
        ValueError: vocab_size is below 258, or more than the texts have merges for.
    """
    _refuse_string(texts)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END_OF_TEXT, PADDING]
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(f"vocab_size: got {vocab_size}, want at least {len(alphabet) + len(special)}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocab_size:
        raise ValueError(f"vocab_size: got {vocab_size}, want at most {backend.get_vocab_size()} for so little text")
    return _with_special_tokens(backend, max_length)


def write_tokens(path: str | Path, texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> int:
    """Writes the tokens of all texts, an end of text after each, and returns their number.

    The file is an .npy array `[tokens]`, uint16 where the vocabulary allows it, else uint32. It appears under its name
    when it is whole. A text that spells out a special token is text too.

    Raises:
        ValueError: no texts, or a tokenizer without eos_token.
    """
    _refuse_string(texts)
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("tokenizer: got one without eos_token, want one that marks the end of a text")
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32)
    path, count = Path(path), 0
    # Processes that write the same file do not write into each other's.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            _write_header(file, dtype, 0)
            for batch in _batches(texts):
                for ids in tokenizer(
                    batch,
                    add_special_tokens=False,
                    split_special_tokens=True,
                    return_attention_mask=False,
                    return_token_type_ids=False,
                    verbose=False,
                )["input_ids"]:
                    file.write(np.array([*ids, end], dtype).tobytes())
                    count += len(ids) + 1
            if not count:
                raise ValueError("texts: got none, want at least one")
            file.seek(0)
            _write_header(file, dtype, count)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


class PackedDataset(torch.utils.data.Dataset):
    """Windows of `context` tokens out of a file of `write_tokens`, which stays on disk.

    Item i is a pure function of i. It has what a causal language model of transformers takes, int64 `[context]` each:

    - `input_ids`: the tokens.
    - `position_ids`: count from 0 at the window's start and after every end of text. Models of transformers see from
      them where documents begin, and attention does not cross.
    - `labels`: the tokens, as the models shift them themselves; -100 where `position_ids` is 0, for what comes first
      cannot be predicted.

    A loop resumes at any step, and shares the windows among ranks, by the range it gives:
    `DataLoader(dataset, batch_size, sampler=range(first + rank, len(dataset), world_size))`. The Trainer of
    transformers takes the dataset as it is, with `train_sampling_strategy="sequential"` for the order by seed, and
    resumes and shares by itself. Both may use workers.

    Args:
        end_of_text: the token after every document, or None to take no notice of documents: positions then run through
            the window.
        seed: gives the order. Every epoch is a permutation of windows that are cut at another place; each token is in
            one of them, except fewer than 2 * context at the ends. None: in the order of the file, from its first
            token, which is right for measuring.
        samples: the length of the dataset, in as many epochs as that takes; default: one epoch. It needs eight bytes of
            memory per sample.

    Raises:
        ValueError: the file is not one of tokens, or has too few for a window.
    """

    def __init__(
        self,
        path: str | Path,
        context: int,
        *,
        end_of_text: int | None,
        seed: int | None = None,
        samples: int | None = None,
    ) -> None:
        if context < 2:
            raise ValueError(f"context: got {context}, want at least 2")
        if samples is not None and samples < 1:
            raise ValueError(f"samples: got {samples}, want a positive number")
        self.path, self.context, self.end_of_text = Path(path), context, end_of_text
        self._open()
        slack = 0 if seed is None else context - 1
        per_epoch = (len(self._tokens) - slack) // context
        if per_epoch < 1:
            raise ValueError(f"{path}: got {len(self._tokens)} tokens, want at least {context + slack}")
        samples = per_epoch if samples is None else samples
        epochs = [_starts(per_epoch, context, seed, epoch) for epoch in range(-(-samples // per_epoch))]
        self._sample_starts = np.concatenate(epochs)[:samples]

    def __len__(self) -> int:
        return len(self._sample_starts)

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        start = self._sample_starts[sample]
        tokens = self._tokens[start : start + self.context].astype(np.int64)
        positions = np.arange(self.context)
        if self.end_of_text is not None:
            begins = np.zeros(self.context, bool)
            begins[1:] = tokens[:-1] == self.end_of_text
            positions -= np.maximum.accumulate(positions * begins)
        labels = np.where(positions == 0, -100, tokens)
        items = {"input_ids": tokens, "labels": labels, "position_ids": positions}
        return {name: torch.from_numpy(values) for name, values in items.items()}

    def __getstate__(self) -> dict[str, object]:
        # Pickled for a worker, the memory map would become a copy of the whole file.
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        try:
            self._tokens = np.lib.format.open_memmap(self.path, mode="r")
        except ValueError as error:
            raise ValueError(f"{self.path}: got no whole .npy file, want one of write_tokens ({error})") from error
        if self._tokens.ndim != 1 or self._tokens.dtype.kind != "u":
            got = f"{self._tokens.dtype} {list(self._tokens.shape)}"
            raise ValueError(f"{self.path}: got {got}, want unsigned integers [tokens]")


def _starts(windows: int, context: int, seed: int | None, epoch: int) -> np.ndarray:
    """First tokens of an epoch's windows in their order, int64 `[windows]`."""
    if seed is None:
        return np.arange(windows) * context
    order = np.random.default_rng([seed, epoch])
    return order.permutation(windows) * context + order.integers(context)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _kind(file) in TEXT_SUFFIXES | RECORD_SUFFIXES)
    elif not path.exists() and glob.has_magic(str(path)):
        files = sorted(map(Path, glob.glob(str(path), recursive=True)))
    else:
        path.stat()  # raises what is wrong with it
        return [path]
    files = [file for file in files if file.is_file()]
    if not files:
        raise FileNotFoundError(errno.ENOENT, "no text files", str(path))
    return files


def _kind(path: Path) -> str:
    """The suffix that says what is in the file: .jsonl of x.jsonl.gz."""
    return (path.with_suffix("") if path.suffix in COMPRESSED_SUFFIXES else path).suffix


def _documents(path: Path, field: str, longest: int) -> Iterator[str]:
    try:
        if not path.stat().st_size:
            raise ValueError("got an empty file, want text")
        if _kind(path) in RECORD_SUFFIXES:
            for text in _records(path, field):
                yield from _pieces(io.StringIO(text).read, longest)
        else:
            with path.open(encoding="utf-8") as file:
                yield from _pieces(file.read, longest)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from error
    except (ValueError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: {reason}") from error


def _records(path: Path, field: str) -> Iterator[str]:
    parquet = _kind(path) == ".parquet"
    # Lines, and not datasets' own JSON loader: that gives up where later records have other fields than the first.
    loader = {"path": "parquet", "columns": [field]} if parquet else {"path": "text"}
    rows = load_dataset(**loader, data_files=glob.escape(str(path.absolute())), split="train", streaming=True)
    for number, row in enumerate(rows, start=1):
        if not parquet and not row["text"].strip():
            continue
        try:
            record = row if parquet else json.loads(row["text"])
            text = record.get(field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise ValueError(f"got {str(record)[:80]}, want a string in {field!r}")
            text.encode()  # JSON can spell half a surrogate pair, which no UTF-8 text has
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from error
        yield text


def _pieces(read: Callable[[int], str], longest: int) -> Iterator[str]:
    """What `read(characters)` gives until its end, in pieces of at most `longest` characters."""
    text = ""
    while more := read(longest + 1 - len(text)):
        text += more
        if len(text) > longest:
            cut = _cut(text, longest)
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def _cut(text: str, longest: int) -> int:
    for end in ("\n\n", "\n", " "):
        at = text.rfind(end, longest // 2, longest)
        if at >= 0:
            return at + len(end)
    return longest


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= LONGEST:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _with_special_tokens(backend: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        # A text that spells out a special token is text too.
        split_special_tokens=True,
    )


def _refuse_string(texts: Iterable[str]) -> None:
    if isinstance(texts, str):
        raise TypeError("texts: got one string, want an iterable of strings")


def _write_header(file: io.BufferedWriter, dtype: np.dtype, count: int) -> None:
    """Writes a header of the same size for every count: those of .npy have room for the first axis to grow."""
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (count,)})
