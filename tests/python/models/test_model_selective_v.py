"""Selective V in the models: the rows that a decode step reads, as the configuration or the call says."""

import pytest
import torch
from tiny_sigma import CACHE, NEW_TOKENS, generate, logits, padded, tiny_config, tiny_model, tokens
from torch._dynamo.exc import Unsupported
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import diffqkv
from diffqkv.models import attention as diffqkv_attention_module
from diffqkv.models import record_selective_v
from diffqkv.models.sigma import modeling_sigma

TAILS = ["drop", "renorm", "mean"]
PARTS = [8, 1, 3]


def cache_of(kind, model):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=32)
    return diffqkv.Cache(model.config) if kind == "diffqkv" else DynamicCache(config=model.config)


def steps(model, ids, kind="diffqkv", mask=None, parts=PARTS, **options):
    """Logits of a prompt and of cached steps, part by part."""
    cache, seen, out = cache_of(kind, model), 0, []
    for part in ids.split(parts, dim=1):
        seen += part.shape[1]
        given = {} if mask is None else {"attention_mask": mask[:, :seen]}
        out.append(logits(model, part, **{CACHE: cache}, **given, **options))
    return out


@pytest.fixture
def selections(monkeypatch):
    """The keyword arguments of each call of the op, and its results beside dense attention on the same inputs."""
    calls = []

    def select(q, k_cache, v_cache, cache_seqlens, **options):
        result = diffqkv.selective_v_attention(q, k_cache, v_cache, cache_seqlens, **options)
        dense_options = {name: options[name] for name in ("cache_start", "k_layout", "softmax_scale")}
        dense = diffqkv.decode_attention(q, k_cache, v_cache, cache_seqlens, **dense_options)
        out = result[0] if options["return_stats"] else result
        calls.append(options | {"distance": (out - dense).float().norm(dim=-1).max()})
        return result

    monkeypatch.setattr(diffqkv_attention_module, "selective_v_attention", select)
    return calls


# ---------------------------------------------------------------- which rows


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", ["diffqkv", "dynamic", "static"])
def test_reading_all_rows_is_dense_attention_to_the_bit(tail, kind, side):
    ids, mask = padded([12, 9], side) if side else (tokens(2, 12), None)
    model = tiny_model((12, 4, 6))
    want = steps(model, ids, kind, mask)
    for top_k in (12, 100):
        got = steps(model, ids, kind, mask, selective_v={"top_k": top_k, "tail": tail})
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    few = steps(model, ids, kind, mask, selective_v={"top_k": 2, "tail": tail})
    assert torch.equal(few[0], want[0]) and not torch.equal(few[1], want[1])


@pytest.mark.parametrize("k_compression", [None, "expand"])
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("tail", ["drop", "renorm", "mean"])
def test_the_mean_tail_takes_v_stats_from_the_cache(monkeypatch, tail, side, k_compression):
    ids, mask = padded([12, 9], side) if side else (tokens(2, 12), None)
    model = tiny_model((12, 4, 6), selective_v_top_k=[0, 3], selective_v_tail=tail, k_compression=k_compression)
    calls = []

    def steps(keeps_stats):
        def select(*args, v_stats=None, **options):
            calls.append(v_stats)
            return diffqkv.selective_v_attention(*args, v_stats=v_stats if keeps_stats else None, **options)

        monkeypatch.setattr(diffqkv_attention_module, "selective_v_attention", select)
        cache = diffqkv.Cache(model.config)
        seen, got = 0, []
        for part in ids.split([7, 1, 3, 1], dim=1):
            seen += part.shape[1]
            options = {} if mask is None else {"attention_mask": mask[:, :seen]}
            got.append(logits(model, part, cache=cache, **options))
        return cache, got

    cache, got = steps(True)
    uses_stats = tail == "mean" and side is None
    assert [stats is not None for stats in calls] == [uses_stats] * 3
    assert [layer._v_stats is not None for layer in cache.layers] == [False, uses_stats]
    for a, b in zip(got, steps(False)[1], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tail", ["drop", "renorm", "mean"])
def test_selective_v_keeps_the_best_rows_of_the_chosen_layers(monkeypatch, tail):
    top_k = 3
    ids = tokens(2, 12)
    selective = tiny_model(selective_v_top_k=[0, top_k], selective_v_tail=tail)
    cache = diffqkv.Cache(selective.config)
    got = [logits(selective, part, cache=cache) for part in ids.split([8, 1, 3], dim=1)]
    cache = diffqkv.Cache(selective.config)
    one_by_one = [logits(selective, part, cache=cache) for part in ids.split([8, 1, 1, 1, 1], dim=1)]
    torch.testing.assert_close(got[2], torch.cat(one_by_one[2:], dim=1))

    dense = tiny_model()
    torch.testing.assert_close(got[0], logits(dense, ids[:, :8]), atol=1e-4, rtol=1e-4)
    original = modeling_sigma.eager_attention_forward

    def eager_top_k(module, query, key, value, attention_mask, scaling, **kwargs):
        out, weights = original(module, query, key, value, attention_mask, scaling, **kwargs)
        if module.layer_idx == 0 or key.shape[2] == query.shape[2]:
            return out, weights
        kept = weights * (weights >= weights.topk(top_k, -1).values[..., -1:])
        mass = kept.sum(-1, keepdim=True)
        if tail == "renorm":
            kept = kept / mass
        if tail == "mean":
            seen = weights > 0
            kept = kept + (1 - mass) * seen / seen.sum(-1, keepdim=True)  # the mean of the V rows that the query sees
        return (kept @ value.repeat_interleave(module.num_key_value_groups, 1)).transpose(1, 2), weights

    monkeypatch.setattr(modeling_sigma, "eager_attention_forward", eager_top_k)
    dense.set_attn_implementation("eager")
    cache = DynamicCache(config=dense.config)
    want = [logits(dense, part, cache=cache) for part in ids.split([8, 1, 3], dim=1)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    monkeypatch.undo()
    assert (got[1] - logits(dense, ids)[:, 8:9]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["diffqkv", "dynamic", "static"])
def test_a_call_says_what_the_configuration_says(kind):
    ids, mask = padded([12, 9], "left")
    options = {"top_k": [0, 3], "tail": "renorm", "keep_first": 1, "keep_last": 2, "max_error": 5.0}
    configured = tiny_model(**{f"selective_v_{name}": value for name, value in options.items()})
    want = steps(configured, ids, kind, mask)
    model = tiny_model()
    for a, b in zip(steps(model, ids, kind, mask, selective_v=options), want, strict=True):
        assert torch.equal(a, b)
    dense = steps(model, ids, kind, mask)
    assert torch.equal(dense[0], want[0]) and not torch.equal(dense[1], want[1])
    for a, b in zip(steps(configured, ids, kind, mask, selective_v={"top_k": None}), dense, strict=True):
        assert torch.equal(a, b)
    for name, value in options.items():  # fields may be set at any time
        setattr(model.config, f"selective_v_{name}", value)
    assert torch.equal(steps(model, ids, kind, mask)[1], want[1])


def test_the_op_is_told_everything(selections):
    model = tiny_model(selective_v_top_k=[0, 4], selective_v_tail="mean", selective_v_keep_first=1)
    steps(model, tokens(2, 12))
    steps(model, tokens(2, 12), selective_v={"top_k": [5, 0], "keep_last": 3, "max_error": 0.25})
    told = [
        {name: call[name] for name in ("top_k", "tail", "keep_first", "keep_last", "max_error")} for call in selections
    ]
    mean = {"tail": "mean", "keep_first": 1}
    assert (
        told
        == [{"top_k": 4, "keep_last": 0, "max_error": None, **mean}] * 2
        + [{"top_k": 5, "keep_last": 3, "max_error": 0.25, **mean}] * 2
    )
    # The statistics of the cache serve the mean and the guarantee.
    assert all(call["v_stats"] is not None for call in selections)


def test_prompts_and_their_chunks_are_dense(selections):
    model = tiny_model()
    ids = tokens(1, 48)
    got = steps(model, ids, parts=[20, 17, 11], selective_v={"top_k": 1})
    assert len(selections) == 2  # the last part, in two layers
    want = steps(model, ids, parts=[20, 17, 11])
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and not torch.equal(got[2], want[2])


# ---------------------------------------------------------------- generate


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": True}])
def test_generate_takes_it_per_call(options):
    model, configured = tiny_model(), tiny_model(selective_v_top_k=2, selective_v_tail="renorm")
    ids = tokens(2, 11)
    results = []
    for x, given in ((configured, {}), (model, {"selective_v": {"top_k": 2, "tail": "renorm"}}), (model, {})):
        torch.manual_seed(0)
        results.append(generate(x, ids, **options, **given))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    torch.manual_seed(0)
    assert torch.equal(generate(model, ids, selective_v={"top_k": 100}, **options), results[2])


def test_assisted_decoding_reads_the_same_rows():
    model = tiny_model(selective_v_top_k=4)
    ids = tokens(1, 6).repeat(1, 3)
    want = generate(model, ids)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=4), want)
    assert torch.equal(generate(model, ids, assistant_model=tiny_model(seed=1)), want)


def test_compiled_steps():
    model = tiny_model(selective_v_top_k=3, selective_v_tail="mean")
    ids = tokens(1, 10)
    want = steps(model, ids, "static", parts=[7, 1, 1, 1])
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=32)
    logits(model, ids[:, :7], cache=cache)
    for i in range(7, 10):
        got = logits(compiled, ids[:, i : i + 1], cache=cache, position_ids=torch.tensor([[i]]))
        torch.testing.assert_close(got, want[i - 6], atol=1e-4, rtol=1e-4)
    with record_selective_v(), pytest.raises(Unsupported, match="record_selective_v: not built for compiled code"):
        logits(compiled, ids[:, :1], cache=cache, position_ids=torch.tensor([[10]]))
    torch.compiler.reset()


# ---------------------------------------------------------------- certified error, statistics


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", ["diffqkv", "dynamic"])
def test_max_error_bounds_each_layer(selections, kind, tail, side):
    ids, mask = padded([20, 14], side) if side else (tokens(2, 20), None)
    model = tiny_model()
    parts = [16, 1, 3]
    steps(model, ids, kind, mask, parts, selective_v={"top_k": 1, "tail": tail})
    free = max(call["distance"] for call in selections)
    selections.clear()
    limit = float(free) / 4
    with record_selective_v() as record:
        steps(model, ids, kind, mask, parts, selective_v={"top_k": 1, "tail": tail, "max_error": limit})
    assert len(selections) == len(record) == 4
    assert all(call["distance"] <= limit for call in selections)
    assert all((stats.error_bound <= limit).all() for _, stats in record)
    assert any((stats.rows_used > 1).any() for _, stats in record)
    want = steps(model, ids, kind, mask, parts)
    exact = steps(model, ids, kind, mask, parts, selective_v={"top_k": 1, "tail": tail, "max_error": 0.0})
    for a, b in zip(exact, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_records():
    model = tiny_model((12, 4, 6), selective_v_top_k=[0, 3])
    ids = tokens(2, 11)
    with record_selective_v() as record:
        want = generate(model, ids)
        with record_selective_v() as inner:
            steps(model, ids[:, :9], parts=[8, 1])
        generate(model, ids, selective_v={"top_k": 2}, max_new_tokens=3)
    assert [layer for layer, _ in inner] == [1]
    assert [layer for layer, _ in record] == [1] * (NEW_TOKENS - 1) + [0, 1] * 2
    assert torch.equal(generate(model, ids), want) and len(record) == NEW_TOKENS + 3
    for i, (_, stats) in enumerate(record):
        top_k = 3 if i < NEW_TOKENS - 1 else 2
        assert stats.kept_mass.shape == (2, 12, 1) and stats.indices.shape == (2, 12, 1, top_k)
        assert (stats.rows_used == top_k).all()
        assert (stats.kept_mass > top_k / 32).all() and (stats.kept_mass <= 1).all() and stats.kept_mass.mean() < 1
    with record_selective_v() as record:
        steps(tiny_model(), ids, parts=[8, 3])
    assert record == []


def test_kept_mass_is_the_softmax_of_the_rows_read():
    model = tiny_model(num_hidden_layers=1)
    ids = tokens(2, 9)
    with record_selective_v() as record:
        steps(model, ids, parts=[8, 1], selective_v={"top_k": 3})
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True, use_cache=False).attentions[0][:, :, -1:]
    torch.testing.assert_close(record[0][1].kept_mass, weights.topk(3, -1).values.sum(-1), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- what cannot select


def test_other_attentions_refuse_a_call_and_warn_of_a_configuration(monkeypatch):
    warned = []
    monkeypatch.setattr(modeling_sigma.logger, "warning_once", warned.append)
    ids = tokens(1, 12)
    for attention in ("sdpa", "eager"):
        model = tiny_model(selective_v_top_k=3)
        model.set_attn_implementation(attention)
        cache = diffqkv.Cache(model.config)
        with pytest.raises(ValueError, match=f"selective_v: got .*attention '{attention}' reads all V rows"):
            logits(model, ids, cache=cache, selective_v={"top_k": 2})
        assert cache.get_seq_length() == 0
        logits(model, ids, use_cache=False)
        assert not warned
        dense = tiny_model()
        dense.set_attn_implementation(attention)
        assert torch.equal(steps(model, ids)[1], steps(dense, ids)[1])
        assert set(warned) == {f"selective_v_top_k: attention '{attention}' reads all V rows, only 'diffqkv' selects"}
        warned.clear()


def test_steps_that_the_op_cannot_compute_are_dense_and_say_so(monkeypatch, selections):
    warned = []
    monkeypatch.setattr(diffqkv_attention_module.logger, "warning_once", warned.append)
    model, selection = tiny_model(), {"top_k": 2}
    ids = tokens(1, 8)
    holes = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1]])
    for options in ({"output_attentions": True}, {"attention_mask": holes}):
        want, got = DynamicCache(config=model.config), DynamicCache(config=model.config)
        for cache in (want, got):
            logits(model, ids[:, :7], cache=cache)
        warned.clear()
        step = logits(model, ids[:, 7:], cache=got, selective_v=selection, **options)
        assert warned[0].startswith("selective_v: a step that records gradients, returns probabilities, computes in")
        assert torch.equal(step, logits(model, ids[:, 7:], cache=want, **options))
    warned.clear()
    cache = diffqkv.Cache(model.config)
    with torch.no_grad():
        model(ids[:, :7], cache=cache, selective_v=selection)
    assert not warned
    step = model(ids[:, 7:], cache=cache, selective_v=selection).logits  # in grad mode
    assert warned and step.requires_grad and not selections
    torch.testing.assert_close(step.detach(), logits(model, ids)[:, 7:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"top_k": -3}, {"top_k": [1]}, {"rows": 3}, {"tail": "keep"}])
def test_bad_selections_are_refused_before_any_work(wrong):
    model = tiny_model(selective_v_top_k=2)
    cache = diffqkv.Cache(model.config)
    for call in (model, model.model):
        with pytest.raises(ValueError, match="^selective_v"):
            call(tokens(1, 4), cache=cache, selective_v=wrong)
    with pytest.raises(ValueError, match="^selective_v"):
        generate(model, tokens(1, 4), cache=cache, selective_v=wrong)
    assert cache.get_seq_length() == 0 and not cache.is_initialized


def test_models_of_others_select_too(selections):
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, initializer_range=0.3, attn_implementation="diffqkv",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = tokens(2, 12)
    want = steps(model, ids)
    assert not selections
    few = steps(model, ids, selective_v={"top_k": 2})
    assert [call["top_k"] for call in selections] == [2] * 4
    assert torch.equal(few[0], want[0]) and not torch.equal(few[1], want[1])


def test_the_configuration_is_saved(tmp_path):
    config = tiny_config(selective_v_top_k=[0, 4], selective_v_max_error=0.5, selective_v_keep_last=8)
    config.save_pretrained(tmp_path)
    assert diffqkv.SigmaConfig.from_pretrained(tmp_path).selective_v() == config.selective_v()
