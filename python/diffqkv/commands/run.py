"""`python -m diffqkv run`: a command of another package, in a process where transformers knows the SIGMA models."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import entry_points

from .. import _transformers


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "run",
        help="run a command of another package, which then knows the SIGMA models",
        description="Runs a command that a Python package installs, such as lm-eval or transformers, in a process "
        "where transformers knows the SIGMA models: they load without trust_remote_code.",
    )
    parser.add_argument("command", help="its name")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    scripts = list(entry_points(group="console_scripts", name=args.command))
    if not scripts:
        print(f"run: got {args.command!r}, want the name of a command of an installed Python package", file=sys.stderr)
        return 2
    if _transformers.error is not None:
        print(f"run: {_transformers.why_not()}", file=sys.stderr)
        return 2
    import transformers

    from ..models.sigma.modeling_sigma import AUTO_CLASSES

    # `transformers serve` looks a checkpoint's class up in transformers itself, and nowhere else.
    for model in AUTO_CLASSES.values():
        setattr(transformers, model.__name__, model)
    sys.argv = [args.command, *args.arguments]
    return scripts[0].load()()
