"""Folders that tests look into or hand to other processes."""

from pathlib import Path

import diffqkv

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[2]
PACKAGE = Path(diffqkv.__file__).parents[1]  # for PYTHONPATH
