"""Counts how often the argument lists of the ops are written out between Python and the kernels.

A list is a group in parentheses, brackets or braces, a macro or the fields of a NamedTuple, that names three quarters
of an op's arguments or more. Comments and docstrings do not count, nor does flash_attn_interface.py, whose signatures
are those of another project.

    argument_lists.py [--most N] [FOLDER]    the places, and their number; exit status 1 if it is more than N
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

LISTS = {
    "attention options": "causal softmax_scale window_left window_right softcap sinks kv_start kv_end dropout_p "
    "seed offset",
    "decode_attention": "q k_cache v_cache cache_seqlens cache_start block_table softmax_scale k_layout window_left "
    "window_right softcap sinks",
    "selective_v_attention": "q k_cache v_cache cache_seqlens top_k tail keep_first keep_last v_stats cache_start "
    "block_table softmax_scale k_layout max_error return_bound",
    "kv_cache_update": "k_cache v_cache k v positions cos sin block_table v_stats k_layout",
    "backward tensors": "dout dlse q k v out lse",
}
SHARE = 0.75
PRODUCT = ("python/diffqkv/**/*.py", "csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu", "csrc/**/*.cuh")
_PYTHON_TEXT = re.compile(r'("""|\'\'\').*?\1|#[^\n]*', re.DOTALL)
_C_TEXT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_FIELDS = re.compile(r"^class \w+\(NamedTuple\):\n(?:    [^\n]*\n|\n)*", re.MULTILINE)
_MACRO = re.compile(r"^#define (?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)


def _blank(match: re.Match) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def groups(text: str) -> Iterator[tuple[int, str]]:
    """(line, what stands in the group itself) for each group; what stands in groups inside it is left out."""
    open_groups: list[tuple[int, list[str]]] = []
    line = 1
    for c in text:
        if c in "([{":
            open_groups.append((line, []))
        elif c in ")]}" and open_groups:
            began, parts = open_groups.pop()
            yield began, "".join(parts)
        elif open_groups:
            open_groups[-1][1].append(c)
        line += c == "\n"


def lists(file: Path) -> Iterator[tuple[int, str]]:
    """(line, name of the list) for each list in a file."""
    text = file.read_text()
    text = (_PYTHON_TEXT if file.suffix == ".py" else _C_TEXT).sub(_blank, text)
    found = list(groups(text))
    other = _FIELDS if file.suffix == ".py" else _MACRO
    found += [(text.count("\n", 0, m.start()) + 1, m[0]) for m in other.finditer(text)]
    for line, group in found:
        words = set(re.findall(r"\w+", group))
        shares = {name: len(words & set(x.split())) / len(x.split()) for name, x in LISTS.items()}
        if "window" in words:
            shares["attention options"] += 1 / 11
        most = max(shares, key=shares.get)
        if shares[most] >= SHARE:
            yield line, most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--most", type=int, metavar="N")
    arguments = parser.parse_args()
    counts = dict.fromkeys(LISTS, 0)
    for pattern in PRODUCT:
        for file in sorted(arguments.folder.glob(pattern)):
            if file.name == "flash_attn_interface.py":
                continue
            for line, name in sorted(lists(file)):
                print(f"{file.relative_to(arguments.folder)}:{line}: {name}")
                counts[name] += 1
    print(*(f"{name} {count}" for name, count in counts.items()), sep=", ", end=f": {sum(counts.values())} in all\n")
    return 1 if arguments.most is not None and sum(counts.values()) > arguments.most else 0


if __name__ == "__main__":
    sys.exit(main())
