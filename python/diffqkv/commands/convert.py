"""`python -m diffqkv convert`. Exit status: 0 converted, 2 bad options, a bad source, or a part is missing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

_ONLY_TO_SIGMA = ("num_key_heads", "num_value_heads", "key_map", "q_aug_dim")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="make a Sigma checkpoint of a Llama's, or the reverse",
        description="Makes a Sigma checkpoint of one of Llama, Mistral or Qwen2, with fewer K heads, or a Llama "
        "checkpoint of one of Sigma; reports what it costs and, on text, what it changes.",
    )
    add_places(parser)
    parser.add_argument("--to", choices=("sigma", "llama"), default="sigma", help="default: sigma")
    parser.add_argument("--key-heads", dest="num_key_heads", type=int, metavar="N", help="K heads (needed to sigma)")
    parser.add_argument("--value-heads", dest="num_value_heads", type=int, metavar="N", help="default: the source's")
    parser.add_argument(
        "--k-map",
        dest="key_map",
        choices=("mean", "fit"),
        help="K heads are mean-pooled (default), or those that change the scores least on --text",
    )
    parser.add_argument(
        "--q-aug-dim", type=int, metavar="N", help="add augmented Q, fitted on --text to change nothing"
    )
    add_options(parser, "to fit to, and to measure the result with")
    parser.set_defaults(run=run)


def add_places(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that makes a checkpoint of another."""
    parser.add_argument(
        "source", type=Path, help="folder of safetensors, or the id of a model in the hub's local cache"
    )
    parser.add_argument("output", type=Path, help="a new or empty folder")


def add_options(parser: argparse.ArgumentParser, text_help: str) -> None:
    """The options of a command that makes a checkpoint of another."""
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help=text_help)
    parser.add_argument("--text-tokens", type=int, metavar="N", help="read at most so many (default: 16384)")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a window of text (default: 512)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the source's")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of an output file (default: 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model in the output folder")


def given_options(args: argparse.Namespace) -> dict[str, object]:
    """All options that were given, as the Python function behind a command takes them."""
    import torch

    options = {name: value for name, value in vars(args).items() if value is not None}
    del options["run"], options["source"], options["output"]
    if args.dtype:
        options["dtype"] = getattr(torch, args.dtype)
    return options


def run(args: argparse.Namespace) -> int:
    options = given_options(args)
    del options["to"]
    try:
        from diffqkv.convert import to_llama, to_sigma

        if args.to == "sigma":
            if args.num_key_heads is None:
                raise ValueError("--key-heads: got none, want the number of K heads of the Sigma")
            report = to_sigma(args.source, args.output, **options)
        else:
            for name in _ONLY_TO_SIGMA:
                if name in options:
                    raise ValueError(f"{name}: got {options[name]} with --to llama, want none: the source decides")
            report = to_llama(args.source, args.output, **options)
    except (ImportError, OSError, ValueError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    print(table(report))
    return 0


def table(report: dict) -> str:
    """The report in lines."""
    before, after, text = report["before"], report["after"], report["text"]
    lines = [("", "before", "after")]
    lines += [(name, before[name], after[name]) for name in ("model_type", "dtype")]
    lines.append(("heads q/K/V", *("/".join(map(str, side["heads"])) for side in (before, after))))
    lines += [(name, f"{before[name]:,}", f"{after[name]:,}") for name in ("parameters", "cache_bytes_per_token")]
    rows = aligned([*lines, *perplexities(text)])
    if report.get("fit"):
        for name in report["fit"]["layers"][0]:
            errors = [layer[name] for layer in report["fit"]["layers"]]
            rows.append(f"{name}: {sum(errors) / len(errors):.3g}, worst layer {max(errors):.3g} (parts of the square)")
    return "\n".join([*rows, *differences(text)])


def aligned(lines: list[tuple[str, ...]]) -> list[str]:
    """Lines of cells as lines of a table."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def perplexities(text: dict | None) -> list[tuple[str, ...]]:
    """The line of a table for what `compare` has measured, if it has."""
    return [("perplexity", *(f"{text['perplexity'][side]:.4g}" for side in ("before", "after")))] if text else []


def differences(text: dict | None) -> list[str]:
    """The line under a table for what `compare` has measured, if it has."""
    if not text:
        return []
    return [
        f"perplexity: {text['perplexity_quotient']:.5f} of that before; logits: largest difference "
        f"{text['max_logit_difference']:.3g}, mean KL divergence {text['mean_kl']:.3g} nats, over {text['tokens']:,} "
        f"tokens"
    ]
