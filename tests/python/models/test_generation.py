"""generate: the same tokens in every mode, with every cache, padding, dtype and attention; or a named refusal."""

import copy
import inspect
import re
import threading
from functools import cache, partial
from itertools import product

import pytest
import tiny_sigma
import torch
import transformers.cache_utils
from test_model_masks import other_model
from tiny_sigma import ATTENTIONS, CACHE, COMPRESSIONS, logits, tiny_config, tiny_model, tokens
from transformers import (
    DynamicCache,
    GenerationMixin,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.cache_utils import StaticLayer

import diffqkv
from diffqkv.data import byte_tokenizer
from diffqkv.models import attention as diffqkv_attention_module
from diffqkv.models.packed_linear import PackedLinear

NEW = 7
generate = partial(tiny_sigma.generate, max_new_tokens=NEW)
IS_OLDER = not hasattr(transformers.cache_utils.DynamicLayer, "is_croppable")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def one_attention_at_the_start(model):
    model.set_attn_implementation("diffqkv")


# ---------------------------------------------------------------- the grid


def prompts(padding, rows):
    """ids and mask `[rows, 12]`; their end repeats what came before, so that prompt lookup finds something."""
    ids = tokens(rows, 6, seed=6).repeat(1, 2)
    mask = torch.ones_like(ids)
    if padding == "left":
        for row in range(rows):
            mask[row, : 3 + 2 * row] = 0
    return ids * mask, mask


def by_candidates(model, input_ids, **kwargs):
    """A `custom_generate`: greedy, but runs the three best tokens as rows of their own, as contrastive search does."""
    kwargs = {name: kwargs[name] for name in ("attention_mask", "position_ids", CACHE)}
    past, mask, positions = kwargs[CACHE], kwargs["attention_mask"], kwargs["position_ids"]
    rows = len(input_ids)
    step = model(input_ids, attention_mask=mask, position_ids=positions, cache=past)
    for step_number in range(NEW):
        best = step.logits[:, -1].topk(3).indices
        input_ids = torch.cat([input_ids, best[:, :1]], 1)
        if step_number == NEW - 1:
            return input_ids
        mask = None if mask is None else torch.cat([mask, mask.new_ones(rows, 1)], 1)
        positions = positions[:, -1:] + 1
        past.batch_repeat_interleave(3)
        candidates = {
            "attention_mask": None if mask is None else mask.repeat_interleave(3, 0),
            "position_ids": positions.expand(rows, 1).repeat_interleave(3, 0),
        }
        step = model(best.reshape(-1, 1), cache=past, **candidates)
        step.logits = step.logits[::3]
        past.batch_select_indices(torch.arange(0, 3 * rows, 3))


def allowed_tokens(batch_id, ids):
    return list(range(1, 60)) if len(ids) % 2 else list(range(40, 97))


GREEDY_MODES = {
    "greedy": {},
    "chunked prefill": {"prefill_chunk_size": 5},
    "inputs_embeds": {},
    "custom_generate": {"custom_generate": by_candidates},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
    "early exit": {"assistant_early_exit": 1},
}
OTHER_MODES = {
    "sample": {"do_sample": True, "top_k": 30, "num_return_sequences": 2},
    "beam": {"num_beams": 3},
    "beam sample": {"num_beams": 2, "do_sample": True},
    "constrained": {"num_beams": 2, "prefix_allowed_tokens_fn": allowed_tokens},
}
FORMS = ["packed", "int8", "int4"]
ONE_ROW_MODES = ["prompt lookup", "assisted", "early exit"]
CACHES = ["default", "given", "fixed", "dynamic", "lazy", "static", "offloaded", "none"]

NO_CACHE = {mode: "requires `use_cache=True`|requires a cache" for mode in ONE_ROW_MODES} | {
    "chunked prefill": "prefill chunking without a cache",
    "custom_generate": CACHE,
}
NO_STATIC = {"custom_generate": "batch_repeat_interleave"}
if not getattr(StaticLayer, "is_croppable", False):  # before transformers 5.24
    NO_STATIC |= {mode: "not supported with Static cache" for mode in ONE_ROW_MODES}


def cache_options(kind, config, length):
    return {
        "default": lambda: {},
        "given": lambda: {CACHE: diffqkv.Cache(config)},
        "fixed": lambda: {CACHE: diffqkv.Cache(config, max_length=length)},
        "dynamic": lambda: {CACHE: DynamicCache(config=config)},
        "lazy": lambda: {CACHE: DynamicCache()},
        "static": lambda: {"cache_implementation": "static"},
        "offloaded": lambda: {"cache_implementation": "offloaded"},
        "none": lambda: {"use_cache": False},
    }[kind]()


@cache
def draft_model():
    return tiny_model(seed=1)


def run(model, mode, kind, padding):
    """The new tokens of one combination."""
    ids, mask = prompts(padding, 1 if mode in ONE_ROW_MODES else 2)
    length = ids.shape[1] + NEW - 1  # the last token is not fed
    if mode in ONE_ROW_MODES:
        length += 3  # candidates that are fed and taken back
    options = {**GREEDY_MODES, **OTHER_MODES}[mode] | cache_options(kind, model.config, length)
    if mode == "assisted":
        options["assistant_model"] = draft_model()
    torch.manual_seed(5)
    if mode == "inputs_embeds":
        embeds = model.get_input_embeddings()(ids)
        options |= {"inputs_embeds": embeds, "attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
        return model.generate(**options)
    return generate(model, ids, mask, **options)[:, ids.shape[1] :]


@cache
def in_form(form):
    """A model as it is, or one after `fuse_for_inference`, whose tokens lead clearly in each form."""
    return tiny_model() if form is None else tiny_model(seed=9).fuse_for_inference(form)


@cache
def reference(mode, padding, form=None):
    """What transformers alone gives: eager attention with a DynamicCache, in the plainest mode of the same tokens."""
    model = copy.deepcopy(in_form(form))
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            model.set_submodule(name, layer.dense())
    model.set_attn_implementation("eager")
    return run(model, "greedy" if mode in GREEDY_MODES else mode, "dynamic", padding)


@pytest.mark.parametrize(
    "attention, form", [*((attention, None) for attention in ATTENTIONS), *(("diffqkv", form) for form in FORMS)]
)
@pytest.mark.parametrize("mode", [*GREEDY_MODES, *OTHER_MODES])
@torch.no_grad()
def test_tokens_are_the_same_in_every_combination(library, mode, attention, form):
    model = in_form(form)
    model.set_attn_implementation(attention)
    for padding in ("none", "left"):
        want = reference(mode, padding, form)
        for kind in CACHES:
            refusal = {"none": NO_CACHE, "static": NO_STATIC}.get(kind, {}).get(mode)
            try:
                got = run(model, mode, kind, padding)
            except (ValueError, AttributeError, KeyError, RuntimeError) as error:
                assert refusal and re.search(refusal, str(error)), (kind, padding)
            else:
                assert torch.equal(got, want[: len(got)]), (kind, padding)
                # Older releases decode speculatively without a cache, or with a static one.
                assert not refusal or IS_OLDER, (kind, padding)


def test_the_reference_has_no_near_ties():
    """Else the grid could flip a token by rounding: the best logit leads by far more than float32 can err."""
    for form, padding in product((None, *FORMS), ("none", "left")):
        ids, mask = prompts(padding, 2)
        out = generate(in_form(form), ids, mask, return_dict_in_generate=True, output_logits=True)
        best = torch.stack(out.logits).topk(2).values
        assert (best[..., 0] - best[..., 1]).min() > 0.01, form
        assert len(reference("greedy", padding, form).unique()) > NEW
    assert not torch.equal(reference("beam", "left"), reference("greedy", "left"))
    assert not torch.equal(reference("sample", "left"), reference("greedy", "left"))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_tokens_in_half_precision_are_best_up_to_its_error(dtype, attention):
    """Ties flip in half precision: each token must be the best one behind the same tokens, or miss the best logit of
    float32, on the same rounded weights, by no more than eager attention errs."""
    model = tiny_model().to(dtype)
    exact = copy.deepcopy(model).float()
    exact.set_attn_implementation("eager")
    for padding in ("none", "left"):
        for mode in ("greedy", "chunked prefill", "prompt lookup", "assisted"):
            rows = 1 if mode in ONE_ROW_MODES else 2
            ids, mask = prompts(padding, rows)

            def all_logits(model, new, ids=ids, mask=mask):
                mask = torch.cat([mask, torch.ones_like(new)], 1)
                positions = (mask.cumsum(-1) - 1).clamp(min=0)
                options = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
                return model(torch.cat([ids, new], 1), **options).logits[:, ids.shape[1] - 1 : -1].float()

            model.set_attn_implementation("eager")
            new = reference("greedy", padding)[:rows]
            error = (all_logits(model, new) - all_logits(exact, new)).abs().max()
            assert error < 0.3, "of logits with a spread of several units"
            model.set_attn_implementation(attention)
            for kind in ("default", "dynamic", "static"):
                if kind == "static" and mode in NO_STATIC:
                    continue
                draft_model().to(dtype)
                new = run(model, mode, kind, padding)
                draft_model().float()
                behind = all_logits(exact, new)
                missed = behind.amax(-1) - behind.gather(-1, new[..., None])[..., 0]
                assert missed.max() <= 2 * error, (mode, kind, padding)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_cache_holds_a_half_size_k(compression):
    model = tiny_model((12, 4, 6), k_compression=compression)
    ids, mask = prompts("left", 2)
    want = generate(model, ids, mask, use_cache=False)
    for kind in CACHES[:-1]:
        got = generate(model, ids, mask, **cache_options(kind, model.config, 19))
        assert torch.equal(got, want), kind


# ---------------------------------------------------------------- modes outside of the grid


def test_modes_that_transformers_moved_out_say_where_they_are(model):
    """Group beam, constrained, contrastive and DoLa decoding are repositories that `custom_generate` loads."""
    for options in (
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 2, "force_words_ids": [[5]]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
    ):
        with pytest.raises(ValueError, match="requires `trust_remote_code=True`"):
            generate(model, tokens(1, 5), **options)


CUSTOM_GENERATE = f"""
from transformers import DynamicCache, GenerationMixin


def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    if generation_config.penalty_alpha is not None:
        assert isinstance(kwargs[{CACHE!r}], DynamicCache), "what contrastive search asks for"
    options = {{name: kwargs[name] for name in ({CACHE!r}, "attention_mask")}} | {{"do_sample": False}}
    return GenerationMixin.generate(model, input_ids, max_length=generation_config.max_length, **options)


def generate(model, *args, **kwargs):
    return GenerationMixin.generate(model, *args, custom_generate=decode, **kwargs)
"""


@pytest.mark.parametrize("options", [{}, {"penalty_alpha": 0.6, "top_k": 4}])
def test_decoding_methods_from_a_repository(model, options, tmp_path):
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(CUSTOM_GENERATE)
    ids, mask = prompts("left", 2)
    options |= {"custom_generate": str(tmp_path), "trust_remote_code": True}
    assert torch.equal(generate(model, ids, mask, **options), generate(model, ids, mask))


def test_text_streamers():
    tokenizer = byte_tokenizer(64)
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    inputs = tokenizer("a prompt", return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    # Bytes that are no text yet are decoded otherwise behind more of them.
    letters = tokenizer("some words and letters").input_ids
    options["prefix_allowed_tokens_fn"] = lambda batch_id, ids: letters
    want = tokenizer.decode(model.generate(**inputs, **options)[0, inputs.input_ids.shape[1] :])

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **options, "streamer": streamer})
    thread.start()
    parts = list(streamer)
    thread.join()
    assert "".join(parts) == want and len(parts) > 1


def test_a_printing_streamer_with_assisted_decoding(capsys):
    tokenizer = byte_tokenizer(64)
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    inputs = tokenizer("again and again and", return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    want = tokenizer.decode(model.generate(**inputs, **options)[0, inputs.input_ids.shape[1] :])
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    model.generate(**inputs, **options, streamer=streamer, prompt_lookup_num_tokens=3)
    assert capsys.readouterr().out.rstrip("\n") == want.rstrip("\n")


@pytest.mark.parametrize("kind", ["default", "dynamic", "static"])
def test_attentions_and_scores_of_generate(model, kind):
    ids, mask = prompts("left", 2)
    ask = ("output_attentions", "output_hidden_states", "output_logits", "return_dict_in_generate")
    results = []
    for attention in ("eager", "diffqkv"):
        model.set_attn_implementation(attention)
        out = generate(model, ids, mask, **dict.fromkeys(ask, True), **cache_options(kind, model.config, 19))
        assert len(out.attentions) == NEW and out.attentions[0][0].shape[:3] == (2, 8, 12)
        valid = [layer[1, :, -1:, 5:12] for step in out.attentions for layer in step]
        results.append((torch.stack(out.logits), valid, [step[-1][1, -1] for step in out.hidden_states]))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_a_dense_mask_takes_stock_attention_and_says_so_once(model, monkeypatch):
    warned = []
    monkeypatch.setattr(diffqkv_attention_module.logger, "warning_once", warned.append)
    ids, past = tokens(1, 6), diffqkv.Cache(model.config)
    dense = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    dense[..., 4, 1] = False
    logits(model, ids[:, :4], attention_mask=dense[:, :, :4, :4], cache=past)
    got = logits(model, ids[:, 4:], attention_mask=dense[:, :, 4:], cache=past)
    assert len(set(warned)) == 1 and "stock attention" in warned[0]
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(got, logits(model, ids, attention_mask=dense)[:, 4:], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- prefixes


def prefix_cache(model, ids, kind):
    past = {
        "diffqkv": lambda: diffqkv.Cache(model.config),
        "fixed": lambda: diffqkv.Cache(model.config, max_length=40),
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=40),
    }[kind]()
    logits(model, ids, cache=past)
    return past


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", ["diffqkv", "fixed", "dynamic", "static"])
def test_a_saved_prefix_serves_many_prompts(model, kind, attention):
    """A copy goes on exactly as the original would, which stays as it was."""
    model.set_attn_implementation(attention)
    system, prefix = tokens(1, 9), None
    for seed in (1, 2, 3):
        ids = torch.cat([system, tokens(1, 4 + seed, seed)], 1)
        want = generate(model, ids)
        prefix = prefix_cache(model, system, kind) if prefix is None else prefix
        for _ in range(2):
            assert torch.equal(generate(model, ids, cache=copy.deepcopy(prefix)), want)
    fresh = prefix_cache(model, system, kind)
    ids = tokens(1, 3, 8)
    step, positions = copy.deepcopy(prefix), torch.arange(9, 12)[None]
    assert torch.equal(
        logits(model, ids, cache=step, position_ids=positions),
        logits(model, ids, cache=fresh, position_ids=positions),
    )
    assert int(prefix.get_seq_length()) == 9


@pytest.mark.parametrize("kind", ["diffqkv", "dynamic"])
def test_a_prefix_serves_a_batch_and_several_samples(model, kind):
    system, ends = tokens(1, 9), tokens(3, 5, 1)
    ids = torch.cat([system.expand(3, -1), ends], 1)
    past = prefix_cache(model, system, kind)
    with pytest.raises(ValueError, match="cache: got"):
        generate(model, ids, cache=past)
    past.batch_repeat_interleave(3)
    assert torch.equal(generate(model, ids, cache=copy.deepcopy(past)), generate(model, ids))
    # Ends of several lengths leave a gap behind the prefix, which is no span: stock attention computes it.
    mask = torch.ones_like(ids)
    mask[1, 9:12] = 0
    want = generate(model, ids, mask)
    assert torch.equal(generate(model, ids, mask, cache=copy.deepcopy(past)), want)
    alone = torch.cat([ids[1:2, :9], ids[1:2, 12:]], 1)
    assert torch.equal(want[1:, 14:][:1], generate(model, alone)[:, 11:])
    want = generate(model, ids[:1], num_beams=3)
    assert torch.equal(generate(model, ids[:1], num_beams=3, cache=past), want)


@pytest.mark.parametrize("kind", ["diffqkv", "dynamic"])
@pytest.mark.parametrize("mode", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": 1}, {"assistant_early_exit": 1}])
@pytest.mark.parametrize("cached", [5, 11])
def test_assisted_decoding_behind_a_prefix(model, mode, kind, cached):
    """Transformers feeds a prompt whole in its first round, also to a cache that holds its beginning: wrong tokens."""
    ids, _ = prompts("none", 1)
    want = generate(model, ids)
    mode = {"assistant_model": draft_model()} if "assistant_model" in mode else mode
    got = generate(model, ids, cache=prefix_cache(model, ids[:, :cached], kind), **mode)
    assert torch.equal(got, want)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_assisted_decoding_generates_a_pad_token(compression):
    """Transformers guesses the draft model's mask: from its second round on a generated token would be a hole in it."""
    model, draft = (tiny_model(seed=seed, k_compression=compression) for seed in (0, 1))
    ids = tokens(1, 6)
    want = generate(model, ids, max_new_tokens=12)
    for x in (model, draft):
        x.generation_config.pad_token_id = int(want[0, 8])
    assert torch.equal(generate(model, ids, max_new_tokens=12, assistant_model=draft), want)


@pytest.mark.parametrize("mode", [{}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}])
@pytest.mark.parametrize("kind", ["diffqkv", "dynamic"])
def test_a_prompt_that_is_all_cached_is_refused(model, kind, mode):
    """No token is left to feed, and transformers would feed the whole prompt again: wrong tokens."""
    ids, _ = prompts("none", 1)
    past = prefix_cache(model, ids, kind)
    with pytest.raises(ValueError, match="cache: got 12 tokens and a prompt of 12"):
        generate(model, ids, cache=past, **mode)
    past.crop(-1)
    assert torch.equal(generate(model, ids, cache=past), generate(model, ids))


@pytest.mark.parametrize("kind", ["diffqkv", "dynamic"])
def test_a_conversation_goes_on_in_one_cache(model, kind):
    """Turn by turn, with a turn taken back by crop."""
    past = diffqkv.Cache(model.config) if kind == "diffqkv" else DynamicCache(config=model.config)
    ids = tokens(1, 6)
    for turn in range(3):
        want = generate(model, ids)
        assert torch.equal(generate(model, ids, cache=past), want)
        if turn == 1:
            past.crop(ids.shape[1] - 1 - past.get_seq_length())
            want = generate(model, ids, cache=past)
        ids = torch.cat([want, tokens(1, 3, turn)], 1)


def test_only_the_new_tokens_with_a_mask_of_all(model):
    ids = tokens(2, 11)
    want = generate(model, ids)
    past = prefix_cache(model, ids[:, :7], "diffqkv")
    got = generate(model, ids[:, 7:], torch.ones(2, 11, dtype=torch.long), cache=past)
    assert torch.equal(got[:, 4:], want[:, 11:])


def test_embeddings_behind_a_prefix(model):
    """Transformers feeds those behind the cached ones, and of an end alone, too few."""
    ids = tokens(2, 11)
    past, embeds = prefix_cache(model, ids[:, :5], "diffqkv"), model.get_input_embeddings()(ids)
    want, options = generate(model, ids), {"max_new_tokens": NEW, "do_sample": False}
    options["attention_mask"] = torch.ones_like(ids)
    with pytest.raises(
        ValueError, match="inputs_embeds: got 6 tokens behind 5 in the cache, want all 11 of the prompt"
    ):
        model.generate(inputs_embeds=embeds[:, 5:], cache=past, **options)
    got = model.generate(inputs_embeds=embeds, cache=copy.deepcopy(past), **options)
    assert torch.equal(got, want[:, 11:])
    got = model.generate(ids, inputs_embeds=embeds, cache=past, **options)
    assert torch.equal(got[:, -NEW:], want[:, 11:])


def test_prefill_chunks_of_embeddings_are_refused(model):
    """Transformers splits input_ids, of which there are none, and fails on an index."""
    embeds = model.get_input_embeddings()(tokens(1, 6))
    with pytest.raises(NotImplementedError, match="prefill_chunk_size: got 4 with inputs_embeds"):
        model.generate(inputs_embeds=embeds, prefill_chunk_size=4, max_new_tokens=2)


def to_static(past, config):
    static = StaticCache(config=config, max_cache_len=40)
    for layer, (keys, values, _) in enumerate(past):
        static.update(keys, values, layer)
    return static


CONVERSIONS = {
    "to_dynamic": lambda past, config: past.to_dynamic(),
    "to_static": to_static,
    "ddp_cache_data": lambda past, config: DynamicCache(list(past), config=config),
    "from_dynamic": lambda past, config: diffqkv.Cache.from_stock(config, past.to_dynamic()),
    "from_static": lambda past, config: diffqkv.Cache.from_stock(config, to_static(past, config), max_length=40),
    "from_pairs": lambda past, config: diffqkv.Cache.from_stock(config, [(k, v) for k, v, _ in past]),
}


@pytest.mark.parametrize("name", CONVERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefix_moves_from_one_cache_to_another(name, dtype):
    model = tiny_model((12, 4, 6)).to(dtype)
    ids = tokens(2, 11)
    past = prefix_cache(model, ids[:, :7], "diffqkv")
    moved = CONVERSIONS[name](past, model.config)
    steps = [logits(model, ids[:, 7:], cache=x) for x in (moved, copy.deepcopy(past))]
    torch.testing.assert_close(*steps, **({} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}))
    if dtype == torch.float32:
        got = generate(model, ids, cache=CONVERSIONS[name](past, model.config))
        assert torch.equal(got, generate(model, ids))
    assert past.get_seq_length() == 7


# ---------------------------------------------------------------- accelerate


def test_layers_on_disk(tmp_path):
    """device_map by accelerate: what does not fit max_memory is read from disk, layer by layer, at every step."""
    pytest.importorskip("accelerate")
    model = tiny_model()
    ids, mask = prompts("left", 2)
    want = generate(model, ids, mask)
    model.save_pretrained(tmp_path / "model")
    by_hand = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    by_hand |= dict.fromkeys(("model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for options in ({"device_map": "auto", "max_memory": {"cpu": "400KB"}}, {"device_map": by_hand}):
        options["offload_folder"] = tmp_path / "disk"
        loaded = diffqkv.SigmaForCausalLM.from_pretrained(tmp_path / "model", **options)
        assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
        for kind in ("default", "dynamic", "static", "offloaded"):
            assert torch.equal(generate(loaded, ids, mask, **cache_options(kind, model.config, 19)), want), kind
        got = generate(loaded, ids, mask, cache_implementation="static", prefill_chunk_size=5)
        assert torch.equal(got, want)


# ---------------------------------------------------------------- names of transformers that we rely on


def test_importing_us_replaces_no_layer_of_other_models():
    """A cache layer with a `_layer_type` takes the place of that type in every model of the process."""
    config = other_model("mistral").config
    stock = {
        "DynamicSlidingWindowLayer": DynamicCache(config=config),
        "DynamicLayer": DynamicCache(config=tiny_config()),
    }
    stock["StaticLayer"] = StaticCache(config=tiny_config(), max_cache_len=8)
    for name, past in stock.items():
        assert {type(layer) for layer in past.layers} == {getattr(transformers.cache_utils, name)}
    assert all(getattr(layer, "_layer_type", None) is None for layer in diffqkv.Cache(tiny_config()).layers)


def test_generate_still_asks_the_methods_that_we_override():
    source = inspect.getsource(GenerationMixin)
    for name in ("self._prepare_cache_for_generation(", "self.prepare_inputs_for_generation("):
        assert name in source
    assert "StaticCache(" in inspect.getsource(GenerationMixin._prepare_static_cache)
    assert {"next_sequence_length", CACHE} <= set(
        inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    )
    assert "self.init_continuous_batching(" in inspect.getsource(GenerationMixin.continuous_batching_context_manager)
