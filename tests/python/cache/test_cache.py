"""diffqkv.Cache: in-place growth, layouts, batch operations, Hugging Face's interface, errors."""

import copy
import io
import mmap
import weakref
from inspect import signature

import pytest
import torch
from tiny_sigma import tiny_config, tiny_model, tokens
from transformers import DynamicCache, LlamaConfig, MistralConfig

from diffqkv import Cache
from diffqkv.cache import CacheShape

SHAPES = [(2, 16, 4, 16), (4, 8, 2, 16), (4, 16, 6, 24), (3, 8, 3, 8)]
SHAPE = SHAPES[0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def new_tokens(shape, count, *, batch=2, dtype=torch.float32, seed=0):
    n_k, d_k, n_v, d_v = shape
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(batch, n_k, count, d_k, generator=generator).to(dtype)
    v = torch.randn(batch, n_v, count, d_v, generator=generator).to(dtype)
    return k, v


def grouped(x, groups):
    """`[b, heads, s, d]` as Hugging Face's `[b, G, s, heads per group * d]`."""
    return x.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)


def filled(shape, counts, **options):
    """A one-layer cache written by `append` in steps, and what it must hold."""
    cache = Cache([shape], **options.pop("cache", {}))
    ks, vs = [], []
    for step, count in enumerate(counts):
        k, v = new_tokens(shape, count, seed=step, **options)
        cache.append(k, v, 0)
        ks.append(k)
        vs.append(v)
    return cache, torch.cat(ks, 2), torch.cat(vs, 2)


def assert_holds(cache, k, v, layer=0):
    got_k, got_v = cache.to_dense()[layer]
    assert torch.equal(got_k, k)
    assert torch.equal(got_v, v)
    assert cache.get_seq_length(layer) == k.shape[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_append_keeps_every_token_over_panels_and_growth(shape, dtype):
    cache, k, v = filled(shape, [5, 1, 26, 1, 40, 1, 130], dtype=dtype)
    assert_holds(cache, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_k_lies_in_panels_and_v_head_major_on_cpu(dtype):
    cache, k, v = filled((4, 16, 6, 24), [70], dtype=dtype)
    layer = cache.layers[0]
    assert layer.k_layout == "panels"
    assert layer.capacity >= 70 and layer.capacity % 32 == 0
    panel = (8, 32, 2) if dtype == torch.bfloat16 else (16, 32)
    assert layer.k_cache.shape == (2, 4, layer.capacity // 32, *panel)
    token = layer.k_cache[1, 3, 2]  # the panel of tokens 64 to 95
    token = token[:, 5].flatten() if dtype == torch.bfloat16 else token[:, 5]
    assert torch.equal(token, k[1, 3, 69])
    assert layer.v_cache.shape == (2, 2, layer.capacity, 3, 24)
    assert layer.v_cache.transpose(2, 3).flatten(1, 2).is_contiguous()
    assert torch.equal(layer.v_cache[1, 1, 69, 2], v[1, 5, 69])


@pytest.mark.parametrize("rope_batch", [1, 2])
def test_append_rotates_k(rope_batch):
    shape = (2, 16, 4, 16)
    k, v = new_tokens(shape, 9)
    angles = torch.randn(rope_batch, 9, 8, generator=torch.Generator().manual_seed(5)).repeat(1, 1, 2)
    cache = Cache([shape])
    cache.append(k, v, 0, angles.cos(), angles.sin())
    rotated = torch.cat((-k[..., 8:], k[..., :8]), -1)
    want = k * angles.cos().unsqueeze(1) + rotated * angles.sin().unsqueeze(1)
    got_k, got_v = cache.to_dense()[0]
    torch.testing.assert_close(got_k, want)
    assert torch.equal(got_v, v)


def test_growth_is_amortised():
    shape = (2, 16, 4, 16)
    cache = Cache([shape])
    buffers = set()
    k, v = new_tokens(shape, 1)
    for _ in range(1000):
        cache.append(k, v, 0)
        buffers.add(cache.layers[0].capacity)
    assert cache.get_seq_length() == 1000
    assert sorted(buffers) == [64, 128, 256, 512, 1024]


@pytest.mark.parametrize("options", [{"max_length": 100}, {"initial_length": 100}])
def test_reserved_memory_is_not_moved(options):
    shape = (2, 16, 4, 16)
    cache, k, v = filled(shape, [3], cache=options)
    pointers = cache.layers[0].k_cache.data_ptr(), cache.layers[0].v_cache.data_ptr()
    more_k, more_v = new_tokens(shape, 97, seed=9)
    cache.append(more_k, more_v, 0)
    assert pointers == (cache.layers[0].k_cache.data_ptr(), cache.layers[0].v_cache.data_ptr())
    assert_holds(cache, torch.cat([k, more_k], 2), torch.cat([v, more_v], 2))


@pytest.mark.parametrize("appended_first", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_update_returns_what_a_dynamic_cache_returns(shape, appended_first):
    groups = Cache([shape]).shapes[0].groups
    ours, stock = Cache([shape]), DynamicCache()
    for step, count in enumerate([4, 1, 30, 1]):
        k, v = new_tokens(shape, count, seed=step)
        if appended_first and step == 0:
            ours.append(k, v, 0)
            stock.update(grouped(k, groups), grouped(v, groups), 0)
            continue
        got = ours.update(grouped(k, groups), grouped(v, groups), 0)
        want = stock.update(grouped(k, groups), grouped(v, groups), 0)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
    assert ours.layers[0].k_layout == ("panels" if appended_first else "rows")
    assert torch.equal(ours.layers[0].keys, stock.layers[0].keys)
    assert torch.equal(ours.layers[0].values, stock.layers[0].values)


def test_update_first_returns_views():
    shape = (2, 16, 4, 16)
    cache = Cache([shape])
    k, v = new_tokens(shape, 5)
    keys, values = cache.update(grouped(k, 2), grouped(v, 2), 0)
    assert keys.data_ptr() == cache.layers[0].k_cache.data_ptr()
    assert values.data_ptr() == cache.layers[0].v_cache.data_ptr()
    cache.append(*new_tokens(shape, 3, seed=1), 0)
    more_k, more_v = new_tokens(shape, 3, seed=1)
    assert_holds(cache, torch.cat([k, more_k], 2), torch.cat([v, more_v], 2))


def test_update_lets_gradients_into_the_new_tokens_only():
    shape = (2, 16, 4, 16)
    cache = Cache([shape])
    old, new = ([grouped(x, 2).requires_grad_() for x in new_tokens(shape, count, seed=count)] for count in (3, 2))
    with torch.no_grad():
        cache.update(*old, 0)
    keys, values = cache.update(*new, 0)
    (keys.sum() + 2 * values.sum()).backward()
    assert torch.equal(new[0].grad, torch.ones_like(new[0]))
    assert torch.equal(new[1].grad, torch.full_like(new[1], 2.0))
    assert old[0].grad is None and old[1].grad is None
    assert not cache.layers[0].v_cache.requires_grad


@pytest.mark.parametrize("by_update", [True, False])
def test_a_cache_made_under_inference_mode_can_be_written_later(by_update):
    shape = (2, 16, 4, 16)
    cache = Cache([shape])

    def write(k, v):
        if by_update:
            cache.update(grouped(k, 2), grouped(v, 2), 0)
        else:
            cache.append(k, v, 0)

    k, v = new_tokens(shape, 3)
    with torch.inference_mode():
        write(k, v)
    more_k, more_v = new_tokens(shape, 2, seed=7)
    with torch.no_grad():
        write(more_k, more_v)
    assert_holds(cache, torch.cat([k, more_k], 2), torch.cat([v, more_v], 2))


@pytest.mark.parametrize("by_update", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_operations_follow_the_rows(dtype, by_update):
    shape = (4, 16, 6, 24)
    k, v = new_tokens(shape, 40, batch=3, dtype=dtype)
    cache = Cache([shape])
    if by_update:
        cache.update(grouped(k, 2), grouped(v, 2), 0)
    else:
        cache.append(k, v, 0)

    def expect(indices):
        nonlocal k, v
        k, v = k[indices], v[indices]
        assert_holds(cache, k, v)
        assert cache.batch_size == len(k)

    cache.reorder_cache(torch.tensor([2, 0, 0]))
    expect(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    expect(torch.tensor([0, 0, 1, 1, 2, 2]))
    cache.batch_select_indices(torch.tensor([5, 1]))
    expect(torch.tensor([5, 1]))
    cache.batch_select_indices(torch.tensor([False, True]))
    expect(torch.tensor([1]))
    more = new_tokens(shape, 30, batch=1, dtype=dtype, seed=3)
    cache.append(*more, 0)
    assert_holds(cache, torch.cat([k, more[0]], 2), torch.cat([v, more[1]], 2))


def test_batch_operations_before_the_first_token_do_nothing():
    cache = Cache([(2, 16, 4, 16)])
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(3)
    cache.reset()
    cache.crop(0)
    assert cache.batch_size == -1 and cache.get_seq_length() == 0


@pytest.mark.parametrize("by_update", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_heads_have_a_gap_and_lie_in_huge_pages(dtype, by_update):
    shape = (2, 64, 4, 64)
    k, v = new_tokens(shape, 4000, dtype=dtype)
    cache = Cache([shape], max_length=4096)
    layer = cache.layers[0]
    if by_update:
        for a, b in zip(cache.update(grouped(k, 2), grouped(v, 2), 0), (k, v), strict=True):
            assert torch.equal(a, grouped(b, 2))
        assert layer.values.data_ptr() == layer.v_cache.data_ptr()
    else:
        cache.append(k, v, 0)
    assert_holds(cache, k, v)
    v_dim, v_heads = (1, 4) if by_update else (3, 8)  # `update` keeps the V heads of a group together
    for buffer, dim, heads in ((layer.k_cache, 1, 4), (layer.v_cache, v_dim, v_heads)):
        assert buffer.stride(dim) - buffer.numel() // heads == 4352 // buffer.element_size()
        if hasattr(mmap, "MADV_HUGEPAGE"):
            assert buffer.data_ptr() % (2 << 20) == 0

    layer.crop(-3990)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    for other in (copy.deepcopy(cache), torch.load(file, weights_only=False)):
        more = new_tokens(shape, 2, dtype=dtype, seed=3)
        other.append(*more, 0)
        assert_holds(other, torch.cat([k[:, :, :10], more[0]], 2), torch.cat([v[:, :, :10], more[1]], 2))
    assert_holds(cache, k[:, :, :10], v[:, :, :10])


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages here")
def test_memory_goes_with_the_last_tensor(monkeypatch):
    maps, real = weakref.WeakSet(), mmap.mmap

    def recorded(*args, **kwargs):
        new = real(*args, **kwargs)
        maps.add(new)
        return new

    monkeypatch.setattr(mmap, "mmap", recorded)
    shape = (2, 64, 4, 64)
    k, v = new_tokens(shape, 8192)
    cache = Cache([shape])
    cache.append(k, v, 0)
    cache.append(*new_tokens(shape, 1), 0)  # grows: the old buffers go
    assert len(maps) == 2
    view = cache.layers[0].v_cache[1, 1, 8000]
    del cache
    assert len(maps) == 1
    assert torch.equal(view.flatten(), v[1, 2:, 8000].flatten())
    del view
    assert not maps


def test_crop_moves_a_counter():
    shape = (2, 16, 4, 16)
    cache, k, v = filled(shape, [40])
    pointer = cache.layers[0].k_cache.data_ptr()
    cache.crop(-7)
    assert_holds(cache, k[:, :, :33], v[:, :, :33])
    cache.crop(0)
    more_k, more_v = new_tokens(shape, 2, seed=3)
    cache.append(more_k, more_v, 0)
    assert_holds(cache, torch.cat([k[:, :, :33], more_k], 2), torch.cat([v[:, :, :33], more_v], 2))
    assert cache.layers[0].k_cache.data_ptr() == pointer
    keeps_positive = "max_length" in signature(DynamicCache.crop).parameters  # in transformers before 5.15
    for wrong in (-36,) if keeps_positive else (1, -36):
        with pytest.raises(ValueError, match=f"tokens_to_remove: got {wrong}, want -35 to 0"):
            cache.crop(wrong)
    assert cache.get_seq_length() == 35


def test_reset_keeps_the_buffers():
    shape = (2, 16, 4, 16)
    cache, _, _ = filled(shape, [40])
    pointer = cache.layers[0].k_cache.data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0
    k, v = new_tokens(shape, 2, seed=3)
    cache.append(k, v, 0)
    assert_holds(cache, k, v)
    assert cache.layers[0].k_cache.data_ptr() == pointer


@pytest.mark.parametrize("dtype", DTYPES)
def test_v_stats_follow_the_tokens(dtype):
    shape = (4, 16, 6, 24)
    cache, _, _ = filled(shape, [40], dtype=dtype)
    layer = cache.layers[0]

    def check():
        v = cache.to_dense()[0][1].double()
        want = torch.cat([v.sum(2), v.norm(dim=-1).amax(2, keepdim=True)], -1)
        torch.testing.assert_close(layer.v_stats().double(), want, atol=1e-4, rtol=1e-5)
        return layer.v_stats()

    with torch.inference_mode():
        stats = check()
    for step, count in enumerate([1, 50, 1]):  # beyond the first 64 slots
        cache.append(*new_tokens(shape, count, dtype=dtype, seed=step + 5), 0)
        assert check() is stats
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer._v_stats, stats.flip(0))
    check()
    cache.offload(0)
    cache.batch_select_indices(torch.tensor([True, False]))
    check()
    cache.crop(-30)
    assert layer._v_stats is None  # the largest norm may have gone
    check()
    k, v = new_tokens(shape, 3, batch=1, dtype=dtype, seed=9)
    cache.update(grouped(k, 2), grouped(v, 2), 0)
    check()
    cache.reset()
    assert not layer.v_stats().any()
    cache.append(k, v, 0)
    check()


def test_a_write_fetches_an_offloaded_layer(monkeypatch):
    cache, _, _ = filled((2, 16, 4, 16), [3])
    fetched = []
    monkeypatch.setattr(cache.layers[0], "prefetch", lambda: fetched.append(True))
    cache.append(*new_tokens((2, 16, 4, 16), 1), 0)
    assert fetched == [True]
    monkeypatch.undo()
    cache.layers[0].device = torch.device("meta")  # stands for the device that the layer was offloaded from
    cache.prefetch(0)
    assert cache.layers[0].k_cache.device.type == cache.layers[0].v_cache.device.type == "meta"


def test_offload_and_prefetch_keep_the_tokens():
    shape = (2, 16, 4, 16)
    cache, k, v = filled(shape, [40])
    cache.offload(0)
    cache.prefetch(1)  # circles back to layer 0
    assert_holds(cache, k, v)
    cache.offload(0)
    more = new_tokens(shape, 2, seed=3)
    cache.append(*more, 0)
    assert_holds(cache, torch.cat([k, more[0]], 2), torch.cat([v, more[1]], 2))


def test_interface_of_hugging_face():
    shape = (2, 16, 4, 16)
    cache = Cache([shape, shape])
    assert len(cache) == 2
    assert not cache.is_initialized and not cache.is_compileable and cache.layers[0].is_croppable
    assert cache.is_sliding == [False, False]
    assert (cache.get_max_length(), Cache([shape], max_length=9).get_max_length()) == (-1, 9)
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    cache.append(*new_tokens(shape, 3), 0)
    assert cache.get_mask_sizes(5, 0) == (8, 0) and cache.get_mask_sizes(5, 1) == (5, 0)
    if hasattr(DynamicCache, "activate_past_recording"):  # in newer releases of transformers
        assert cache.get_query_offset(0) == 3
        cache.activate_past_recording()
    assert "_layer_type" not in vars(type(cache.layers[0]))  # it would replace a layer class of every model


def test_early_initialization_reserves_k_and_v_with_their_own_shapes():
    cache = Cache([(2, 16, 4, 24)] * 2, max_length=50)
    cache.early_initialization(3, num_heads=2, head_dim=16, dtype=torch.bfloat16, device="cpu")
    assert cache.is_initialized and cache.batch_size == 3
    for layer in cache.layers:
        assert layer.k_cache.shape == (3, 2, 2, 8, 32, 2)
        assert layer.v_cache.shape == (3, 2, 64, 2, 24)
    k, v = new_tokens((2, 16, 4, 24), 50, batch=3, dtype=torch.bfloat16)
    pointer = cache.layers[0].v_cache.data_ptr()
    cache.append(k, v, 0)
    cache.append(k, v, 1)
    assert_holds(cache, k, v, layer=1)
    assert cache.layers[0].v_cache.data_ptr() == pointer


def test_shapes_come_from_the_config():
    cache = Cache(tiny_config((12, 4, 6), k_compression="expand"))
    assert cache.shapes == [CacheShape(4, 8, 6, 16)] * 2
    llama = LlamaConfig(num_attention_heads=8, num_key_value_heads=2, hidden_size=64, num_hidden_layers=3)
    assert Cache(llama).shapes == [CacheShape(2, 8, 2, 8)] * 3
    if hasattr(llama, "is_heterogeneous"):  # in newer releases of transformers
        config = MistralConfig(head_dim=8, num_key_value_heads=2, num_hidden_layers=3, sliding_window=None)
        config.per_layer_config = {1: {"num_key_value_heads": 4}, 2: {"sliding_window": 5}}
        assert [x.n_k for x in Cache(config).shapes] == [2, 4, 2]
        assert Cache(config).is_sliding == [False, False, True]


def test_each_layer_has_its_own_shape():
    cache = Cache(SHAPES)
    held = [new_tokens(shape, 40, seed=i) for i, shape in enumerate(SHAPES)]
    for i, (k, v) in enumerate(held):
        cache.append(k, v, i)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-3)
    for some in (cache, Cache.from_stock(SHAPES, cache.to_dynamic())):
        for i, (k, v) in enumerate(held):
            assert_holds(some, k.flip(0)[:, :, :37], v.flip(0)[:, :, :37], layer=i)
    with pytest.raises(ValueError, match=r"got CacheShape\(n_k=4, d_k=8, n_v=2, d_v=16\) in layer 1 of the cache"):
        cache.check_fits([SHAPE] * 4, 2, 1)


# ---------------------------------------------------------------- sliding windows


def sliding(window=5, **options):
    """One layer that slides and one that does not, of one K and V head of 4."""
    config = MistralConfig(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4, num_hidden_layers=2,
        sliding_window=window, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Cache(config, **options), config


def feed(caches, counts, layer=0, seed=0):
    """The same new tokens for every cache; what `update` returned last."""
    for step, count in enumerate(counts):
        k, v = new_tokens((1, 4, 1, 4), count, seed=100 * seed + step)
        results = [cache.update(k, v, layer) for cache in caches]
    return results


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_a_sliding_layer_returns_what_a_stock_one_returns(window):
    ours, config = sliding(window)
    stock = DynamicCache(config=config)
    for step, count in enumerate([3, 1, 1, 7, 1, 90, 1, 1, 30, 2] + [1] * 150):
        assert ours.get_mask_sizes(count, 0) == stock.get_mask_sizes(count, 0)
        for got, want in zip(*feed([ours, stock], [count], seed=step), strict=True):
            visible = min(want.shape[2], ours.layers[0].get_mask_sizes(0)[0] + count)
            assert torch.equal(got[:, :, -visible:], want[:, :, -visible:])
        assert ours.get_seq_length(0) == stock.get_seq_length(0)
    layer = ours.layers[0]
    assert ours.is_sliding == [True, False] and layer.capacity <= max(64, 4 * window)
    assert layer.keys.shape[2] == window - 1


@pytest.mark.skipif(not hasattr(DynamicCache, "activate_past_recording"), reason="this transformers records nothing")
def test_a_sliding_layer_takes_back_what_it_recorded():
    ours, config = sliding()
    stock = DynamicCache(config=config)
    feed([ours, stock], [70])
    with pytest.raises(ValueError, match="tokens_to_remove: got -1, want 0 to 0: older tokens"):
        ours.crop(-1)
    for cache in (ours, stock):
        cache.activate_past_recording()
    feed([ours, stock], [60, 1], seed=1)
    for cache in (ours, stock):
        cache.layers[0].crop(-61)
    for got, want in zip(*feed([ours, stock], [1], seed=2), strict=True):
        assert torch.equal(got, want)
    ours.layers[0].record_past = False
    feed([ours], [1] * 80)
    assert ours.get_seq_length(0) == 151 and ours.layers[0].capacity == 64
    ours.reset()
    assert ours.get_seq_length(0) == 0 and ours.get_mask_sizes(3, 0) == (3, 0)


def test_a_sliding_layer_follows_rows_and_lengths():
    ours, config = sliding(max_length=100)
    stock = DynamicCache(config=config)
    feed([ours, stock], [20, 1])
    assert ours.layers[0].capacity == 32  # of two windows, not of max_length
    for cache in (ours, stock):
        cache.layers[0].batch_repeat_interleave(2)
        cache.layers[0].batch_select_indices(torch.tensor([3, 0]))
    for got, want in zip(*feed([ours, stock], [1], seed=3), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="got 79 new tokens behind 22, want at most max_length = 100"):
        feed([ours], [79])
    with pytest.raises(NotImplementedError, match="append: not built for layers with a sliding window"):
        ours.append(*new_tokens((1, 4, 1, 4), 1), 0)


@pytest.mark.parametrize("layer_type", ["linear_attention", "chunked_attention"])
def test_layers_of_other_kinds_are_refused(layer_type):
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", layer_type]
    with pytest.raises(
        ValueError, match=f"config_or_shapes: got a layer of type '{layer_type}', want 'full_attention'"
    ):
        Cache(config)


def test_layers_that_are_never_written_stay_empty():
    """Models that share K and V between layers leave some layers of a cache without tokens."""
    cache = Cache([SHAPE] * 2)
    cache.append(*new_tokens(SHAPE, 5), 0)
    cache.crop(-2)
    back = Cache.from_stock([SHAPE] * 2, cache.to_dynamic())
    for some in (cache, back):
        assert some.get_seq_length(0) == 3 and some.get_seq_length(1) == 0 and not some.layers[1].is_initialized


# ---------------------------------------------------------------- bad input


def write(cache, layer=0, *, shape=SHAPE, count=2, batch=2, dtype=torch.float32, v_count=None):
    k, _ = new_tokens(shape, count, batch=batch, dtype=dtype)
    _, v = new_tokens(shape, v_count or count, batch=batch, dtype=dtype)
    cache.append(k, v, layer)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"shape": (4, 16, 4, 16)}, r"k: got shape \[2, 4, 2, 16\], want \[batch, 2, tokens, 16\]"),
        ({"shape": (2, 8, 4, 16)}, r"k: got shape \[2, 2, 2, 8\]"),
        ({"shape": (2, 16, 2, 16)}, r"v: got shape \[2, 2, 2, 16\], want \[batch, 4, tokens, 16\]"),
        ({"batch": 3}, "cache: got a batch of 3, want 2"),
        ({"dtype": torch.bfloat16}, "k: got dtype torch.bfloat16, want torch.float32"),
        ({"count": 8}, "got 8 new tokens behind 3, want at most max_length = 10"),
        ({"v_count": 3}, "v: got 2 rows of 3 tokens, want 2 of 2"),
        ({"layer": 2}, "layer_idx: got 2, want less than 2"),
    ],
)
def test_bad_writes_are_refused_before_anything_is_written(bad, message):
    cache = Cache([SHAPE] * 2, max_length=10)
    k, v = new_tokens(SHAPE, 3)
    for layer in range(2):
        cache.append(k, v, layer)
    buffers = [layer.k_cache.clone() for layer in cache.layers], [layer.v_cache.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match=message):
        write(cache, **bad)
    for layer, k_before, v_before in zip(cache.layers, *buffers, strict=True):
        assert torch.equal(layer.k_cache.view(torch.int32), k_before.view(torch.int32))
        assert torch.equal(layer.v_cache.view(torch.int32), v_before.contiguous().view(torch.int32))
        assert layer.length == 3


def test_update_refuses_other_shapes():
    cache = Cache([SHAPE])
    k, v = (grouped(x, 2) for x in new_tokens(SHAPE, 2))
    with pytest.raises(ValueError, match=r"key_states: got shape \[2, 2, 2, 32\], want \[batch, 2, tokens, 16\]"):
        cache.update(v, v, 0)
    with pytest.raises(ValueError, match=r"value_states: got shape \[2, 2, 2, 16\], want \[batch, 2, tokens, 32\]"):
        cache.update(k, k, 0)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length: got 0"),
        ({"batch_size": -1}, "batch_size: got -1"),
        ({"initial_length": -1}, "initial_length: got -1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Cache([SHAPE], **options)


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"config_or_shapes: got \(2, 0, 4, 16\)"):
        Cache([(2, 0, 4, 16)])
    with pytest.raises(ValueError, match="config_or_shapes: got no layer"):
        Cache([])
    with pytest.raises(ValueError, match="to_dense: got a cache without tokens"):
        Cache([SHAPE]).to_dense()


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (Cache(tiny_config((8, 4, 2))), r"cache: got CacheShape\(n_k=4, d_k=16, n_v=2, d_v=16\) in layer 0"),
        (Cache(tiny_config(num_hidden_layers=3)), "cache: got a cache of 3 layers, want 2"),
        (Cache(tiny_config(), max_length=6), "got 7 new tokens behind 0, want at most max_length = 6"),
        (Cache(tiny_config(), batch_size=3), "got a batch of 2, want 3"),
        (Cache(tiny_config(), dtype=torch.bfloat16), "k: got dtype torch.float32, want torch.bfloat16"),
    ],
)
@pytest.mark.parametrize("attention", ["diffqkv", "sdpa"])
def test_a_model_refuses_a_cache_that_does_not_fit(cache, message, attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(tokens(2, 7), cache=cache)
    assert all(layer.length == 0 and not layer.is_initialized for layer in cache.layers)


def test_unused_slots_are_never_read():
    model = tiny_model()
    ids = tokens(2, 40)
    cache = Cache(model.config, max_length=100)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        model(ids[:, :33], cache=cache)
        for layer in cache.layers:
            layer.v_cache[:, :, 33:] = float("nan")
            layer.k_cache[:, :, 1, :, 1:] = float("nan")  # tokens 33 to 63
            layer.k_cache[:, :, 2:] = float("nan")
        got = torch.cat([model(ids[:, i : i + 1], cache=cache).logits for i in range(33, 40)], 1)
    torch.testing.assert_close(got, want[:, 33:], atol=1e-4, rtol=1e-4)
