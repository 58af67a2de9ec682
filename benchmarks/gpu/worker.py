"""A job in a process of its own. The fork server imports this module once, so that a job starts at once."""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

sys.modules.setdefault("transformers", None)  # the package would import it, for seconds; the ops need none

import torch  # noqa: E402

from diffqkv.benchmarks.common.report import write  # noqa: E402

from .context import Context  # noqa: E402


def work(module: str, function: str, arguments: tuple, device: str, threads: int, result: Path, log: Path) -> None:
    """Runs `module.function(context, *arguments)`; what it finds goes to the file `result`, what it prints to `log`."""
    os.setsid()  # a group, to be ended with all that it starts
    with open(log, "wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(threads)
    context = Context(device, lambda found: write(result, json.dumps(found)))
    status = 0
    try:
        context.run(getattr(import_module(module), function), *arguments)
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)  # a device that hangs must not keep the process from ending
