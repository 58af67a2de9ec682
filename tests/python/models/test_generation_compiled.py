"""generate and single steps under torch.compile: the same tokens, in few graphs."""

import pytest
import torch
from test_generation import generate, prompts
from tiny_sigma import cache_in, logits, tiny_model, tokens
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

import diffqkv


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def compile_config(backend="aot_eager"):
    config = CompileConfig(fullgraph=True, mode=None, backend=backend)
    config._compile_all_devices = True  # transformers compiles on GPUs only, unless told
    return config


def forget_compiled_code(model):
    torch.compiler.reset()
    model.__dict__.pop("_compiled_call", None)
    counters.clear()


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("chunk", [None, 5])
def test_generate_compiles_a_static_cache(model, chunk):
    """Its masks are built before the compiled forward pass, which builds them a second time; and K and V come with all
    slots of the cache. With chunked prefill the buffers are reserved before compiled code would own them."""
    for padding in ("none", "left"):
        ids, mask = prompts(padding, 2)
        want = generate(model, ids, mask)
        forget_compiled_code(model)
        options = {"cache_implementation": "static", "compile_config": compile_config(), "prefill_chunk_size": chunk}
        for _ in range(2):
            out = generate(model, ids, mask, return_dict_in_generate=True, **options)
            assert torch.equal(out.sequences, want)
        assert 1 <= graphs() <= (2 if chunk is None else 4)
        assert all(layer.values.shape[-1] == 2 * layer.keys.shape[-1] for layer in cache_in(out).layers)
    forget_compiled_code(model)


def test_generate_runs_the_code_of_inductor(model):
    ids, mask = prompts("left", 2)
    want = generate(model, ids, mask)
    forget_compiled_code(model)
    options = {"cache_implementation": "static", "compile_config": compile_config("inductor")}
    assert torch.equal(generate(model, ids, mask, **options), want)
    assert graphs() == 1
    forget_compiled_code(model)


def test_generate_compiles_no_cache_of_ours_by_itself(model):
    """A cache that says it is compileable is compiled on every GPU, unasked: ours counts in Python, and does not."""
    assert not diffqkv.Cache(model.config, max_length=32).is_compileable
    forget_compiled_code(model)
    for past in (diffqkv.Cache(model.config), diffqkv.Cache(model.config, max_length=32)):
        generate(model, tokens(1, 5), cache=past, compile_config=compile_config())
    assert graphs() == 0


@pytest.mark.parametrize("kind", ["growing", "fixed", "static"])
def test_steps_compiled_by_hand(model, kind):
    """A few graphs for all steps, while our cache counts in Python and grows in place, or a static one fills."""
    ids = tokens(1, 9)
    want = generate(model, ids, max_new_tokens=60)
    past = {
        "growing": lambda: diffqkv.Cache(model.config),
        "fixed": lambda: diffqkv.Cache(model.config, max_length=96),
        "static": lambda: StaticCache(config=model.config, max_cache_len=96),
    }[kind]()
    forget_compiled_code(model)
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    new = [logits(model, ids, cache=past)[:, -1:].argmax(-1)]
    for position in range(9, 68):
        positions = torch.tensor([[position]])
        new.append(logits(step, new[-1], cache=past, position_ids=positions)[:, -1:].argmax(-1))
    assert torch.equal(torch.cat([ids, *new], 1), want)
    assert 1 <= graphs() <= {"growing": 4, "fixed": 3, "static": 2}[kind]
    forget_compiled_code(model)
