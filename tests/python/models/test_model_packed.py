"""`fuse_for_inference(weights=...)`: products of packed weights, and steps that leave out a layer's modules."""

import copy

import peft
import pytest
import torch
from tiny_sigma import COMPRESSIONS, HEADS, Recorder, generate, logits, padded, tiny_model, tokens
from torch import nn
from torch.autograd import forward_ad
from transformers import AutoModelForSequenceClassification, DynamicCache

import diffqkv
from diffqkv import quantization
from diffqkv.models import decode_step
from diffqkv.models.packed_linear import PackedEmbedding, PackedLinear

pytestmark = pytest.mark.usefixtures("library")
FORMS = ["packed", "int8", "int4"]
NEAR = {"atol": 2e-4, "rtol": 2e-4}
# x is rounded to integers of 16 bits, too.
TOLERANCES = {"packed": NEAR, "int8": {"atol": 3e-3, "rtol": 1e-3}, "int4": {"atol": 3e-3, "rtol": 1e-3}}


def dense(model):
    """The model with torch's own linear layers, of the weights that the packed ones stand for."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            model.set_submodule(name, layer.dense())
    return model


@pytest.fixture
def steps(monkeypatch):
    """Counts the calls of decode_step."""
    calls = []
    step = decode_step.decode_step
    monkeypatch.setattr(decode_step, "decode_step", lambda *args: calls.append(1) or step(*args))
    return calls


@pytest.mark.parametrize("changes", [{}, {"q_aug_dim": None}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("heads", HEADS)
def test_logits_are_those_of_the_weights(heads, compression, form, changes):
    model = tiny_model(heads, k_compression=compression, **changes).fuse_for_inference(form)
    ids, mask = padded([13, 8], "left")
    want = logits(dense(model), ids, attention_mask=mask)[mask.bool()]
    torch.testing.assert_close(logits(model, ids, attention_mask=mask)[mask.bool()], want, **TOLERANCES[form])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms_in_every_dtype(form, tied, dtype):
    plain = tiny_model((12, 4, 6), tie_word_embeddings=tied)
    ids = tokens(3, 20)
    exact = logits(plain, ids).softmax(-1)
    model = copy.deepcopy(plain).to(dtype).fuse_for_inference(form)
    assert model.packed_weights == form and model.is_fused and model.dtype == dtype
    head, embedding = model.lm_head, model.get_input_embeddings()
    assert isinstance(head, PackedLinear) and isinstance(embedding, PackedEmbedding) == tied
    if tied:
        assert embedding.weight is head.weight and embedding.scales is head.scales
        table = head.dense().weight
        assert table.dtype == (dtype if form == "packed" else torch.float32)
        assert torch.equal(embedding(ids), table.to(dtype)[ids])
    got = logits(model, ids)
    assert got.dtype == dtype
    error = (got.float().softmax(-1) - exact).abs().mean()
    own = (logits(copy.deepcopy(plain).to(dtype), ids).float().softmax(-1) - exact).abs().mean()
    # Rounded weights change the probabilities, most of all those of 4 bits.
    most = {"packed": 2 * own + 1e-6, "int8": 2 * own + 1e-3, "int4": 8e-3}[form]
    assert error <= most, (error, most)


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_held_once_and_all_packed(form):
    plain = tiny_model(hidden_size=256, intermediate_size=512, vocab_size=512).to(torch.bfloat16)
    model = copy.deepcopy(plain).fuse_for_inference(form)
    assert not [name for name, x in model.named_modules() if isinstance(x, nn.Linear)]
    sizes = [(x.in_features, x.out_features) for x in model.modules() if isinstance(x, PackedLinear)]
    bits = {"packed": 16, "int8": 8.5, "int4": 4.5}[form]
    least = sum(k * n for k, n in sizes) * bits / 8
    others = sum(x.numel() * 2 for name, x in plain.named_parameters() if "norm" in name or "embed" in name)
    held = sum(x.nbytes for x in model.parameters())
    assert least + others <= held <= 1.03 * least + others
    assert not any(x.requires_grad for x in model.parameters())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", HEADS)
def test_a_step_gives_what_the_layers_give(heads, form, steps, monkeypatch):
    model = tiny_model(heads, num_hidden_layers=3).fuse_for_inference(form)
    for rows, side in ((1, "right"), (2, "left")):
        ids, mask = padded([9, 6][:rows], side)
        got = generate(model, ids, mask, max_new_tokens=12, output_logits=True, return_dict_in_generate=True)
        assert len(steps) == 11
        with monkeypatch.context() as patch:
            patch.setattr(decode_step, "can_step", lambda *args: False)
            want = generate(model, ids, mask, max_new_tokens=12, output_logits=True, return_dict_in_generate=True)
        assert len(steps) == 11
        steps.clear()
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-5, rtol=1e-5)


def test_steps_of_several_tokens_write_the_cache(steps):
    """Tokens that are fed one by one, some at once, or all at once leave the same cache and logits."""
    model = tiny_model().fuse_for_inference("packed")
    ids = tokens(2, 40)
    whole = diffqkv.Cache(model.config)
    want = logits(model, ids, cache=whole)
    for sizes in ([20, *[1] * 20], [3, 16, 16, 5], [1, 17, 22]):
        cache, got = diffqkv.Cache(model.config, max_length=48 if sizes[0] == 3 else None), []
        for part in ids.split(sizes, 1):
            got.append(logits(model, part, cache=cache))
        assert len(steps) == sum(size <= 16 for size in sizes[1:])
        steps.clear()
        torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=1e-5)
        for (k, v), (want_k, want_v) in zip(cache.to_dense(), whole.to_dense(), strict=True):
            torch.testing.assert_close(k, want_k, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(v, want_v, atol=1e-5, rtol=1e-5)


def test_a_step_keeps_the_statistics_of_v(steps):
    """A selection of V that begins after plain steps reads statistics that count them."""
    model = tiny_model().fuse_for_inference("packed")
    cache = diffqkv.Cache(model.config)
    ids = tokens(1, 24)
    logits(model, ids[:, :16], cache=cache)
    cache.layers[0].v_stats()
    for token in ids[0, 16:]:
        logits(model, token.view(1, 1), cache=cache)
    assert len(steps) == 8
    stats = [layer.v_stats() for layer in cache.layers]
    for got, (_, v) in zip(stats, cache.to_dense(), strict=True):
        want = torch.cat([v.sum(2), v.norm(dim=-1).amax(2, keepdim=True)], -1)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_what_a_step_cannot_do_goes_through_the_layers(steps):
    model = tiny_model().fuse_for_inference("packed")
    ids = tokens(1, 6)

    def step(model=model, cache=None, **options):
        steps.clear()
        cache = diffqkv.Cache(model.config) if cache is None else cache
        logits(model, ids, cache=cache)
        out = model(ids[:, :1], cache=cache, **options)
        return len(steps), out

    with torch.no_grad():
        assert step()[0] == 1
        assert step(cache=DynamicCache(config=model.config))[0] == 0
        assert step(selective_v={"top_k": 2})[0] == 0
        count, out = step(output_attentions=True)
        assert count == 0 and out.attentions[0].shape[-1] == 7
        count, out = step(output_hidden_states=True)
        assert count == 0 and len(out.hidden_states) == 3
        with torch.autocast("cpu", torch.bfloat16):
            assert step()[0] == 0
        seen = []
        handle = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *args: seen.append(1))
        assert step()[0] == 0 and len(seen) == 2
        handle.remove()
        assert step()[0] == 1
        handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
        assert step()[0] == 0
        handle.remove()
        with forward_ad.dual_level():
            assert step()[0] == 0
        mixed = tiny_model().to(torch.bfloat16).fuse_for_inference("packed")
        assert step(mixed)[0] == 1
        mixed.model.layers[1].input_layernorm.float()
        assert step(mixed)[0] == 0  # that norm's result is float32
        holes = torch.tensor([[1, 1, 0, 1, 1, 1, 1]])
        assert step(attention_mask=holes)[0] == 0
        for changes in ({"k_compression": "expand"}, {"k_compression": "absorbed"}, {"hidden_act": "gelu"}):
            assert step(tiny_model(**changes).fuse_for_inference("packed"))[0] == 0
        assert step(tiny_model().fuse_for_inference())[0] == 0
        assert step(tiny_model())[0] == 0
        model.set_attn_implementation("sdpa")
        assert step()[0] == 0


def test_ops_of_a_step():
    model = tiny_model().fuse_for_inference("int4")
    cache, ids = diffqkv.Cache(model.config), tokens(1, 6)
    logits(model, ids, cache=cache)
    with Recorder(7) as record:
        logits(model, ids[:, :1], cache=cache)
    layers = model.config.num_hidden_layers
    each = {"packed_linear": 6, "swiglu": 2, "rms_norm": 2, "rotary_embedding": 1}
    each |= {"kv_cache_update": 1, "decode_attention": 1}
    want = {op: n * layers for op, n in each.items()}
    want["packed_linear"] += 1  # the head
    want["rms_norm"] += 1
    assert record.ops == want


def test_a_full_cache_is_refused_before_a_step_writes(steps):
    model = tiny_model().fuse_for_inference("packed")
    cache, ids = diffqkv.Cache(model.config, max_length=6), tokens(1, 6)
    logits(model, ids, cache=cache)
    with pytest.raises(ValueError, match="cache: got 1 new tokens behind 6, want at most max_length = 6"):
        logits(model, ids[:, :1], cache=cache)
    assert cache.get_seq_length() == 6 and not steps


# ---------------------------------------------------------------- refusals


def test_wrong_forms_change_nothing():
    model = tiny_model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for options, text in (
        ({"weights": "int2"}, "weights: got 'int2', want None or one of 'packed', 'int8', 'int4'"),
        ({"weights": "int4", "group_size": 48}, "group_size: got 48, want a multiple of 32 up to 256"),
        ({"weights": "int4", "group_size": 128}, "got 64 input features, want a multiple of 128"),
    ):
        with pytest.raises(ValueError, match=text):
            model.fuse_for_inference(**options)
    assert not model.is_fused and model.packed_weights is None
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    with pytest.raises(ValueError, match="model in training mode"):
        model.train().fuse_for_inference("packed")


def test_layers_of_other_kinds_are_refused_by_name():
    lora = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["down_proj"])).eval()
    model = lora.base_model.model
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj: got a peft\S*Linear, want a torch"):
        model.fuse_for_inference("int8")
    assert not model.is_fused
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: got a weight of type Tensor.* on meta"):
        model.fuse_for_inference("packed")
    assert not model.is_fused and logits(tiny_model(), tokens(1, 3)).isfinite().all()
    with pytest.raises(ValueError, match=r"got a weight of type Tensor, torch\.float64"):
        tiny_model().double().fuse_for_inference("packed")
    odd = tiny_model(intermediate_size=97)
    with pytest.raises(ValueError, match=r"mlp\.down_proj: got 97 input features, want an even number for bfloat16"):
        odd.to(torch.bfloat16).fuse_for_inference("packed")
    model = tiny_model()
    model.lm_head.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match="lm_head: got weights that are not finite"):
        model.fuse_for_inference("int4")
    assert not model.is_fused


def test_no_library_no_packed_weights(monkeypatch):
    monkeypatch.setattr(diffqkv.ops.library, "loaded", False)
    with pytest.raises(ValueError, match="weights: got 'packed', want None: the compiled library of diffqkv"):
        tiny_model().fuse_for_inference("packed")


def test_forms_do_not_follow_each_other():
    model = tiny_model()
    assert model.fuse_for_inference() is model and model.packed_weights is None
    assert model.fuse_for_inference("int8").packed_weights == "int8"  # what was folded is packed now
    head = model.lm_head
    assert model.fuse_for_inference() is model and model.fuse_for_inference("int8").lm_head is head
    with pytest.raises(ValueError, match="weights: got 'int4', want 'int8', which the model has already"):
        model.fuse_for_inference("int4")


def test_only_for_inference():
    model = tiny_model().fuse_for_inference("packed")
    with pytest.raises(RuntimeError, match="train: got a model after fuse_for_inference"):
        model.train()
    embeds = torch.randn(1, 3, model.config.hidden_size, requires_grad=True)
    with pytest.raises((RuntimeError, ValueError), match="records gradients|requires a gradient"):
        model(inputs_embeds=embeds)
    with pytest.raises(RuntimeError, match="resize_token_embeddings: got a model after fuse_for_inference"):
        model.resize_token_embeddings(120)


# ---------------------------------------------------------------- the layer alone


@pytest.mark.parametrize("form", FORMS)
def test_dtypes_of_a_packed_layer_can_change(form):
    linear = nn.Linear(64, 40)
    layer = PackedLinear.of(linear.weight, linear.bias, form)
    x = torch.randn(3, 64)
    want = layer.dense()(x)
    torch.testing.assert_close(layer(x), want, **NEAR)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer = layer.to(dtype)
        got = layer(x.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, atol=3e-2, rtol=3e-2)
    again = copy.deepcopy(layer)
    assert torch.equal(again(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_classification_heads():
    model = tiny_model(model_class=diffqkv.SigmaForSequenceClassification, num_labels=3)
    ids = tokens(2, 9)
    want = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(model.fuse_for_inference("packed")(ids).logits, want, **NEAR)
    assert AutoModelForSequenceClassification.from_config(model.config) is not None


def test_quantised_weights_are_those_of_quantize():
    model = tiny_model().fuse_for_inference("int4")
    layer, plain = model.model.layers[0].mlp.down_proj, tiny_model().model.layers[0].mlp.down_proj
    integers, scales = quantization.quantize(plain.weight, 4)
    assert torch.equal(quantization.unpack(layer.weight, layer.out_features), integers)
    assert torch.equal(quantization.unpack_groups(layer.scales, layer.out_features), scales)
