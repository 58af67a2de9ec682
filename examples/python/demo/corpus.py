"""Text to train on: the documentation that every CPython carries, or files that the user names."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diffqkv.data import is_held_out, read_texts

# Folders of the standard library without documentation of their own.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
# One document in twenty is held out; of so few that chance might hold out none, the last twentieth of each.
HELD_OUT = 20
FEW_DOCUMENTS = 200
# A paragraph at least this long is kept only once, so that no held-out text is also trained on.
UNIQUE_PARAGRAPH_BYTES = 32
MINIMUM_BYTES = 20_000
MINIMUM_HELD_OUT_BYTES = 500


class CorpusError(Exception):
    """No usable text. The message is one sentence for the user."""


@dataclass(frozen=True)
class Corpus:
    """Texts to train on and to measure with, one string per document."""

    train: list[str]
    held_out: list[str]
    sha256: str

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of UTF-8 to train on and held out."""
        return tuple(sum(len(text.encode()) for text in part) for part in (self.train, self.held_out))


def build_corpus(documents: Iterable[str]) -> Corpus:
    """Removes duplicates and splits.

    The result depends on the content of the documents alone, not on their order; `sha256` is over all of them after the
    removal.

    Raises:
        CorpusError: fewer than MINIMUM_BYTES of text, or than MINIMUM_HELD_OUT_BYTES held out.
    """
    documents = sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())
    digest, seen = hashlib.sha256(), set()
    train, held_out = [], []
    for document in documents:
        text = _without_repeats(document, seen)
        if not text:
            continue
        digest.update(text.encode() + b"\0")
        if len(documents) < FEW_DOCUMENTS:
            first, last = _cut(text)
            train.append(first)
            held_out.append(last)
        else:
            (held_out if is_held_out(document, 1 / HELD_OUT) else train).append(text)
    corpus = Corpus([t for t in train if t], [t for t in held_out if t], digest.hexdigest())
    total, kept_back = sum(corpus.sizes), corpus.sizes[1]
    if total < MINIMUM_BYTES or kept_back < MINIMUM_HELD_OUT_BYTES:
        raise CorpusError(
            f"not enough text: got {total:,} bytes in {len(documents)} documents, {kept_back:,} of them held out, want "
            f"at least {MINIMUM_BYTES:,} and {MINIMUM_HELD_OUT_BYTES}; "
            'name more text files, for example make demo TEXT="a.txt b.txt"'
        )
    return corpus


def read_files(paths: Iterable[Path]) -> list[str]:
    """The documents of the named files and folders.

    Raises:
        CorpusError: naming the file that cannot be read.
    """
    try:
        return list(read_texts(*paths))
    except ValueError as error:
        raise CorpusError(f"{error}; convert it or leave it out") from None
    except OSError as error:
        raise CorpusError(f"{error.filename}: cannot be read ({error.strerror}); name files of text") from None


def python_documentation() -> list[str]:
    """The topics of Python's `help()` and the docstrings of the standard library's source files: English, not code.

    Raises:
        CorpusError: this Python carries neither.
    """
    documents = [*_help_topics(), *_docstrings(Path(sysconfig.get_path("stdlib")))]
    if not documents:
        raise CorpusError(
            "no text found: this Python carries neither pydoc_data.topics nor the source of its standard library; "
            'name text files instead, for example make demo TEXT="a.txt b.txt"'
        )
    return documents


def _help_topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    yield from topics.values()


def _docstrings(library: Path) -> Iterator[str]:
    """One document per source file: its docstrings in the order of the file."""
    for path in library.rglob("*.py"):
        if SKIPPED_FOLDERS.intersection(path.relative_to(library).parts[:-1]):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            # A few files are meant to be broken (templates, other encodings).
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = sorted((n for n in ast.walk(tree) if isinstance(n, documented)), key=lambda n: getattr(n, "lineno", 0))
        texts = [text for node in nodes if (text := ast.get_docstring(node))]
        if texts:
            # Docstrings may hold lone surrogates, which no UTF-8 text has.
            yield "\n\n".join(texts).encode(errors="replace").decode()


def _without_repeats(text: str, seen: set[bytes]) -> str:
    """Text without the paragraphs in `seen`, to which it adds its own."""
    kept = []
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split()).encode()
        if not words:
            continue
        key = hashlib.sha256(words).digest()
        if len(words) >= UNIQUE_PARAGRAPH_BYTES:
            if key in seen:
                continue
            seen.add(key)
        kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)


def _cut(text: str) -> tuple[str, str]:
    """Text and its last twentieth, cut at the end of a paragraph or, where there is none near, of a line."""
    target = len(text) - len(text) // HELD_OUT
    for end in ("\n\n", "\n", " "):
        at = text.find(end, target)
        if 0 <= at < (target + len(text)) // 2:
            return text[:at], text[at + len(end) :]
    return text[:target], text[target:]
