"""Fixtures of all tests: a fixed seed, and the two paths that every op can take."""

import os
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads do not spin: the shapes here are tiny

import pytest
import torch

import diffqkv
from diffqkv.ops import dispatch
from diffqkv.ops import library as compiled

OPS = (*dispatch.OPS.values(), *(dispatch.OPS[name].backward for name in dispatch.BACKWARD))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def library():
    """The compiled ops. Without them the test fails, unless they were left out on purpose."""
    if os.environ.get("DIFFQKV_DISABLE_LIBRARY") == "1":
        pytest.skip("DIFFQKV_DISABLE_LIBRARY=1")
    if not compiled.loaded:
        pytest.fail(f"the compiled library is missing: {compiled.reason}")
    return SimpleNamespace(name="library", **{op.name: op.kernel for op in OPS})


@pytest.fixture(params=["library", "composed"])
def ops(request):
    """The compiled ops, then the plain-torch ones; both with the signatures of the schemas."""
    if request.param == "library":
        return request.getfixturevalue("library")
    return SimpleNamespace(name="composed", **{op.name: op.composed for op in OPS if op.composed})


@pytest.fixture(params=["library", "composed"])
def api(request, monkeypatch):
    """The public functions, over the compiled ops and over plain torch."""
    if request.param == "library":
        request.getfixturevalue("library")
    else:
        monkeypatch.setattr(dispatch, "uses_kernel", lambda *args, **options: False)
    return diffqkv


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
