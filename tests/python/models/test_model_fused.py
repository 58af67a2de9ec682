"""`fuse_for_inference`: one product for gate, up, K and V gives what five projections give, and only for inference."""

import copy
import weakref

import peft
import pytest
import torch
from tiny_sigma import ATTENTIONS, COMPRESSIONS, HEADS, logits, padded, tiny_model, tokens
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, StaticCache

import diffqkv

MODELS = [{}, {"q_aug_dim": None}, {"attention_bias": True}, {"q_aug_dim": None, "attention_bias": True}]


def fused_and_not(heads=(8, 2, 4), **changes):
    model = tiny_model(heads, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                parameter.normal_(0, 0.3)
    return copy.deepcopy(model).fuse_for_inference(), model


@pytest.mark.parametrize("changes", MODELS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("heads", HEADS)
def test_logits_are_those_of_the_model(heads, compression, changes):
    fused, model = fused_and_not(heads, k_compression=compression, **changes)
    ids, mask = padded([13, 8], "left")
    for attention in ATTENTIONS:
        for x in (fused, model):
            x.set_attn_implementation(attention)
        got, want = (logits(x, ids, attention_mask=mask)[mask.bool()] for x in (fused, model))
        torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_single_as_without(dtype):
    model = tiny_model((12, 4, 6))
    ids = tokens(4, 24)
    want = logits(model, ids).softmax(-1)
    plain = copy.deepcopy(model).to(dtype)
    fused = copy.deepcopy(plain).fuse_for_inference()
    assert fused.model.layers[0].self_attn.fused_proj.weight.dtype == dtype
    errors = [(logits(x, ids).float().softmax(-1) - want).abs().mean() for x in (fused, plain)]
    assert 0 < errors[0] < 1.5 * errors[1]


def test_decoding(tmp_path):
    fused, model = fused_and_not((12, 4, 6))
    ids, mask = padded([11, 7], "left")
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    want = model.generate(ids, **options)
    for attention in ATTENTIONS:
        fused.set_attn_implementation(attention)
        for cache in ({}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}, {"num_beams": 1}):
            assert torch.equal(fused.generate(ids, **options, **cache), want)
    fused.set_attn_implementation("diffqkv")
    beams = {"num_beams": 3, **options}
    assert torch.equal(fused.generate(ids, **beams), model.generate(ids, **beams))
    lookup = {"max_new_tokens": 12, "do_sample": False, "prompt_lookup_num_tokens": 3}
    assert torch.equal(fused.generate(ids[:1], **lookup), model.generate(ids[:1], **lookup))


def test_a_cache_may_change_hands():
    fused, model = fused_and_not()
    ids = tokens(2, 12)
    cache = diffqkv.Cache(model.config)
    got = [logits(x, part, cache=cache) for x, part in zip((model, fused), ids.split([9, 3], 1), strict=True)]
    torch.testing.assert_close(torch.cat(got, 1), logits(model, ids), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("attention", ["diffqkv", "sdpa"])
def test_static_cache_and_fullgraph_compilation(attention):
    fused, model = fused_and_not()
    for x in (fused, model):
        x.set_attn_implementation(attention)
    ids = tokens(1, 9)
    want = logits(model, ids)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(fused, backend=counter, fullgraph=True)
    cache = StaticCache(config=fused.config, max_cache_len=16)
    logits(fused, ids[:, :6], cache=cache)
    for i in range(6, 9):
        step = logits(compiled, ids[:, i : i + 1], cache=cache, position_ids=torch.tensor([[i]]))
        torch.testing.assert_close(step, want[:, i : i + 1], atol=2e-4, rtol=2e-4)
    assert counter.frame_count > 0
    torch.compiler.reset()


def test_selective_v():
    ids = tokens(2, 10)
    steps = []
    for model in fused_and_not(selective_v_top_k=3):
        cache = diffqkv.Cache(model.config)
        steps.append([logits(model, part, cache=cache) for part in ids.split([8, 2], 1)][1])
    torch.testing.assert_close(*steps, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("changes, names", [({}, 5), ({"q_aug_dim": None}, 3)])
def test_one_product_and_no_weight_left_over(changes, names):
    model = tiny_model(**changes)
    attention = model.model.layers[1].self_attn
    old = [f"{name}_proj" for name in ("q", "k", "v", "q_gate", "q_up")[:names]]
    gone = [weakref.ref(getattr(attention, name).weight) for name in old]
    config = model.config
    rows = sum(getattr(attention, name).out_features for name in old)
    rows -= attention.q_proj.out_features if names == 5 else 0
    assert model.fuse_for_inference() is model and model.is_fused and not model.training
    assert all(ref() is None for ref in gone) and not any(hasattr(attention, name) for name in old)
    assert attention.fused_proj.weight.shape == (rows, config.hidden_size)
    weight = attention.fused_proj.weight
    assert model.fuse_for_inference() is model and attention.fused_proj.weight is weight
    assert not any(parameter.requires_grad for parameter in model.parameters())
    products = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: products.append(type(module)))
    logits(model, tokens(1, 3))
    hook.remove()
    assert products.count(torch.nn.Linear) == 2 * (6 if names == 5 else 5) + 1


def test_heads_fuse_too():
    model = tiny_model(model_class=diffqkv.SigmaForSequenceClassification, num_labels=3)
    ids = tokens(2, 7)
    want = logits(model, ids)
    torch.testing.assert_close(logits(model.fuse_for_inference(), ids), want, atol=2e-4, rtol=2e-4)


def test_training_is_refused():
    with pytest.raises(ValueError, match="fuse_for_inference: got a model in training mode, want eval"):
        tiny_model().train().fuse_for_inference()
    model = tiny_model().fuse_for_inference()
    ids = tokens(1, 5)
    for module in (model, model.model):
        with pytest.raises(RuntimeError, match="train: got a model after fuse_for_inference"):
            module.train()
    assert not model.training and not any(module.training for module in model.modules())
    want = model(ids).logits  # in grad mode, where nothing records
    assert not want.requires_grad
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    with pytest.raises(RuntimeError, match="fuse_for_inference: got a forward pass that records gradients"):
        model(inputs_embeds=embeds)
    assert torch.equal(logits(model, None, inputs_embeds=embeds), want)
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="fuse_for_inference: got a forward pass that records gradients"):
        model(ids)
    assert torch.equal(logits(model, ids), want)


def test_saving_is_refused_and_loading_again_undoes_it(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    want = copy.deepcopy(model.state_dict())
    model.fuse_for_inference()
    with pytest.raises(RuntimeError, match="save_pretrained: got a model after fuse_for_inference.*from_pretrained"):
        model.save_pretrained(tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not again.is_fused
    assert again.state_dict().keys() == want.keys()
    assert all(torch.equal(again.state_dict()[name], value) for name, value in want.items())


def test_offloaded_weights_are_refused(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    ids = tokens(2, 7)
    want = model.generate(ids, max_new_tokens=4, do_sample=False)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(whole.fuse_for_inference().generate(ids, max_new_tokens=4, do_sample=False), want)
    places = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys(places, "cpu") | {"model.layers.1": "disk"}
    partly = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "disk")
    with pytest.raises(ValueError, match="q_proj: got a weight of type Tensor, torch.float32, on meta, want a whole"):
        partly.fuse_for_inference()
    assert torch.equal(partly.generate(ids, max_new_tokens=4, do_sample=False), want)


def test_other_projections_are_refused_before_any_is_folded():
    lora = peft.get_peft_model(
        tiny_model(), peft.LoraConfig(r=2, target_modules=r".*layers\.1\..*k_proj", task_type="CAUSAL_LM")
    )
    model = lora.get_base_model().eval()
    with pytest.raises(ValueError, match=r"k_proj: got a peft\..*Linear, want a torch.nn.Linear to fuse"):
        model.fuse_for_inference()
    assert not model.is_fused and hasattr(model.model.layers[0].self_attn, "q_proj")

    integers = tiny_model()
    integers.model.layers[0].self_attn.q_up_proj.weight = torch.nn.Parameter(
        torch.ones(96, 128, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match="q_up_proj: got a weight of type Tensor, torch.int8"):
        integers.fuse_for_inference()
    assert not integers.is_fused
