"""Padding, packed rows, windows, softcap and sinks: the ops see the keys that stock attention sees, without a mask."""

from itertools import product

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_sigma import ATTENTIONS, CACHE, HEADS, VOCAB, Recorder, cache_in, logits, packed, padded, tiny_model, tokens
from transformers import (
    DataCollatorWithFlattening,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    masking_utils,
)
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

import diffqkv
from diffqkv.models import attention as diffqkv_attention_module
from diffqkv.models.attention import diffqkv_attention
from diffqkv.models.mask import diffqkv_mask, packing_of, read_spans, spans_to_mask

# Masks of packed rows say that positions are consecutive; before transformers 5.23 other models take dense ones.
MASKS_SAY_PACKED = Version(transformers.__version__) >= Version("5.23")

# ---------------------------------------------------------------- padding and dense masks


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padded_logits(attention, side):
    model = tiny_model()
    model.set_attn_implementation(attention)
    ids, mask = padded([11, 4, 1], side)
    got = logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    for row, keep in enumerate(mask.bool()):
        alone = logits(model, ids[row, keep][None])[0]
        torch.testing.assert_close(got[row, keep], alone, atol=1e-4, rtol=1e-4)


def test_right_padding_sees_the_same_keys_as_in_sdpa():
    model = tiny_model()
    ids, mask = padded([11, 4, 1], "right")
    want = logits(model, ids, attention_mask=mask)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits(model, ids, attention_mask=mask), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_masks_that_are_not_one_span(cached):
    model = tiny_model()
    ids = tokens(2, 12)
    holes = torch.ones(2, 12, dtype=torch.long)
    holes[0, 3:5] = 0
    dense = torch.ones(12, 12, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    dense[1, :, :, 2] = False
    dense[1, :, 2, 2] = True
    for mask in (holes, dense):
        results = []
        for attention in ("diffqkv", "sdpa"):
            model.set_attn_implementation(attention)
            if not cached:
                results.append(logits(model, ids, attention_mask=mask, use_cache=False))
                continue
            cache = diffqkv.Cache(model.config)
            parts = []
            for start, end in ((0, 8), (8, 9), (9, 12)):
                part_mask = mask[:, :end] if mask is holes else mask[:, :, start:end, :end]
                part = {"attention_mask": part_mask, CACHE: cache}
                parts.append(logits(model, ids[:, start:end], **part))
            results.append(torch.cat(parts, 1))
        torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
        assert (results[0] - logits(model, ids)).abs().max() > 0.1


def test_a_mask_that_hides_the_newest_tokens():
    model = tiny_model()
    ids = tokens(2, 9)
    results = []
    for attention in ("diffqkv", "sdpa"):
        model.set_attn_implementation(attention)
        cache = diffqkv.Cache(model.config)
        logits(model, ids[:, :6], cache=cache)
        results.append(logits(model, ids[:, 6:], attention_mask=torch.ones(2, 4), cache=cache))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- packed rows

LENGTHS = [5, 3, 9, 1, 6, 10]  # two rows of 17, of three sequences each


def flash_kwargs(lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def one_by_one(model, ids, lengths):
    """The logits of each sequence alone, `[all tokens, vocabulary]`."""
    return torch.cat([logits(model, part)[0] for part in ids.view(1, -1).split(lengths, dim=1)])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("heads", HEADS)
def test_packed_rows_are_separate_sequences(heads, rows):
    model = tiny_model(heads)
    ids, positions = packed(LENGTHS, rows)
    want = one_by_one(model, ids, LENGTHS)
    told_by = {
        "positions": {"position_ids": positions},
        "bounds": flash_kwargs(LENGTHS),
        "both": {"position_ids": positions, **flash_kwargs(LENGTHS)},
        "bounds alone": {"cu_seq_lens_q": flash_kwargs(LENGTHS)["cu_seq_lens_q"]},
    }
    for attention in ATTENTIONS:
        model.set_attn_implementation(attention)
        results = []
        for options in told_by.values():
            with Recorder(ids.shape[1]) as record, torch.no_grad():
                out = model(ids, **options)
            torch.testing.assert_close(out.logits.flatten(0, 1), want, atol=1e-4, rtol=1e-4)
            assert cache_in(out) is None
            if attention == "diffqkv":
                assert record.ops["flash_attention_varlen"] == 2 and not record.dense
            results.append(out.logits)
        assert all(torch.equal(result, results[0]) for result in results)


def test_a_packed_row_is_the_same_in_one_row_and_in_two():
    model = tiny_model()
    one, two = (packed(LENGTHS, rows) for rows in (1, 2))
    got = [logits(model, ids, position_ids=positions, use_cache=False).flatten() for ids, positions in (one, two)]
    assert torch.equal(*got)


def test_positions_are_known_from_the_bounds():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=12)
    ids, _ = packed([11, 10])
    want = one_by_one(model, ids, [11, 10])  # running on, positions would pass 12 and rotate by other angles
    got = logits(model, ids, use_cache=False, **flash_kwargs([11, 10]))[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_what_a_collator_says_of_packed_rows():
    """transformers' collator can say it in three ways at once."""
    model = tiny_model()
    texts = [{"input_ids": tokens(1, length, seed=length)[0].tolist()} for length in LENGTHS]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator(texts)
    assert {"position_ids", "cu_seq_lens_q", "max_length_q", "seq_idx"} <= batch.keys()
    want = torch.cat([logits(model, torch.tensor([text["input_ids"]]), use_cache=False) for text in texts], 1)
    for names in (batch.keys(), {"input_ids", "position_ids"}, {"input_ids", "position_ids", "seq_idx"}):
        told = {name: batch[name] for name in names if name != "labels"}
        torch.testing.assert_close(logits(model, told.pop("input_ids"), **told), want, atol=1e-4, rtol=1e-4)


def test_packed_rows_take_no_cache_and_no_mask():
    for attention in ATTENTIONS:
        model = tiny_model()
        model.set_attn_implementation(attention)
        ids, positions = packed([5, 3, 4])
        for options in ({"position_ids": positions}, flash_kwargs([5, 3, 4])):
            with pytest.raises(ValueError, match="position_ids: got several sequences in a row with a cache"):
                logits(model, ids, cache=diffqkv.Cache(model.config), **options)
        with pytest.raises(ValueError, match="attention_mask: got one beside cu_seq_lens_q"):
            logits(model, ids, attention_mask=torch.ones_like(ids), **flash_kwargs([5, 3, 4]))


@pytest.mark.parametrize("lengths, rows", [([5, 3], 1), ([5, 9], 1), ([7, 5], 2)])
def test_bounds_must_fill_the_rows(lengths, rows):
    with pytest.raises(ValueError, match="cu_seq_lens_q: got .* want the bounds of sequences that fill"):
        logits(tiny_model(), tokens(rows, 12 // rows), **flash_kwargs(lengths))


def test_probabilities_of_packed_rows():
    ids, positions = packed([5, 3, 4])
    results = []
    for attention in ("diffqkv", "eager"):
        model = tiny_model((12, 4, 6))
        model.set_attn_implementation(attention)
        with torch.no_grad():
            results.append(model(ids, position_ids=positions, output_attentions=True).attentions[1])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- the mask function


def mask_arguments(q_length, kv_length, mask_function=causal_mask_function, mask=None, batch=3, kv_offset=0):
    offset = kv_offset + kv_length - q_length
    return {
        "batch_size": batch,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": mask,
    }


def assert_says_what_sdpa_mask_says(arguments):
    spans = diffqkv_mask(**arguments)
    assert spans.dtype == torch.int32
    got = spans_to_mask(spans, arguments["q_length"], arguments["kv_length"])
    assert torch.equal(got, sdpa_mask(**arguments, allow_is_causal_skip=False))
    return spans


@pytest.mark.parametrize("kv_offset", [0, 3])
@pytest.mark.parametrize("window", [None, 1, 4, 20])
@pytest.mark.parametrize("q_length, kv_length", [(6, 6), (1, 9), (3, 9)])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_spans_say_what_sdpa_mask_says(q_length, kv_length, side, window, kv_offset):
    mask = torch.ones(3, kv_offset + kv_length, dtype=torch.bool)
    if side == "left":
        mask[1, : kv_offset + 2] = mask[2, : kv_offset + kv_length - q_length] = False
    if side == "right" and q_length == kv_length:
        mask[1, kv_offset + 4 :] = mask[2] = False
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    mask = None if side == "none" else mask
    spans = assert_says_what_sdpa_mask_says(mask_arguments(q_length, kv_length, function, mask, kv_offset=kv_offset))
    assert spans.shape == (3, 1, 1 if window is None else q_length, 3)
    known = read_spans(spans)
    assert known.window == (-1 if window is None else window - 1)
    # What was attached is lost when a mask changes its device.
    copied = read_spans(spans.clone())
    if spans.shape[2] == 1:
        assert torch.equal(copied.total, known.total) and copied.window == -1
    else:
        assert copied is None


@pytest.mark.skipif(not MASKS_SAY_PACKED, reason="transformers before 5.23")
@pytest.mark.parametrize("window", [None, 3])
def test_spans_of_packed_rows(window, monkeypatch):
    _, positions = packed(LENGTHS, 2)
    made = {}
    monkeypatch.setitem(
        masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "diffqkv", lambda **x: made.update(x)
    )
    config = LlamaConfig(**SMALL, attn_implementation="diffqkv", sliding_window=window)
    make = masking_utils.create_causal_mask if window is None else masking_utils.create_sliding_window_causal_mask
    make(config, torch.zeros(2, 17, 64), None, None, position_ids=positions)
    spans = assert_says_what_sdpa_mask_says(mask_arguments(17, 17, made["mask_function"], batch=2))
    packing = read_spans(spans).packing
    assert packing.cu_seqlens_q.diff().tolist() == LENGTHS and packing.max_seqlen_q == max(LENGTHS)
    compiled = torch.compile(packing_of, backend="eager", fullgraph=True)(positions == 0)
    lengths = compiled.cu_seqlens_q.diff()
    assert len(lengths) == 34 and lengths[lengths > 0].tolist() == LENGTHS and compiled.max_seqlen_q == 17


def test_other_mask_functions_are_dense():
    sequences = torch.tensor([[0, 1, 0, 1, 1]])
    for function in (
        and_masks(causal_mask_function, packed_sequence_mask_function(sequences)),
        and_masks(sliding_window_overlay(3), sliding_window_overlay(2)),
        and_masks(causal_mask_function, lambda b, h, q, k: q - k < 3),
        lambda b, h, q, k: k <= q,
    ):
        arguments = mask_arguments(5, 5, function, batch=1)
        got = diffqkv_mask(**arguments)
        assert got.dtype == torch.bool and torch.equal(got, sdpa_mask(**arguments, allow_is_causal_skip=False))


# ---------------------------------------------------------------- the attention function


def random_qkv(requires_grad=False):
    shapes = ((2, 8, 12, 16), (2, 2, 12, 16), (2, 4, 12, 16))
    return [torch.randn(shape).requires_grad_(requires_grad) for shape in shapes]


def stock(module, *args, **kwargs):
    """The function's result where it must compute densely."""
    return diffqkv_attention(module, *args, output_attentions=True, **kwargs)[0]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 4}, {"softcap": 2.0}, {"sliding_window": 1, "softcap": 0.5}]
)
def test_window_softcap_and_sinks_in_the_ops_and_densely(options, sinks):
    module = tiny_model().model.layers[0].self_attn
    options = options | ({"s_aux": torch.randn(8)} if sinks else {})
    packing = {"cu_seq_lens_q": torch.tensor([0, 5, 12, 20, 24])}
    for more in ({}, packing):
        q, k, v = random_qkv(requires_grad=True)
        results = []
        for function in (diffqkv_attention, stock):
            out = function(module, q, k, v, None, **options, **more)
            out = out[0] if isinstance(out, tuple) else out
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        got, want = (function(module, q[:, :, -3:], k, v, None, **options) for function in (diffqkv_attention, stock))
        torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)


def test_padding_and_bounds_together():
    module = tiny_model().model.layers[0].self_attn
    q, k, v = random_qkv()
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[1, 9:] = False
    mask = diffqkv_mask(**mask_arguments(12, 12, mask=padding, batch=2))
    got, _ = diffqkv_attention(module, q, k, v, mask, cu_seq_lens_q=torch.tensor([0, 5, 12, 20, 24]))
    together = sdpa_mask(**mask_arguments(12, 12, mask=padding, batch=2), allow_is_causal_skip=False)
    blocks = (torch.block_diag(torch.ones(a, a), torch.ones(b, b)).bool() for a, b in ((5, 7), (8, 4)))
    together = together & torch.stack(list(blocks))[:, None]
    want, _ = diffqkv_attention(module, q, k, v, together)
    seen = together.any(-1)[:, 0]
    torch.testing.assert_close(got[seen], want[seen])


def test_what_is_not_built_is_named():
    module = tiny_model().model.layers[0].self_attn
    q, k, v = random_qkv()
    for name, options in (
        ("window", {"sliding_window": 4}),
        ("softcap", {"softcap": 1.0}),
        ("sinks", {"s_aux": q[0, :, 0, 0]}),
    ):
        with pytest.raises(NotImplementedError, match=f"{name}: not built for selective V"):
            diffqkv_attention(module, q[:, :, -1:], k, v, None, selective_v={"top_k": 3}, **options)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q: packed sequences with cached tokens"):
        diffqkv_attention(module, q[:, :, -1:], k, v, None, cu_seq_lens_q=torch.tensor([0, 1, 2]))


# ---------------------------------------------------------------- models of others

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def other_model(name):
    """A small random model of transformers in training mode on the stock attention that computes it."""
    small = SMALL | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    torch.manual_seed(0)
    match name:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**SMALL))
        case "mistral":
            model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4))
        case "gemma2":
            config = Gemma2Config(**small, query_pre_attn_scalar=16, attn_logit_softcapping=2.0)
            model = Gemma2ForCausalLM(config)
        case "gpt_oss":
            config = GptOssConfig(
                **small,
                num_local_experts=2,
                num_experts_per_tok=1,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            )
            model = GptOssForCausalLM(config)
    model.set_attn_implementation("eager")
    return model.train()


OTHERS = ["llama", "mistral", "gemma2", "gpt_oss"]


@pytest.mark.usefixtures("library")
# Without gpt_oss on packed rows: it does not tell its mask the positions, so that stock attention mixes sequences.
@pytest.mark.parametrize("name, rows", [*product(OTHERS, ["plain", "left", "right"]), *product(OTHERS[:3], ["packed"])])
def test_other_models_train_through_the_ops(name, rows):
    model = other_model(name)
    if rows == "plain":
        ids, options = tokens(2, 17), {}
    elif rows == "packed":
        ids, positions = packed(LENGTHS, 2)
        options = {"position_ids": positions, **flash_kwargs(LENGTHS)}
    else:
        ids, mask = padded([17, 9], rows)
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    labels = ids.masked_fill((options.get("position_ids", ids) == 0) | (ids == 0), -100)
    results = []
    for attention in ("eager", "diffqkv"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        with Recorder(17) as record:
            loss = model(ids, labels=labels, use_cache=False, **options).loss
            loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*results, atol=3e-5, rtol=2e-3)
    if rows == "packed" and not MASKS_SAY_PACKED:
        return
    op = "flash_attention_varlen" if rows == "packed" else "flash_attention"
    assert {n: c for n, c in record.ops.items() if "attention" in n} == {op: 2, f"{op}_backward": 2}
    assert not record.dense


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_generate_through_the_ops(name, monkeypatch):
    model = other_model(name).eval()
    ids, mask = padded([11, 7], "left")
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    want = model.generate(ids, **options)
    assert len(want.unique()) > 6
    model.set_attn_implementation("diffqkv")
    warned = []
    monkeypatch.setattr(diffqkv_attention_module.logger, "warning_once", warned.append)
    for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(model.generate(ids, **options, **cache), want), cache
    assert not warned


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", OTHERS)
def test_bounds_are_enough_for_other_models(name):
    model = other_model(name).eval()
    ids, _ = packed(LENGTHS, 2)
    want = one_by_one(model, ids, LENGTHS)
    model.set_attn_implementation("diffqkv")
    with Recorder(17) as record:
        got = logits(model, ids, use_cache=False, **flash_kwargs(LENGTHS)).flatten(0, 1)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert record.ops["flash_attention_varlen"] == 2 and not record.dense


def test_a_compiled_llama_keeps_its_packed_rows_apart():
    model = other_model("llama").eval()
    ids, positions = packed(LENGTHS, 2)
    want = logits(model, ids, position_ids=positions, use_cache=False)
    model.set_attn_implementation("diffqkv")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for options in ({"position_ids": positions}, flash_kwargs(LENGTHS)):
        got = logits(compiled, ids, use_cache=False, **options)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("cache", ["diffqkv", "dynamic"])
def test_autocast_with_a_model_that_rotates_in_float32(cache):
    model = other_model("llama").eval()
    model.set_attn_implementation("diffqkv")
    ids = tokens(2, 12)
    want = logits(model, ids)
    options = {CACHE: diffqkv.Cache(model.config)} if cache == "diffqkv" else {"use_cache": True}
    parts = []
    with torch.autocast("cpu", torch.bfloat16), Recorder(12) as record, torch.no_grad():
        for part in ids.split([8, 1, 3], dim=1):
            out = model(part, **options)
            options[CACHE] = cache_in(out)
            parts.append(out.logits)
    assert record.ops["flash_attention"] == 2 and record.ops["decode_attention"] == 4
    assert torch.nn.functional.cosine_similarity(torch.cat(parts, 1).float(), want, dim=-1).min() > 0.98
