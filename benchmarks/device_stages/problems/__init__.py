"""Inputs of every op, and the rules for its results."""

from __future__ import annotations

from .base import Case, Problem, Subject
from .cache_update import CacheUpdate
from .cached import Decode, Selective
from .flash import Dense, Varlen
from .swiglu import Swiglu

# In the order of their importance.
SUBJECTS: dict[str, Subject] = {
    subject.op: subject
    for subject in (
        Decode(),
        Dense(backward=False),
        Dense(backward=True),
        CacheUpdate(),
        Selective(),
        Varlen(backward=False),
        Varlen(backward=True),
        Swiglu(backward=False),
        Swiglu(backward=True),
    )
}

__all__ = ["SUBJECTS", "Case", "Problem", "Subject"]
