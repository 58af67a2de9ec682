"""`python -m diffqkv bench`.

Exit status: 0 all results are right, 1 one is wrong (its line has no times), 2 bad options or a part is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from ..benchmarks.common.inputs import dtype_name
from ..benchmarks.common.line import TOLERANCE
from ..benchmarks.common.report import write
from ..benchmarks.cpu.cases import CASES, case
from ..benchmarks.cpu.cases import run as run_case
from ..benchmarks.cpu.report import machine, markdown
from ..ops import library
from ._arguments import positive

EXIT_RIGHT, EXIT_WRONG, EXIT_MISSING = 0, 1, 2
_DTYPES = {dtype_name(dtype): dtype for dtype in TOLERANCE}


def _output(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text}, want a file in an existing folder")
    return path


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure the CPU kernels beside torch, the machine's limits and the targets",
        description="Measures the CPU kernels of a Sigma-1.5B layer beside torch and the machine's limits, checks "
        "their results, and says which targets they reach. Exit status 1: a result is wrong.",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--dtypes", nargs="+", choices=_DTYPES, default=list(_DTYPES), metavar="DTYPE", help=", ".join(_DTYPES)
    )
    parser.add_argument("--tokens", nargs="+", type=positive(int), metavar="N", help="instead of each case's own")
    parser.add_argument("--seconds", type=positive(float), default=2.0, help="per line, about (default: 2)")
    parser.add_argument("--threads", type=positive(int), help="default: torch's")
    parser.add_argument("--json", type=_output, metavar="FILE", help="write the results as numbers")
    parser.add_argument("--markdown", type=_output, metavar="FILE", help="write the table that is printed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not library.loaded:
        print(f"bench: there is no compiled library to measure: {library.reason}", file=sys.stderr)
        return EXIT_MISSING
    try:
        from tqdm import tqdm

        from .. import Cache  # noqa: F401
    except ImportError as error:
        print(f"bench: {error}: pip install 'diffqkv[bench]'", file=sys.stderr)
        return EXIT_MISSING
    if args.threads:
        torch.set_num_threads(args.threads)

    planned = []
    for name in args.cases:
        sizes = case(name).SIZES
        if args.tokens:
            sizes = dict.fromkeys(size._replace(tokens=tokens) for size in sizes for tokens in args.tokens)
        planned += [(name, size, dtype) for dtype in args.dtypes for size in sizes]

    records, facts = [], machine()
    with tqdm(planned, unit="line", disable=None) as progress:
        for name, size, dtype in progress:
            progress.set_postfix_str(f"{name} {size} {dtype}")
            records.append(run_case(name, size, _DTYPES[dtype], args.seconds))
            # After each line: whatever ends the run early leaves what it measured.
            table = markdown(facts, records)
            if args.json:
                write(args.json, json.dumps({"machine": facts, "lines": records}, indent=1) + "\n")
            if args.markdown:
                write(args.markdown, table)
    print(table, end="")
    return EXIT_RIGHT if all(record["correct"] for record in records) else EXIT_WRONG
