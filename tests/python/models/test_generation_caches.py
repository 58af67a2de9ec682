"""generate with caches of other models, shapes and frameworks: the same tokens, or a refusal before any work."""

import copy

import pytest
import torch
import transformers.cache_utils
from test_generation import NEW, generate, prefix_cache, prompts
from test_model_masks import other_model
from tiny_sigma import ATTENTIONS, CACHE, logits, padded, tiny_model, tokens
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, QuantizedCache, StaticCache
from transformers.utils import is_hqq_available, is_optimum_quanto_available

import diffqkv


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def one_attention_at_the_start(model):
    model.set_attn_implementation("diffqkv")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"heads": (8, 4, 2)},
            r"got keys of batch, groups and width \(2, 2, 32\) in layer 0 of the cache, want \(2, 2",
        ),
        ({"head_dim": 32}, r"got keys of batch, groups and width \(2, 2, 32\)"),
        ({"heads": (8, 2, 8)}, r"got values of batch, groups and width \(2, 2, 64\)"),
        ({"heads": (8, 1, 2)}, r"got keys of batch, groups and width \(2, 1, 16\)"),
        ({"num_hidden_layers": 1}, "got a cache of 1 layers, want 2"),
        ({"num_hidden_layers": 3}, "got a cache of 3 layers, want 2"),
    ],
)
@pytest.mark.parametrize("kind", ["lazy", "dynamic", "static"])
def test_the_cache_of_another_model_is_refused_before_any_work(model, kind, changes, message):
    other = tiny_model(**changes)
    past = {
        "lazy": DynamicCache(),
        "dynamic": DynamicCache(config=other.config),
        "static": StaticCache(config=other.config, max_cache_len=16),
    }[kind]
    logits(other, tokens(2, 5), cache=past)
    before = [layer.keys.clone() for layer in past.layers]
    with pytest.raises(ValueError, match=f"cache: {message}"):
        generate(model, tokens(2, 9), cache=past)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(past.layers, before, strict=True))


def test_a_full_static_cache_is_refused_before_any_work(model):
    past = StaticCache(config=model.config, max_cache_len=8)
    logits(model, tokens(1, 6), cache=past)
    with pytest.raises(ValueError, match="got 3 new tokens behind 6, want at most max_cache_len = 8"):
        logits(model, tokens(1, 3), cache=past)
    assert int(past.get_seq_length()) == 6


def test_tuples_are_refused_with_what_to_use(model):
    legacy = tuple((k, v) for k, v, *_ in prefix_cache(model, tokens(1, 4), "dynamic"))
    with pytest.raises(TypeError, match=r"cache: got tuple, want a cache .* diffqkv.Cache.from_stock"):
        logits(model, tokens(1, 2), cache=legacy)
    past = diffqkv.Cache.from_stock(model.config, legacy)
    ids = torch.cat([tokens(1, 4), tokens(1, 3, 1)], 1)
    assert torch.equal(generate(model, ids, cache=past), generate(model, ids))


def test_early_initialisation_of_a_static_cache_gives_k_and_v_one_shape(model):
    """Its one shape for both then fails at the first write: said by name, and not done for chunked prefill."""
    past = StaticCache(config=model.config, max_cache_len=32)
    past.early_initialization(1, num_heads=2, head_dim=16, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"cache: got values of batch, groups and width \(1, 2, 16\)"):
        logits(model, tokens(1, 4), cache=past)
    diffqkv.cache.reserve_static_cache(
        fresh := StaticCache(config=model.config, max_cache_len=32), model.config, 1, torch.float32, torch.device("cpu")
    )
    assert fresh.layers[0].keys.shape == (1, 2, 32, 16) and fresh.layers[0].values.shape == (1, 2, 32, 32)
    ids = tokens(1, 9)
    assert torch.equal(generate(model, ids, cache=fresh), generate(model, ids))
    ours = diffqkv.Cache(model.config)
    ours.early_initialization(1, num_heads=2, head_dim=16, dtype=torch.float32, device="cpu")
    assert torch.equal(generate(model, ids, cache=ours), generate(model, ids))


def test_an_ungrouped_static_cache_cannot_hold_unequal_heads():
    """Why caches hold K and V in groups: a static layer takes its one head count from K."""
    layer = transformers.cache_utils.StaticLayer(max_cache_len=8)
    with pytest.raises(RuntimeError):
        layer.update(torch.randn(1, 2, 3, 16), torch.randn(1, 4, 3, 16))
    layer = transformers.cache_utils.StaticLayer(max_cache_len=8)
    k, v = layer.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 32))
    assert k.shape == (1, 2, 8, 16) and v.shape == (1, 2, 8, 32)


def test_prefix_tuning_is_refused_by_name():
    """PEFT makes a cache with one head count and one dimension for K and V."""
    peft = pytest.importorskip("peft")
    model = tiny_model()
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=32, num_attention_heads=2
    )
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="cache: got values of batch"):
        adapted(tokens(2, 5))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_continuous_batching_is_refused_before_it_starts(model, attention):
    """Its cache has one shape for K and V: left to itself it fails in a thread, after minutes of warming up."""
    model.set_attn_implementation(attention)
    message = "continuous batching: .* use generate on a left-padded batch instead"
    with pytest.raises(NotImplementedError, match=message):
        generate(model, tokens(1, 4), cache_implementation="paged")
    with pytest.raises(NotImplementedError, match=message):
        model.generate_batch([[1, 2, 3], [4, 5]], max_new_tokens=2)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_caches_need_no_accelerator(model, kind):
    """Transformers' fail on a stream of CUDA; without a GPU, every cache is where they would move it."""
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    ids, mask = prompts("left", 2)
    assert torch.equal(generate(model, ids, mask, cache_implementation=kind), generate(model, ids, mask))
    past = {
        "offloaded": lambda: DynamicCache(config=model.config, offloading=True),
        "offloaded_static": lambda: StaticCache(config=model.config, max_cache_len=20, offloading=True),
    }[kind]()
    with pytest.raises(ValueError, match="cache: got a cache with offloading and no accelerator"):
        generate(model, ids, mask, cache=past)
    assert not any(layer.is_initialized for layer in past.layers)


QUANTISED = [
    pytest.param(
        "fp8",
        None,
        1.0,
        marks=pytest.mark.skipif(
            not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no fp8 cache"
        ),
    ),
    pytest.param("hqq", 8, 0.3, marks=pytest.mark.skipif(not is_hqq_available(), reason="hqq is not installed")),
    pytest.param(
        "quanto",
        4,
        3.0,
        marks=pytest.mark.skipif(not is_optimum_quanto_available(), reason="optimum-quanto is not installed"),
    ),
]


@pytest.mark.parametrize("backend, bits, tolerance", QUANTISED)
def test_quantised_caches(backend, bits, tolerance):
    model = tiny_model()
    ids, mask = prompts("left", 2)
    config = {} if bits is None else {"nbits": bits, "q_group_size": 16, "residual_length": 4}
    steps = []
    for attention in ATTENTIONS:
        model.set_attn_implementation(attention)
        past = QuantizedCache(backend, model.config, **config)
        with torch.no_grad():
            parts = [model(part, cache=past).logits for part in ids.split([7, 1, 1, 3], 1)]
        steps.append(torch.cat(parts, 1))
    exact = logits(model, ids, use_cache=False)
    assert 0 < (steps[0] - exact).abs().max() < tolerance
    for other in steps[1:]:  # the same K and V, save where rounding falls to the other side
        assert (steps[0] - other).abs().mean() < 0.2 * (steps[0] - exact).abs().mean() + 1e-4
    model.set_attn_implementation("diffqkv")
    options = {"cache_implementation": "quantized", "cache_config": {"backend": backend, **config}}
    modes = [{}, {"prefill_chunk_size": 5}, {"num_beams": 2}]
    if not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        # Older releases do not reorder what is quantised, and generate takes quanto whatever backend is asked for.
        modes = modes[:2] if backend == "quanto" else []
    for more in modes:
        got = generate(model, ids, mask, **options, **more)
        assert got.shape == (2, 12 + NEW) and torch.equal(got[:, :12], ids)
    with pytest.raises(NotImplementedError, match="assisted decoding: a quantised cache"):
        generate(model, ids[:1], prompt_lookup_num_tokens=2, **options)
    with pytest.raises(NotImplementedError, match="assisted decoding: a quantised cache"):
        fresh = QuantizedCache(backend, model.config, **config)
        generate(model, ids[:1], prompt_lookup_num_tokens=2, cache=fresh)
    with pytest.raises(ValueError, match="got quantised K and V"):
        diffqkv.Cache.from_stock(model.config, past)
    for other in (tiny_model((8, 4, 4)), tiny_model((8, 2, 8))):
        with pytest.raises(ValueError, match=r"cache: got \w+ of batch, groups and width \(2, 2, "):
            logits(other, ids[:, :1], cache=past)
    with pytest.raises(ValueError, match=r"got keys .* \(2, 2, 16\) in layer 0 of the cache, want \(1, 2, 16\)"):
        logits(model, ids[:1], cache=past)
    assert past.get_seq_length() == 12


# ---------------------------------------------------------------- models of others: windows, latent attention


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_our_cache_slides_with_the_windows_of_other_models(name):
    model = other_model(name).eval()
    ids, mask = padded([23, 17], "left")
    options = {"attention_mask": mask, "max_new_tokens": 60, "do_sample": False}
    one = {"max_new_tokens": 30, "do_sample": False}
    want = model.generate(ids, **options)
    want_one = model.generate(ids[:1], **one)
    for attention in ("eager", "diffqkv"):
        model.set_attn_implementation(attention)
        past = diffqkv.Cache(model.config)
        assert torch.equal(model.generate(ids, **options, **{CACHE: past}), want)
        assert past.is_sliding[0] and past.layers[0].capacity == 64 and past.get_seq_length() == 82
        for more in ({"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 3}):
            past = diffqkv.Cache(model.config)
            assert torch.equal(model.generate(ids[:1], **one, **more, **{CACHE: past}), want_one), more
        past = diffqkv.Cache(model.config)
        logits(model, ids[:1, :12], **{CACHE: past})
        for kept in (copy.deepcopy(past), past.to_dynamic(), diffqkv.Cache.from_stock(model.config, past.to_dynamic())):
            assert torch.equal(model.generate(ids[:1], **one, **{CACHE: kept}), want_one)


def test_our_cache_takes_any_shapes_from_who_knows_them():
    """Latent attention caches one narrow head for K and one for V, which its configuration does not say."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=8,
        first_k_dense_replace=2, initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="config_or_shapes: got a model with latent attention"):
        diffqkv.Cache(config)
    model = DeepseekV3ForCausalLM(config).eval()
    ids, mask = padded([9, 5], "left")
    stock = DynamicCache(config=config)
    want = generate(model, ids, mask, **{CACHE: stock})
    shapes = [(k.shape[1], k.shape[3], v.shape[1], v.shape[3]) for k, v, *_ in stock]
    assert torch.equal(generate(model, ids, mask, **{CACHE: diffqkv.Cache(shapes)}), want)
