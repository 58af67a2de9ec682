"""What goes into a diffqkv.Cache and comes out of it: caches of transformers, and tensors that tools assign."""

import copy
from importlib.util import find_spec

import pytest
import torch
from test_cache import DTYPES, SHAPE, SHAPES, assert_holds, feed, grouped, new_tokens, sliding
from tiny_sigma import tiny_config, tiny_model, tokens
from transformers import DynamicCache, MistralConfig, StaticCache

from diffqkv import Cache, reference
from diffqkv.cache import CacheShape

# ---------------------------------------------------------------- caches of transformers, in and out


@pytest.mark.parametrize("by_update", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_out_to_a_dynamic_cache_and_back(shape, dtype, by_update):
    k, v = new_tokens(shape, 40, dtype=dtype)
    cache, groups = Cache([shape]), Cache([shape]).shapes[0].groups
    if by_update:
        cache.update(grouped(k, groups), grouped(v, groups), 0)
    else:
        cache.append(k, v, 0)
    stock = cache.to_dynamic()
    assert type(stock) is DynamicCache
    assert torch.equal(stock.layers[0].keys, grouped(k, groups)) and stock.layers[0].keys.stride(-1) == 1
    cache.reset()  # what was handed out are copies
    for source in (stock, tuple(stock), ((x.keys, x.values) for x in stock.layers)):
        assert_holds(Cache.from_stock([shape], source), k, v)
    more_k, more_v = new_tokens(shape, 3, dtype=dtype, seed=4)
    back = Cache.from_stock([shape], stock, max_length=50)
    back.append(more_k, more_v, 0)
    assert_holds(back, torch.cat([k, more_k], 2), torch.cat([v, more_v], 2))
    assert back.layers[0].k_layout == "panels" and stock.get_seq_length() == 40


def test_a_static_cache_is_taken_over_without_its_empty_slots():
    config = tiny_config()
    stock = StaticCache(config=config, max_cache_len=20)
    k, v = new_tokens((2, 16, 4, 16), 7)
    for layer in range(2):
        stock.update(grouped(k, 2), grouped(v, 2), layer)
    assert_holds(Cache.from_stock(config, stock), k, v, layer=1)


def test_a_cache_hands_out_its_layers_as_a_dynamic_cache_does():
    """Code that gathers caches over processes iterates over them."""
    ours, config = sliding()
    stock = DynamicCache(config=config)
    for layer in range(2):
        feed([ours, stock], [9], layer)
    for got, want in zip(ours, stock, strict=True):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert (got[2] is None) == (want[2] is None) and (got[2] is None or torch.equal(got[2], want[2]))
    assert list(Cache([SHAPE])) == [(None, None, None)]


def test_windows_are_taken_over_with_their_positions():
    ours, config = sliding()
    for layer in range(2):
        feed([ours], [30, 1], layer)
    for source in (ours, ours.to_dynamic()):
        back = Cache.from_stock(config, source)
        assert [layer.get_seq_length() for layer in back.layers] == [31, 31]
        assert back.get_mask_sizes(1, 0) == ours.get_mask_sizes(1, 0) == (5, 27)
        for got, want in zip(*feed([back, copy.deepcopy(ours)], [2], seed=5), strict=True):
            assert torch.equal(got, want)
    with pytest.raises(ValueError, match="stock: layer 0: got K and V of a sliding window, want the cache"):
        Cache.from_stock(config, tuple(ours))
    with pytest.raises(ValueError, match="keys: got the newest 4 of 31 tokens, want all of them"):
        Cache.from_stock([(1, 4, 1, 4)] * 2, ours.to_dynamic())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([SHAPE] * 2, "stock: got 1 layers, want 2"),
        ([(4, 16, 4, 16)], r"keys: got shape \[2, 2, 3, 16\], want \[batch, 4, tokens, 16\]"),
        ([(2, 16, 4, 8)], r"values: got shape \[2, 2, 3, 32\], want \[batch, 2, tokens, 16\]"),
    ],
)
def test_the_tokens_of_another_model_are_not_taken_over(shapes, message):
    stock = DynamicCache()
    stock.update(*(grouped(x, 2) for x in new_tokens(SHAPE, 3)), 0)
    with pytest.raises(ValueError, match=message):
        Cache.from_stock(shapes, stock)


# ---------------------------------------------------------------- tools that change a cache


@pytest.mark.parametrize("by", ["append", "update"])
def test_keys_and_values_can_be_assigned(by):
    """As tools for compressing caches do, after the prompt: keys, then values."""
    shape = CacheShape(2, 16, 4, 16)
    cache = Cache([shape])
    k, v = torch.randn(2, 2, 40, 16), torch.randn(2, 4, 40, 16)
    if by == "append":
        cache.append(k, v, 0)
    else:
        cache.update(k, reference.group(v, 2).flatten(3), 0)
    layer = cache.layers[0]
    kept = torch.tensor([0, 3, 4, 20, 39])
    layer.keys = layer.keys[:, :, kept]
    assert layer.keys.shape[2] == 5 and layer.values.shape[2] == 40
    with pytest.raises(ValueError, match=r"values: got torch.float32 of shape \[2, 2, 40, 32\], want what fits the as"):
        cache.append(k[:, :, :1], v[:, :, :1], 0)
    with pytest.raises(ValueError, match="values: got torch.float32 of shape"):
        cache.crop(-1)
    layer.values = layer.values[:, :, kept]
    assert all(map(torch.equal, cache.to_dense()[0], (k[:, :, kept], v[:, :, kept])))
    cache.append(k[:, :, :1], v[:, :, :1], 0)
    assert cache.get_seq_length() == 6 and torch.equal(cache.to_dense()[0][1][:, :, -1], v[:, :, 0])
    layer.values = 2 * layer.values  # as long as the keys: at once
    assert torch.equal(cache.to_dense()[0][1][:, :, 0], 2 * v[:, :, 0])
    with pytest.raises(TypeError, match="keys: got NoneType, want a Tensor"):
        layer.keys = None
    for name, wrong in (("keys", k[:, :1]), ("values", v)):
        with pytest.raises(ValueError, match=f"{name}: got shape"):
            setattr(layer, name, wrong)
    layer.keys = layer.keys[:1].bfloat16()
    layer.values = layer.values[:1].bfloat16()  # another batch and another dtype
    assert cache.to_dense()[0][0].shape == (1, 2, 6, 16) and cache.to_dense()[0][0].dtype == torch.bfloat16


def test_assigned_tensors_may_have_any_strides_and_are_copied():
    shape = CacheShape(2, 16, 4, 16)
    cache = Cache([shape])
    k, v = torch.randn(1, 2, 7, 16), torch.randn(1, 4, 7, 16)
    cache.append(k, v, 0)
    layer = cache.layers[0]
    keys, values = (x[:, :, 2:].mT.contiguous().mT for x in (layer.keys, layer.values))
    layer.keys = keys
    for read in (cache.to_dense, cache.to_dynamic, layer.v_stats, lambda: list(cache)):
        with pytest.raises(ValueError, match="values: got torch.float32 of shape"):
            read()
    keys.zero_()
    layer.values = values
    assert torch.equal(cache.to_dense()[0][0], k[:, :, 2:]) and torch.equal(cache.to_dense()[0][1], v[:, :, 2:])
    assert torch.equal(Cache.from_stock([shape], [(keys, values)]).to_dense()[0][1], v[:, :, 2:])


def test_v_stats_follow_writes_into_values():
    cache = Cache([CacheShape(2, 16, 2, 16)])
    cache.append(torch.randn(1, 2, 7, 16), torch.randn(1, 2, 7, 16), 0)
    layer = cache.layers[0]
    before = layer.v_stats().clone()
    layer.v_cache[:, :, :7].mul_(10)
    torch.testing.assert_close(layer.v_stats(), 10 * before)
    layer.v_cache[:, :, :7].mul_(2)
    cache.append(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
    torch.testing.assert_close(layer.v_stats(), 20 * before)


def test_a_lost_graph_is_seen_through_conversions():
    shape = CacheShape(2, 16, 4, 16)
    cache = Cache([shape])
    k, v = torch.randn(1, 2, 3, 16, requires_grad=True), torch.randn(1, 2, 3, 32, requires_grad=True)
    cache.update(k, v, 0)
    layer = cache.layers[0]
    layer.values = layer.values * 2
    with pytest.raises(ValueError, match="cache: got a step that records gradients"):
        cache.update(k, v, 0)
    with pytest.raises(ValueError, match="cache: got a step that records gradients"):
        cache.to_dynamic()
    with pytest.raises(ValueError, match="cache: got a step that records gradients"):
        Cache.from_stock([shape], [(k, v)]).update(k, v, 0)
    with torch.no_grad():
        assert cache.to_dynamic().get_seq_length() == 3
    assigned = Cache([shape])
    assigned.layers[0].keys, assigned.layers[0].values = k, v.detach()
    with pytest.raises(ValueError, match="cache: got a step that records gradients"):
        assigned.update(k, v, 0)


def test_a_model_goes_on_behind_assigned_tokens():
    model, ids = tiny_model(), tokens(1, 12)
    caches = Cache(model.config), DynamicCache(config=model.config)
    got = []
    for cache in caches:
        with torch.no_grad():
            model(ids[:, :9], cache=cache)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, 2:], layer.values[:, :, 2:]
            positions = torch.arange(9, 12)[None]
            got.append(model(ids[:, 9:], cache=cache, position_ids=positions, attention_mask=torch.ones(1, 10)).logits)
    torch.testing.assert_close(*got, atol=1e-5, rtol=1e-5)


def test_a_sliding_layer_takes_no_assignment():
    cache = Cache(MistralConfig(head_dim=8, num_key_value_heads=2, num_hidden_layers=1, sliding_window=4))
    with pytest.raises(NotImplementedError, match="keys: assignment is not built for layers with a sliding window"):
        cache.layers[0].keys = torch.zeros(1, 2, 3, 8)


@pytest.mark.skipif(not find_spec("transformers.exporters"), reason="transformers without exporters")
@torch.no_grad()
def test_the_exporter_of_transformers_takes_a_cache_as_input():
    """It takes the objects in a cache apart and puts them together again."""
    from transformers.exporters import DynamoConfig, DynamoExporter

    model, ids = tiny_model((12, 4, 6)), tokens(2, 9)
    cache = Cache(model.config)
    model(ids[:, :8], cache=cache)
    inputs = {"input_ids": ids[:, 8:], "attention_mask": torch.ones_like(ids), "cache": cache}
    program = DynamoExporter().export(model, copy.deepcopy(inputs), DynamoConfig())
    program = getattr(program, "program", program)  # before transformers 5.24 it is returned itself
    got, want = (x(**copy.deepcopy(inputs)).logits for x in (program.module(), model))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # the program has no ops for inference
