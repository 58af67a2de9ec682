"""What a conversion reads and writes besides weights: sample text, the folder of the result, what comes along."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from .checkpoint import Checkpoint, sync

# Files that come along.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def sample_windows(
    text: str | Path | Sequence[str | Path],
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    context: int,
    tokens: int,
    least: int,
) -> Tensor | None:
    """Windows of text `[windows, context]` for the model in a checkpoint, at least so many; None without text.

    Raises:
        FileNotFoundError, ValueError: saying what is wrong.
    """
    if not text:
        return None
    from .measure import read_windows  # needs diffqkv.data

    longest = config.max_position_embeddings
    if not 2 <= context <= longest:
        raise ValueError(f"context: got {context}, want 2 to max_position_embeddings ({longest})")
    if tokens < least * context:
        raise ValueError(f"text_tokens: got {tokens}, want at least {least * context}: {least} windows of context")
    files = [text] if isinstance(text, (str, Path)) else text
    return read_windows(files, checkpoint.folder, config.vocab_size, context, tokens, least)


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Raises ValueError unless a model may be written to output, an absolute path."""
    if source.resolve().is_relative_to(output):
        raise ValueError(f"output: got {output}, where the source is, want another folder")
    if output.is_file() or os.path.ismount(output):
        raise ValueError(f"output: got {output}, a file or a mount point, want a folder that can be renamed")
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            raise ValueError(f"output: got {output}, which is not empty, want an empty folder or overwrite")
        if not (output / CONFIG_NAME).exists():
            raise ValueError(f"output: got {output}, which is no model's, want a model's to overwrite")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside the output, which takes its place in the end; after an error, or an interruption, it goes."""
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        replaced = output.with_name(f".{output.name}.{os.getpid()}.replaced")
        if output.exists():
            output.rename(replaced)
        part.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def copy_companions(source: Path, folder: Path) -> None:
    for path in source.iterdir():
        if any(fnmatch(path.name, pattern) for pattern in _COMPANIONS):
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception:  # a source may have none, or one that needs packages of its own
        return
    # The class follows from the kind of model too, which is another now.
    path, name = folder / "tokenizer_config.json", type(tokenizer).__name__
    settings = json.loads(path.read_text()) if path.exists() else {}
    if "auto_map" not in settings and settings.get("tokenizer_class") != name:
        path.write_text(json.dumps({**settings, "tokenizer_class": name}, indent=2) + "\n")


def write_report(path: Path, report: dict[str, object]) -> None:
    """Writes the report, and leaves all files of its folder on the disk."""
    path.write_text(json.dumps(report, indent=2) + "\n")
    for file in path.parent.iterdir():
        if file.is_file():
            sync(file)
