"""`python -m diffqkv quantize`. Exit status: 0 quantised, 2 bad options, a bad source, or a part is missing."""

from __future__ import annotations

import argparse
import sys

from .convert import add_options, add_places, aligned, differences, given_options, perplexities


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "quantize",
        help="make a Sigma checkpoint with weights of 8 or 4 bits",
        description="Makes a Sigma checkpoint whose linear layers hold integers of 8 or 4 bits of one with plain "
        "weights; reports what it saves and, on text, what it changes.",
    )
    add_places(parser)
    parser.add_argument("--weights", choices=("int8", "int4"), required=True, help="form of the linear layers")
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="input features that share a scale (default: 32; up to 256)"
    )
    add_options(parser, "to measure the result with")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = given_options(args)
    try:
        from diffqkv.convert import to_integers

        report = to_integers(args.source, args.output, **options)
    except (ImportError, OSError, ValueError) as error:
        print(f"quantize: {error}", file=sys.stderr)
        return 2
    print(table(report))
    return 0


def table(report: dict) -> str:
    """The report in lines."""
    before, after, text = report["before"], report["after"], report["text"]
    lines = [("", "before", "after"), ("weights", "plain", f"{report['weights']} by groups of {report['group_size']}")]
    lines += [(name, f"{before[name]:,}", f"{after[name]:,}") for name in ("parameters", "bytes")]
    lines.append(("bits_per_weight", *(f"{side['bits_per_weight']:.2f}" for side in (before, after))))
    return "\n".join([*aligned([*lines, *perplexities(text)]), *differences(text)])
