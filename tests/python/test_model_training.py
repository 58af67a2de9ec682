"""Training: SigmaForCausalLM through the ops, alone and under Trainer, FSDP2, PEFT, autocast and torch.compile."""

import pytest
import torch
from tiny_sigma import COMPRESSIONS, logits, padded, tiny_model, tokens

import diffqkv


def loss_and_gradients(model, ids, **options):
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(got, want):
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-5)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got[1][name], gradient, atol=2e-5, rtol=2e-3, msg=name)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_gradients_do_not_depend_on_attention(compression):
    model = tiny_model((12, 4, 6), k_compression=compression, initializer_range=0.1).train()
    ids, mask = padded([9, 6], "right")
    model.set_attn_implementation("eager")
    want = loss_and_gradients(model, ids, attention_mask=mask)
    for attention in ("diffqkv", "sdpa"):
        model.set_attn_implementation(attention)
        assert_same_gradients(loss_and_gradients(model, ids, attention_mask=mask), want)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model = tiny_model(initializer_range=0.1).train()
    ids = tokens(2, 9)
    want = loss_and_gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_gradients(loss_and_gradients(model, ids), want)
    assert model(ids, labels=ids).past_key_values is None


def test_training_with_the_default_cache_gives_the_same_gradients():
    model = tiny_model(initializer_range=0.1).train()
    ids = tokens(2, 9)
    want = loss_and_gradients(model, ids)
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    assert_same_gradients((out.loss.detach(), {n: p.grad for n, p in model.named_parameters()}), want)
    assert out.past_key_values.get_seq_length() == 9
    assert not out.past_key_values.to_dense()[0][0].requires_grad


def test_cached_steps_with_grad_mode_on():
    model = tiny_model()
    ids = tokens(2, 9)
    cache = diffqkv.Cache(model.config)
    got = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([6, 1, 2], dim=1)], 1)
    torch.testing.assert_close(got.detach(), logits(model, ids), atol=1e-4, rtol=1e-4)


def test_a_frozen_model_in_grad_mode_runs_the_ops():
    model = tiny_model().requires_grad_(False)
    ids, mask = padded([9, 5], "left")
    want = logits(model, ids, attention_mask=mask)
    cache = diffqkv.Cache(model.config)
    got = [
        model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
        for a, b in ((0, 6), (6, 7), (7, 9))
    ]
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], want[mask.bool()], atol=1e-4, rtol=1e-4)


def test_a_few_steps_learn_a_sequence():
    model = tiny_model(initializer_range=0.05).train()
    ids = tokens(1, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert torch.equal(model.eval().generate(ids[:, :4], max_new_tokens=12, do_sample=False), ids)
