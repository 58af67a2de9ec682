"""Which function computes a call of attention "diffqkv", and which object stores K and V for it, and how."""

import inspect
from itertools import product

import pytest
import torch
from tiny_sigma import ATTENTIONS, CACHE, logits, tiny_model, tokens
from transformers import DynamicCache

import diffqkv
from diffqkv.models import attention
from diffqkv.models.attention import DiffqkvAttention, Route, diffqkv_attention, route
from diffqkv.models.sigma import modeling_sigma
from diffqkv.models.sigma.modeling_sigma import StockAttention

STEP, COMPILED, PACKED = {"is_prompt": False}, {"is_compiling": True}, {"is_packed": True}
TABLE = [
    # prompts and training
    ({}, Route.FLASH),
    ({"records_graph": True}, Route.FLASH),
    ({"drops_out": True}, Route.FLASH),
    ({"is_causal": False}, Route.FLASH),
    ({"can_decode": False}, Route.FLASH),
    ({"selects_v": True}, Route.FLASH),
    ({"has_varlen_kernel": False}, Route.FLASH),
    ({"has_dense_mask": True}, Route.STOCK),
    ({"wants_weights": True}, Route.STOCK),
    # packed rows
    (PACKED, Route.VARLEN),
    (PACKED | {"has_varlen_kernel": False}, Route.VARLEN),
    (PACKED | {"records_graph": True, "drops_out": True}, Route.VARLEN),
    (PACKED | {"has_dense_mask": True}, Route.STOCK),
    (PACKED | {"wants_weights": True}, Route.STOCK),
    # steps with cached tokens
    (STEP, Route.DECODE),
    (STEP | {"selects_v": True}, Route.SELECTIVE_V),
    *(
        (STEP | fact | selects, taken)
        for selects in ({}, {"selects_v": True})
        for fact, taken in (
            ({"records_graph": True}, Route.FLASH),
            ({"drops_out": True}, Route.FLASH),
            ({"is_causal": False}, Route.FLASH),
            ({"can_decode": False}, Route.FLASH),
            ({"has_dense_mask": True}, Route.STOCK),
            ({"wants_weights": True}, Route.STOCK),
        )
    ),
    # compiled code
    (COMPILED, Route.FLASH),
    (COMPILED | {"records_graph": True}, Route.FLASH),
    (COMPILED | {"drops_out": True}, Route.STOCK),
    (COMPILED | PACKED, Route.VARLEN),
    (COMPILED | PACKED | {"has_varlen_kernel": False}, Route.STOCK),
    (COMPILED | PACKED | {"drops_out": True}, Route.STOCK),
    (COMPILED | STEP, Route.DECODE),
    (COMPILED | STEP | {"selects_v": True}, Route.SELECTIVE_V),
    (COMPILED | STEP | {"records_graph": True}, Route.STOCK),
    (COMPILED | STEP | {"drops_out": True}, Route.STOCK),
    (COMPILED | STEP | {"is_causal": False}, Route.FLASH),
    (COMPILED | STEP | {"can_decode": False}, Route.FLASH),
    (COMPILED | {"has_dense_mask": True}, Route.STOCK),
]


@pytest.mark.parametrize("facts, taken", TABLE, ids=lambda x: x.name if isinstance(x, Route) else "-".join(x) or "none")
def test_routes(facts, taken):
    assert route(**facts) is taken


def test_no_route_computes_what_its_function_does_not_know():
    names = inspect.signature(route).parameters
    for values in product([False, True], repeat=len(names)):
        facts = dict(zip(names, values, strict=True))
        taken = route(**facts)
        if facts["has_dense_mask"] or facts["wants_weights"]:
            assert taken is Route.STOCK
        if taken in (Route.DECODE, Route.SELECTIVE_V):
            assert facts["is_causal"] and facts["can_decode"] and not facts["is_prompt"] and not facts["is_packed"]
            assert not facts["records_graph"] and not facts["drops_out"]
        if taken is Route.SELECTIVE_V:
            assert facts["selects_v"]
        if facts["is_compiling"] and facts["drops_out"]:
            assert taken is Route.STOCK


CALLS = [
    ({}, 12, Route.FLASH),
    ({"dropout": 0.5}, 12, Route.FLASH),
    ({"is_causal": False}, 12, Route.FLASH),
    ({"cu_seq_lens_q": torch.tensor([0, 5, 12, 20, 24])}, 12, Route.VARLEN),
    ({"output_attentions": True}, 12, Route.STOCK),
    ({"attention_mask": torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()}, 12, Route.STOCK),
    ({}, 3, Route.DECODE),
    ({"dropout": 0.5}, 3, Route.FLASH),
    ({"selective_v": {"top_k": 2}}, 3, Route.SELECTIVE_V),
    ({"selective_v": {"top_k": 2}, "is_causal": False}, 3, Route.FLASH),
    ({"selective_v": {"top_k": 2}}, 12, Route.FLASH),
]


@torch.no_grad()
@pytest.mark.parametrize("options, queries, taken", CALLS)
def test_a_call_runs_the_function_of_its_route_and_no_other(options, queries, taken, monkeypatch):
    called = []
    for each in Route:
        function = getattr(attention, each.value)

        def recorded(*args, _route=each, _function=function, **kwargs):
            called.append(_route)
            return _function(*args, **kwargs)

        monkeypatch.setattr(attention, each.value, recorded)
    module = tiny_model().model.layers[0].self_attn
    q, k, v = torch.randn(2, 8, queries, 16), torch.randn(2, 2, 12, 16), torch.randn(2, 4, 12, 16)
    out, _ = diffqkv_attention(module, q, k, v, **({"attention_mask": None} | options))
    assert called == [taken] and out.shape == (2, queries, 8, 16)


# ---------------------------------------------------------------- the attention objects of a model


def test_both_objects_have_the_same_methods():
    for name in ("store", "attend"):
        stock, ours = (inspect.signature(getattr(kind, name)) for kind in (StockAttention, DiffqkvAttention))
        positional = [x for x in ours.parameters if x not in ("args", "kwargs")]
        assert list(stock.parameters)[: len(positional)] == positional
    for name in ("takes_packed_rows", "selects_v_rows"):
        assert getattr(DiffqkvAttention, name) is True and getattr(StockAttention, name) is False


@pytest.mark.parametrize("name", ATTENTIONS)
def test_one_object_serves_a_forward_pass(name, monkeypatch):
    chosen, choose = [], modeling_sigma._chosen_attention
    monkeypatch.setattr(modeling_sigma, "_chosen_attention", lambda config: chosen.append(choose(config)) or chosen[-1])
    model = tiny_model()
    model.set_attn_implementation(name)
    want = logits(model, tokens(1, 5), use_cache=False)
    assert [type(x) for x in chosen] == [DiffqkvAttention if name == "diffqkv" else StockAttention]
    # A layer that is called alone chooses for itself.
    hidden, seen = torch.randn(1, 5, 64), model.model.layers[0]
    rope = model.model.rotary_emb(hidden, torch.arange(5)[None])
    causal = None if name != "eager" else torch.full((5, 5), torch.finfo(hidden.dtype).min).triu(1)
    alone = seen(hidden, position_embeddings=rope, attention_mask=causal)
    assert len(chosen) == 2 and alone.shape == hidden.shape
    torch.testing.assert_close(
        seen(hidden, position_embeddings=rope, attention_mask=causal, attention=chosen[0]), alone
    )
    assert len(chosen) == 2 and want.isfinite().all()


@pytest.mark.parametrize("compression", [None, "expand"])
def test_a_cache_is_written_in_place_where_it_can_be(compression, monkeypatch):
    calls = []
    for kind, name in (
        (diffqkv.cache.layers.CacheLayer, "append"),
        (diffqkv.Cache, "update"),
        (DynamicCache, "update"),
    ):
        method = getattr(kind, name)

        def recorded(*args, _name=f"{kind.__name__}.{name}", _method=method, **kwargs):
            calls.append(_name)
            return _method(*args, **kwargs)

        monkeypatch.setattr(kind, name, recorded)
    for kind, dtype, records_graph, attention_name, want in (
        (diffqkv.Cache, torch.float32, False, "diffqkv", "CacheLayer.append"),
        (diffqkv.Cache, torch.bfloat16, False, "diffqkv", "CacheLayer.append"),
        (diffqkv.Cache, torch.float64, False, "diffqkv", "Cache.update"),
        (diffqkv.Cache, torch.float32, True, "diffqkv", "Cache.update"),
        (diffqkv.Cache, torch.float32, False, "sdpa", "Cache.update"),
        (DynamicCache, torch.float32, False, "diffqkv", "DynamicCache.update"),
        (DynamicCache, torch.float32, False, "eager", "DynamicCache.update"),
    ):
        model = tiny_model(k_compression=compression).to(dtype)
        model.set_attn_implementation(attention_name)
        calls.clear()
        with torch.set_grad_enabled(records_graph):
            out = model(tokens(1, 5), cache=kind(config=model.config) if kind is DynamicCache else kind(model.config))
        assert out.get(CACHE).get_seq_length() == 5
        assert set(calls) == {want}, (kind, dtype, records_graph, attention_name)


def test_what_files_of_earlier_releases_use_is_there():
    """Their models, saved beside checkpoints, call the attention function and write the cache themselves."""
    assert diffqkv_attention.takes_unequal_heads is True
    assert {"kv_cache", "v_stats", "selective_v"} <= inspect.signature(diffqkv_attention).parameters.keys()
    assert list(diffqkv.models.mask.packing_of(torch.tensor([[True, False, True]])).cu_seqlens_q) == [0, 2, 3]
    for name in ("check_cache", "reserve_static_cache"):
        assert callable(getattr(diffqkv.cache, name))
    cache = diffqkv.Cache([(2, 16, 4, 16)])
    layer = cache.layers[0]
    cos, sin = torch.ones(1, 3, 16), torch.zeros(1, 3, 16)
    k, v = torch.randn(1, 2, 3, 16), torch.randn(1, 4, 3, 16)
    layer.append(k, v, cos, sin)
    keys, values = layer.dense()
    assert torch.equal(keys, k) and torch.equal(values, v) and layer.v_stats().shape == (1, 4, 17)
    q, kv_cache = torch.randn(1, 8, 1, 16), (layer.k_cache, layer.v_cache, layer.k_layout)
    module = tiny_model().model.layers[0].self_attn
    mask = diffqkv.models.mask.diffqkv_mask(1, 1, 3, q_offset=2)
    out, _ = diffqkv_attention(module, q, k, v, mask, kv_cache=kv_cache, v_stats=layer.v_stats, selective_v=None)
    want, _ = diffqkv_attention(module, q, k, v, None)
    torch.testing.assert_close(out, want)
