"""SigmaForCausalLM and its siblings inside transformers: every attention function, cache and decoding mode agrees."""

import copy

import pytest
import torch
from tiny_sigma import (
    ATTENTIONS,
    CACHE,
    COMPRESSIONS,
    HEADS,
    NEW_TOKENS,
    VOCAB,
    cache_in,
    generate,
    logits,
    padded,
    tiny_model,
    tokens,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import diffqkv
from diffqkv.models import attention as diffqkv_models_attention

CACHES = ["diffqkv", "dynamic", "static", "none"]


def cache_arguments(kind, model) -> dict:
    return {
        "diffqkv": lambda: {CACHE: diffqkv.Cache(model.config)},
        "dynamic": lambda: {CACHE: DynamicCache(config=model.config)},
        "static": lambda: {"cache_implementation": "static"},
        "none": lambda: {"use_cache": False},
    }[kind]()


def new_tokens_one_by_one(model, ids, mask):
    """Greedy continuation of every row alone, without padding, cache and our attention: what all others must give."""
    model.set_attn_implementation("eager")
    rows = [generate(model, row[keep.bool()][None], use_cache=False) for row, keep in zip(ids, mask, strict=True)]
    return torch.stack([row[0, -NEW_TOKENS:] for row in rows])


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("heads", HEADS)
def test_greedy_tokens_do_not_depend_on_attention_cache_or_padding(heads, compression):
    model = tiny_model(heads, k_compression=compression)
    ids, mask = padded([11, 7, 1], "left")
    want = new_tokens_one_by_one(model, ids, mask)
    assert len(want.unique()) > NEW_TOKENS // 2
    for attention in ATTENTIONS:
        model.set_attn_implementation(attention)
        for kind in CACHES:
            got = generate(model, ids, mask, **cache_arguments(kind, model))
            assert torch.equal(got[:, ids.shape[1] :], want), (attention, kind)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_rotations_without_a_graph_are_ops(library, dtype, compression):
    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.add(str(op).removesuffix(".default"))
            return op(*args, **kwargs or {})

    model, ids = tiny_model((12, 4, 6), k_compression=compression).to(dtype), tokens(2, 9)
    ours, results = {"diffqkv.rms_norm", "diffqkv.rotary_embedding"}, []
    for training, graph in ((False, False), (False, True), (True, False)):
        seen = set()
        with torch.set_grad_enabled(graph), Ops():
            results.append(model.train(training)(ids).logits.detach())
        assert seen & ours == (set() if training or graph else ours)
    assert torch.equal(results[1], results[2])
    with torch.no_grad():
        exact = model.eval().double()(ids).logits  # the ops do not know float64
    by_ops, by_torch = ((x - exact).square().mean().sqrt() for x in results[:2])
    assert by_ops <= 1.1 * by_torch + 1e-7


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_cached_logits_are_the_uncached_ones(attention, compression):
    model = tiny_model((12, 4, 6), k_compression=compression)
    model.set_attn_implementation(attention)
    ids = tokens(2, 45)
    want = logits(model, ids, use_cache=False)
    for kind in ("diffqkv", "dynamic", "static"):
        cache = StaticCache(config=model.config, max_cache_len=64) if kind == "static" else None
        cache = cache or cache_arguments(kind, model)[CACHE]
        steps = [30, 1, 1, 5, 1, 7]
        got = [logits(model, part, cache=cache) for part in ids.split(steps, dim=1)]
        torch.testing.assert_close(torch.cat(got, 1), want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_single(dtype):
    model = tiny_model()
    ids = tokens(2, 20)
    want = logits(model, ids, use_cache=False).softmax(-1)
    model = model.to(dtype)
    errors = {}
    for attention in ("diffqkv", "eager"):
        model.set_attn_implementation(attention)
        cache = diffqkv.Cache(model.config)
        got = [logits(model, part, cache=cache) for part in ids.split([12, 1, 1, 6], dim=1)]
        errors[attention] = (torch.cat(got, 1).float().softmax(-1) - want).abs().max()
    assert errors["diffqkv"] < 2 * errors["eager"] + 1e-3


def test_autocast_inference():
    model = tiny_model()
    ids = tokens(2, 20)
    want = logits(model, ids, use_cache=False)
    cache = diffqkv.Cache(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.cat([logits(model, part, cache=cache) for part in ids.split([12, 1, 7], dim=1)], 1)
    assert cache.layers[0].dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(got.float(), want, dim=-1).min() > 0.99


def test_defaults_are_the_fast_path():
    model = tiny_model()
    assert model.config._attn_implementation == "diffqkv"
    ids = tokens(1, 5)
    with torch.no_grad():
        cache = cache_in(model(ids))
    assert type(cache) is diffqkv.Cache and cache.layers[0].k_layout == "panels"
    generated = cache_in(generate(model, ids, return_dict_in_generate=True))
    assert type(generated) is diffqkv.Cache
    assert generated.layers[0].capacity == 32  # 5 + 8 - 1 tokens, known in advance, in whole panels
    for attention in ("sdpa", "eager"):
        chosen = diffqkv.SigmaForCausalLM._from_config(model.config, attn_implementation=attention)
        assert chosen.config._attn_implementation == attention


def test_dimensions_without_a_kernel_take_sdpa():
    assert tiny_model(head_dim=12).config._attn_implementation == "sdpa"
    assert tiny_model(head_dim=8, k_compression="expand").config._attn_implementation == "sdpa"


def test_which_op_runs(monkeypatch):
    model = tiny_model()
    calls = []
    for name in ("flash_attention", "decode_attention", "selective_v_attention"):
        op = getattr(diffqkv_models_attention, name)

        def recorded(*args, _name=name, _op=op, **kwargs):
            calls.append(_name)
            return _op(*args, **kwargs)

        monkeypatch.setattr(diffqkv_models_attention, name, recorded)
    cache = diffqkv.Cache(model.config)
    for part in tokens(1, 10).split([6, 1, 3], dim=1):
        logits(model, part, cache=cache)
    assert calls == ["flash_attention"] * 2 + ["decode_attention"] * 4
    calls.clear()
    static = StaticCache(config=model.config, max_cache_len=8)
    for _ in range(2):
        calls.clear()
        generate(model, tokens(1, 6), cache=static, max_new_tokens=2)
        assert calls == ["flash_attention"] * 2 + ["decode_attention"] * 2
        static.reset()


def test_beam_search():
    model = tiny_model()
    ids, mask = padded([9, 5], "left")
    model.set_attn_implementation("eager")
    options = {"num_beams": 3, "num_return_sequences": 2}
    want = generate(model, ids, mask, use_cache=False, **options)
    for attention in ATTENTIONS:
        model.set_attn_implementation(attention)
        for kind in CACHES:
            assert torch.equal(generate(model, ids, mask, **options, **cache_arguments(kind, model)), want)


def test_sampling_with_a_seed():
    model = tiny_model()
    ids, mask = padded([9, 5], "left")
    results = []
    for attention in ATTENTIONS:
        model.set_attn_implementation(attention)
        for kind in CACHES:
            torch.manual_seed(7)
            results.append(generate(model, ids, mask, do_sample=True, top_k=20, **cache_arguments(kind, model)))
    assert all(torch.equal(result, results[0]) for result in results)
    torch.manual_seed(8)
    assert not torch.equal(generate(model, ids, mask, do_sample=True, top_k=20), results[0])


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_prompt_lookup_and_assisted_decoding(compression):
    model = tiny_model(k_compression=compression)
    ids = tokens(1, 6).repeat(1, 3)
    want = generate(model, ids, max_new_tokens=20)
    assert torch.equal(generate(model, ids, max_new_tokens=20, prompt_lookup_num_tokens=4), want)
    twin = copy.deepcopy(model)
    twin.generation_config.num_assistant_tokens = 5
    assert torch.equal(generate(model, ids, max_new_tokens=20, assistant_model=twin), want)
    assert torch.equal(generate(model, ids, max_new_tokens=20, assistant_model=tiny_model(seed=1)), want)


@pytest.mark.parametrize("kind", ["diffqkv", "dynamic", "static"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_chunked_prefill(attention, kind):
    model = tiny_model()
    model.set_attn_implementation(attention)
    ids, mask = padded([11, 7], "left")
    want = new_tokens_one_by_one(copy.deepcopy(model), ids, mask)
    got = generate(model, ids, mask, prefill_chunk_size=4, **cache_arguments(kind, model))
    assert torch.equal(got[:, 11:], want)


def test_generate_continues_a_returned_cache():
    model = tiny_model()
    ids = tokens(1, 9)
    want = generate(model, ids, max_new_tokens=12)
    first = generate(model, ids, max_new_tokens=5, return_dict_in_generate=True)
    got = generate(model, first.sequences, max_new_tokens=7, cache=cache_in(first))
    assert torch.equal(got, want)


def test_streaming_and_logits_to_keep():
    model = tiny_model()
    ids = tokens(1, 9)
    seen = []

    class Streamer:
        def put(self, value):
            seen.append(value.flatten())

        def end(self):
            seen.append(None)

    want = generate(model, ids, streamer=Streamer())
    assert seen.pop() is None
    assert torch.equal(torch.cat(seen), want[0])
    torch.testing.assert_close(logits(model, ids, logits_to_keep=2), logits(model, ids)[:, -2:])


def test_profiler_ranges():
    model = tiny_model()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        logits(model, tokens(1, 5))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert [counts[name] for name in ("kv_cache", "attention", "augmented_q")] == [2, 2, 2]


def test_output_attentions():
    model = tiny_model((12, 4, 6))
    ids, mask = padded([9, 5], "left")
    results = {}
    for attention in ("diffqkv", "eager"):
        model.set_attn_implementation(attention)
        cache = diffqkv.Cache(model.config)
        weights = []
        with torch.no_grad():
            for start, end in ((0, 7), (7, 9)):
                out = model(
                    ids[:, start:end],
                    attention_mask=mask[:, :end],
                    cache=cache,
                    output_attentions=True,
                    output_hidden_states=True,
                )
                weights.append(out.attentions)
        assert len(out.attentions) == 2 and len(out.hidden_states) == 3
        assert weights[1][0].shape == (2, 12, 2, 9)
        results[attention] = torch.cat([w[1][:, :, -2:, :7].flatten(1) for w in weights], 1)
    valid_row = [results[a][0] for a in ("diffqkv", "eager")]
    torch.testing.assert_close(*valid_row, atol=1e-5, rtol=1e-4)


def test_continuous_batching_is_refused():
    paged = object.__new__(PagedAttentionCache)
    for options in ({"cache": paged}, {"past_key_values": paged}):
        with pytest.raises(NotImplementedError, match="continuous batching"):
            logits(tiny_model(), tokens(1, 4), **options)
    with pytest.raises(TypeError, match="cache: got object, want a cache"):
        logits(tiny_model(), tokens(1, 4), cache=object())


def test_the_cache_has_the_name_of_any_release():
    model, ids = tiny_model(), tokens(1, 8)
    want = logits(model, ids)[:, 5:]
    for name in ("cache", "past_key_values"):
        given = diffqkv.Cache(model.config)
        logits(model, ids[:, :5], **{name: given})
        torch.testing.assert_close(logits(model, ids[:, 5:], **{name: given}), want, atol=1e-5, rtol=1e-5)
        given.crop(-3)
        assert torch.equal(generate(model, ids, **{name: given}), generate(model, ids))
    with pytest.raises(ValueError, match="past_key_values: got another cache than cache"):
        logits(model, ids, cache=given, past_key_values=diffqkv.Cache(model.config))


@torch.no_grad()
def test_a_model_warns_of_nothing_that_will_go(recwarn, caplog):
    model, ids = tiny_model(), tokens(1, 6)
    model(ids, use_cache=True)
    generate(model, ids)
    generate(model, ids, cache=diffqkv.Cache(model.config), return_dict_in_generate=True)
    assert not [str(x.message) for x in recwarn if issubclass(x.category, (DeprecationWarning, FutureWarning))]
    assert "deprecated" not in caplog.text


# ---------------------------------------------------------------- the paper's formulas, half K


def rotate_by_hand(x, theta):
    """RoPE of x `[b, s, d]` at positions 0, 1, ..., written pair by pair."""
    out, half = torch.empty_like(x), x.shape[-1] // 2
    positions = torch.arange(x.shape[1], dtype=x.dtype)
    for i in range(half):
        angle = positions * theta ** (-2 * i / x.shape[-1])
        a, b = x[..., i], x[..., i + half]
        out[..., i] = a * angle.cos() - b * angle.sin()
        out[..., i + half] = b * angle.cos() + a * angle.sin()
    return out


def logits_by_hand(model, ids):
    """The model in float64, head by head, from its weights alone (eq. 2 to 13, 16 and 17, Appendix E)."""
    config, theta = model.config, model.config.rope_parameters["rope_theta"]
    weights = {name: value.double() for name, value in model.state_dict().items()}
    silu = torch.nn.functional.silu
    n_q, n_k, n_v = config.num_attention_heads, config.num_key_heads, config.num_value_heads

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * weights[name]

    h = weights["model.embed_tokens.weight"][ids]
    future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    for i in range(config.num_hidden_layers):
        w = {k.removeprefix(f"model.layers.{i}."): v for k, v in weights.items() if f"layers.{i}." in k}
        project = {k.split(".")[1].removesuffix("_proj"): v for k, v in w.items() if k.startswith("self_attn")}
        x = norm(h, f"model.layers.{i}.input_layernorm.weight")
        q = x @ project["q"].T
        if config.q_aug_dim is not None:
            q = (silu(q @ project["q_gate"].T) * (q @ project["q_up"].T)) @ project["q_down"].T
        q, k, v = (y.tensor_split(n, -1) for y, n in ((q, n_q), (x @ project["k"].T, n_k), (x @ project["v"].T, n_v)))
        if config.k_compression == "expand":
            k = [y @ project["k_expand"].T for y in k]
        if config.k_compression == "absorbed":
            q = [y @ project["q_absorb"].T for y in q]
        heads = []
        for head in range(n_q):
            query = rotate_by_hand(q[head], theta)
            key = rotate_by_hand(k[head * n_k // n_q], theta)
            scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[head * n_v // n_q])
        h = h + torch.cat(heads, -1) @ project["o"].T
        x = norm(h, f"model.layers.{i}.post_attention_layernorm.weight")
        gate, up, down = (w[f"mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        h = h + (silu(x @ gate) * (x @ up)) @ down
    return norm(h, "model.norm.weight") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("q_aug_dim", [None, 40])
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("heads", HEADS)
def test_logits_are_those_of_the_papers_formulas(heads, compression, q_aug_dim):
    model = tiny_model(heads, k_compression=compression, q_aug_dim=q_aug_dim)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    ids = tokens(2, 13)
    want = logits_by_hand(model, ids)
    for attention in ATTENTIONS:
        model.set_attn_implementation(attention)
        torch.testing.assert_close(logits(model, ids).double(), want, atol=1e-4, rtol=1e-4)


def test_expand_and_absorbed_are_the_same_map_where_rope_does_nothing():
    expand, absorbed = (tiny_model(k_compression=name) for name in ("expand", "absorbed"))
    state = expand.state_dict()
    for name in [name for name in state if "k_expand_proj" in name]:
        state[name.replace("k_expand_proj", "q_absorb_proj")] = state.pop(name).T
    absorbed.load_state_dict(state)
    for layer in absorbed.model.layers:
        layer.self_attn.scaling = expand.model.layers[0].self_attn.scaling
    ids = tokens(2, 9)
    still = {"position_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids), "use_cache": False}
    torch.testing.assert_close(logits(expand, ids, **still), logits(absorbed, ids, **still), atol=1e-4, rtol=1e-4)
    assert (logits(expand, ids) - logits(absorbed, ids)).abs().max() > 0.1


def test_half_k_caches_the_small_k():
    for compression in ("expand", "absorbed"):
        model = tiny_model((12, 4, 6), k_compression=compression)
        with torch.no_grad():
            cache = cache_in(model(tokens(2, 5)))
        assert [x.shape for x in cache.to_dense()[1]] == [(2, 4, 5, 8), (2, 6, 5, 16)]
        if compression == "expand":
            hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens(2, 5)))
            plain = model.model.layers[0].self_attn.k_proj(hidden).unflatten(-1, (4, 8)).transpose(1, 2)
            torch.testing.assert_close(cache.to_dense()[0][0], plain)


def test_expand_refuses_positions_it_cannot_know():
    model = tiny_model(k_compression="expand")
    ids = tokens(1, 6)
    holes = {
        "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 1, 1, 2, 3, 4]]),
    }
    skip = {"attention_mask": torch.ones_like(ids), "position_ids": torch.tensor([[0, 1, 2, 7, 8, 9]])}
    dense = {"attention_mask": torch.ones(6, 6).tril().bool().index_fill(1, torch.tensor([2]), False)[None, None]}
    for attention in ATTENTIONS:
        model.set_attn_implementation(attention)
        for first in (holes, skip, dense):
            # Without older tokens all positions are known.
            given = diffqkv.Cache(model.config)
            want = logits(model, ids, use_cache=False, **first)
            torch.testing.assert_close(logits(model, ids, cache=given, **first), want, atol=1e-5, rtol=1e-5)
        # What the first pass was told is remembered where a later mask does not show it.
        given = diffqkv.Cache(model.config)
        logits(model, ids[:, :5], cache=given, **{name: x[:, :5] for name, x in skip.items()})
        with pytest.raises(NotImplementedError, match="k_compression='expand' with a cache"):
            logits(model, ids[:, 5:], cache=given, position_ids=skip["position_ids"][:, 5:])
        for first in (holes, skip):
            given = diffqkv.Cache(model.config)
            logits(model, ids[:, :-1], cache=given, **{name: x[:, :-1] for name, x in first.items()})
            step = {"attention_mask": first["attention_mask"], "position_ids": first["position_ids"][:, -1:]}
            if first is skip:
                step["position_ids"] = step["position_ids"].expand(-1, 2) + torch.tensor([0, 2])
                step["attention_mask"] = torch.ones(1, 7)
            with pytest.raises(NotImplementedError, match="k_compression='expand' with a cache"):
                logits(model, ids[:, : step["position_ids"].shape[1]], cache=given, **step)
        with pytest.raises(NotImplementedError, match="k_compression='expand' with a cache"):
            generate(model, ids, holes["attention_mask"], cache_implementation="static")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
@torch.no_grad()
def test_a_float64_model(attention, compression):
    """What the ops do not take, stock functions compute."""
    model = tiny_model(k_compression=compression).double()
    model.set_attn_implementation(attention)
    ids, mask = padded([9, 6], "left")
    want = generate(model, ids, mask, use_cache=False)
    given = lambda: {"cache": diffqkv.Cache(model.config)}  # noqa: E731
    for options in ({}, given(), {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
        rows = slice(0, 1) if "prompt_lookup_num_tokens" in options else slice(None)
        assert torch.equal(generate(model, ids[rows], mask[rows], **options), want[rows])
    ids = tokens(1, 9)
    # Norms and rotations are float32, as in Llama.
    torch.testing.assert_close(logits(model, ids), logits_by_hand(model, ids), atol=1e-5, rtol=1e-3)
    ids_padded, mask = padded([9, 5], "left")
    want = logits(tiny_model(k_compression=compression), ids_padded, attention_mask=mask)[mask.bool()].double()
    for options in ({}, {"output_attentions": True}):
        got = logits(model, ids_padded, attention_mask=mask, **options)[mask.bool()]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    cached = given()
    got = [logits(model, part, **cached) for part in ids.split([5, 1, 3], 1)]
    torch.testing.assert_close(torch.cat(got, 1), logits(model, ids), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_scaled_rope(rope_type, compression):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model(k_compression=compression, rope_parameters=rope, max_position_embeddings=64)
    dim = model.config.attention_head_dim
    assert model.model.rotary_emb.inv_freq.shape == (dim // 2,)
    ids = tokens(1, 10)
    model.set_attn_implementation("eager")
    want = generate(model, ids, use_cache=False)
    model.set_attn_implementation("diffqkv")
    assert torch.equal(generate(model, ids), want)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    "heads, changes, message",
    [
        ((8, 4, 2), {}, r"got keys of batch, groups and width \(2, 2, 32\) in layer 0 of the cache, want \(2, 2, 16\)"),
        (
            (8, 2, 8),
            {},
            r"got values of batch, groups and width \(2, 2, 64\) in layer 0 of the cache, want \(2, 2, 32\)",
        ),
        ((8, 2, 4), {"num_hidden_layers": 1}, "got a cache of 1 layers, want 2"),
        ((8, 2, 4), {"num_hidden_layers": 3}, "got a cache of 3 layers, want 2"),
        (
            (8, 2, 4),
            {"batch": 3},
            r"got keys of batch, groups and width \(3, 2, 16\) in layer 0 of the cache, want \(2, ",
        ),
    ],
)
def test_stock_caches_of_another_model_are_refused(heads, changes, message, kind, attention):
    changes = dict(changes)
    batch = changes.pop("batch", 2)
    other, model = tiny_model(heads, **changes), tiny_model()
    cache = StaticCache(config=other.config, max_cache_len=12) if kind == "static" else DynamicCache()
    logits(other, tokens(batch, 5), cache=cache)
    model.set_attn_implementation(attention)
    with pytest.raises(ValueError, match=f"cache: {message}"):
        logits(model, tokens(2, 3), cache=cache)
    assert int(cache.get_seq_length()) == 5


# ---------------------------------------------------------------- other heads, other models, compilation


def test_sequence_classification(tmp_path):
    model = tiny_model(model_class=diffqkv.SigmaForSequenceClassification, num_labels=3)
    results = {}
    for side in ("left", "right"):
        ids, mask = padded([9, 5], side)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        results[side] = logits(model, ids, attention_mask=mask, position_ids=positions)
        for row, keep in enumerate(mask.bool()):
            alone = logits(model, ids[row, keep][None])[0]
            torch.testing.assert_close(results[side][row], alone, atol=1e-4, rtol=1e-4)
    assert results["left"].shape == (2, 3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is diffqkv.SigmaForSequenceClassification
    assert torch.equal(logits(loaded, ids, attention_mask=mask), logits(model, ids, attention_mask=mask))
    model.train()(ids, attention_mask=mask, labels=torch.tensor([0, 2])).loss.backward()
    assert model.score.weight.grad.abs().max() > 0


def test_sequence_classification_of_a_batch_needs_to_know_the_padding():
    model = tiny_model(model_class=diffqkv.SigmaForSequenceClassification, pad_token_id=None)
    assert logits(model, tokens(1, 5)).shape == (1, 2)
    with pytest.raises(ValueError, match="padding token"):
        logits(model, tokens(2, 5))


def test_token_classification(tmp_path):
    model = tiny_model(model_class=diffqkv.SigmaForTokenClassification, num_labels=5)
    ids, mask = padded([9, 5], "left")
    got = logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    assert got.shape == (2, 9, 5)
    for row, keep in enumerate(mask.bool()):
        torch.testing.assert_close(got[row, keep], logits(model, ids[row, keep][None])[0], atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert type(loaded) is diffqkv.SigmaForTokenClassification
    assert torch.equal(logits(loaded, ids, attention_mask=mask), logits(model, ids, attention_mask=mask))
    labels = torch.randint(5, ids.shape).masked_fill(mask == 0, -100)
    model.train()(ids, attention_mask=mask, labels=labels).loss.backward()
    assert model.score.weight.grad.abs().max() > 0


def test_question_answering(tmp_path):
    model = tiny_model(model_class=diffqkv.SigmaForQuestionAnswering)
    ids = tokens(2, 9)
    with torch.no_grad():
        out = model(ids)
        hidden = model.model(ids).last_hidden_state
    torch.testing.assert_close(torch.stack([out.start_logits, out.end_logits], -1), model.qa_outputs(hidden))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert type(loaded) is diffqkv.SigmaForQuestionAnswering
    with torch.no_grad():
        assert torch.equal(loaded(ids).end_logits, out.end_logits)
    ends = torch.tensor([2, 5])
    model.train()(ids, start_positions=ends - 1, end_positions=ends).loss.backward()
    assert model.qa_outputs.weight.grad.abs().max() > 0


def test_a_llama_runs_on_our_attention_and_cache():
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids, mask = padded([11, 7], "left")
    want = generate(model, ids, mask)
    model.set_attn_implementation("diffqkv")
    for kind in CACHES:
        assert torch.equal(generate(model, ids, mask, **cache_arguments(kind, model)), want), kind


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_fullgraph_compilation(compression):
    model = tiny_model(k_compression=compression)
    ids = tokens(1, 9)
    want = logits(model, ids)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, want, atol=1e-4, rtol=1e-4)
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(ids[:, :6], cache=cache)
        for i in range(6, 9):
            position = torch.tensor([[i]])
            step = compiled(ids[:, i : i + 1], cache=cache, position_ids=position).logits
            torch.testing.assert_close(step, want[:, i : i + 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_rounds_as_llama(ops, dtype):
    norm = LlamaRMSNorm(512, 1e-6).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(64, 512).to(dtype)
    out, want = ops.rms_norm(x, norm.weight.detach(), 1e-6), norm(x).detach()
    # Sums in another order move one of the roundings here and there.
    assert (out != want).float().mean() <= (0.2 if dtype == torch.float32 else 2e-3)
    torch.testing.assert_close(out, want, rtol=(4 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps, atol=0)
