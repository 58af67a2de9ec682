"""`python -m diffqkv study`. Exit status: 0 done, 2 bad options, no memory, or a part is missing, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ._arguments import positive

GRIDS = {
    "small": ((0, 2048, 4096), (2048, 4096)),
    "default": ((0, 2048, 4096, 16384, 32768), (2048, 4096, 8192, 16384, 32768)),
    # Section 3.3.1.
    "paper": ((0, 2048, 4096, 16384, 32768, 65536), (2048, 4096, 8192, 16384, 32768, 65536)),
}
EXIT_INTERRUPTED = 130
_DTYPES = ("bfloat16", "float32", "float16")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "study",
        help="the paper's efficiency study, on this machine and on shapes of one's own",
        description="Measures decode steps of DiffQKV beside grouped-query attention by the length of the text: KV "
        "cache, attention, augmented Q and all of it (section 3.3 of the paper). Writes samples, tables, figures and a "
        "report. The same command goes on where it was interrupted.",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of the results; new, or of the same study (default: study)"
    )
    parser.add_argument("--minutes", type=positive(float), default=15.0, metavar="N", help="at most (default: 15)")
    parser.add_argument("--grid", choices=GRIDS, default="default", help="of prefixes and outputs (default: to 64k)")
    parser.add_argument("--config", default="sigma-1.5b", metavar="SHAPE", help="preset, or folder with config.json")
    parser.add_argument("--heads", metavar="Q/K/V", help="instead of the configuration's, as 32/4/16")
    parser.add_argument("--dims", metavar="K/V", help="of a head, instead of the configuration's, as 64/64")
    parser.add_argument("--layers", metavar="N", default="1", help='measured, or "all" (default: 1)')
    parser.add_argument("--systems", nargs="+", metavar="SYSTEM", help="see the documentation (default: the main ones)")
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=["bfloat16"], metavar="DTYPE")
    parser.add_argument("--batch", nargs="+", type=positive(int), default=[1], metavar="N", help="sequences at once")
    parser.add_argument("--device", default=None, help='"cpu" or "cuda"; with --advise also a GPU by name, as "h100"')
    parser.add_argument("--advise", action="store_true", help="answer by the cost model alone, in seconds")
    parser.add_argument(
        "--weights", choices=("plain", "packed", "int8", "int4"), help="form of the weights for --advise"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        return _advise(args) if args.advise else _study(args)
    except (ImportError, MemoryError, NotImplementedError, OSError, ValueError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("study: interrupted; the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED


def _advise(args: argparse.Namespace) -> int:
    import torch

    from ..study.advise import advise, curves, reading_rate
    from ..study.systems import configuration, systems_of

    config = configuration(args.config, args.heads, args.dims)
    twin = systems_of(config)["std"]
    rate, source = reading_rate(args.device or "cpu")
    drawn = []
    for dtype in args.dtypes:
        for batch in args.batch:
            advice = advise(config, twin, args.weights or "plain", getattr(torch, dtype), batch, rate)
            print(" ".join(advice.sentences))
            if args.out:
                from ..study.figures import advice as draw

                args.out.mkdir(parents=True, exist_ok=True)
                labels = tuple(systems_of(config)[name].label for name in ("sigma", "std"))
                found = curves(advice, config.num_hidden_layers)
                stem = args.out / f"advice-{dtype}-batch{batch}"
                drawn += draw(*found, labels, advice.total_from, stem)
    print(f"By the bytes of a step at {rate / 1e9:.1f} GB/s: {source}.")
    for file in drawn:
        print(file)
    return 0


def _study(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from ..benchmarks.common.report import table, write
    from ..ops import library
    from ..study.measure import Size
    from ..study.report import ket_rows, striking, text
    from ..study.results import results
    from ..study.run import Recipe, check_memory, take_samples
    from ..study.samples import Samples
    from ..study.systems import chosen, configuration

    out = args.out or Path("study")
    if args.weights is not None:
        raise ValueError("--weights: got one without --advise, want --systems, such as sigma-int8")
    if not library.loaded:
        raise ImportError(f"there is no compiled library to measure: {library.reason}")
    known = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    device = args.device or known[-1]
    if device not in known:
        raise ValueError(f"--device: got {device!r}, want {' or '.join(known)}: a study measures what is here")
    config = configuration(args.config, args.heads, args.dims)
    prefixes, outputs = GRIDS[args.grid]
    recipe = Recipe(
        config,
        _layers(args.layers, config.num_hidden_layers),
        chosen(args.systems, config),
        [Size(getattr(torch, dtype), batch) for dtype in args.dtypes for batch in args.batch],
        prefixes,
        outputs,
        torch.device(device),
    )
    check_memory(recipe)
    with Samples(out, recipe.identity()) as samples:
        with tqdm(total=100, unit="%", disable=None, bar_format="{l_bar}{bar}| {elapsed}<{remaining} {desc}") as bar:

            def show(doing: str, share: float) -> None:
                bar.set_description_str(doing, refresh=False)
                bar.update(round(100 * share) - bar.n)

            left_out = take_samples(recipe, samples, 60 * args.minutes, show)
        found = results(recipe, samples, left_out)
    write(out / "results.json", json.dumps(found, indent=1) + "\n")
    drawn, why_not = [], None
    sizes = [size.keys for size in recipe.sizes]
    try:
        from ..study.figures import draw

        for size in sizes:
            drawn += draw(found, size, out)
    except ImportError as error:
        why_not = f"{error}; pip install 'diffqkv[study]'"
        print(f"study: no figures: {why_not}", file=sys.stderr)
    ket = [{k: str(v) for k, v in size.items()} | row for size in sizes for row in ket_rows(found, size)]
    write(out / "table8.md", "\n".join(table(ket) if ket else ["Nothing was measured."]) + "\n")
    write(out / "report.md", text(found, drawn, why_not))
    print(striking(found))
    print(out / "report.md")
    return 0


def _layers(text: str, most: int) -> int:
    if text == "all":
        return most
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise ValueError(f"--layers: got {text!r}, want 1 to {most}, or all")
    return int(text)
