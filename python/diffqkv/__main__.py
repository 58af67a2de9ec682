"""`python -m diffqkv`: prints the configuration; `bench` measures, `convert` makes checkpoints of others, `quantize`
makes their weights integers, `run` runs other packages' commands with the models known, `study` repeats the paper's
efficiency study."""

import argparse
import sys
from collections.abc import Sequence

from . import show_config
from .commands import bench, convert, quantize, run, study


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m diffqkv", description="Without a command: print the configuration of diffqkv."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    bench.add_parser(commands)
    convert.add_parser(commands)
    quantize.add_parser(commands)
    run.add_parser(commands)
    study.add_parser(commands)
    args = parser.parse_args(arguments)
    if "run" in args:
        return args.run(args)
    show_config()
    return 0


if __name__ == "__main__":
    sys.exit(main())
