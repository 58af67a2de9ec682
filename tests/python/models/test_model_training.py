"""Training: SigmaForCausalLM through the ops, alone and under Trainer, FSDP2, PEFT, autocast and torch.compile."""

import copy
import os
import subprocess
import sys
from collections import Counter
from itertools import product

import fsdp2_steps
import peft
import pytest
import torch
from functorch.compile import make_boxed_func
from paths import SUPPORT
from tiny_sigma import (
    ATTENTIONS,
    COMPRESSIONS,
    HEADS,
    Recorder,
    cache_in,
    checkpoint_activations,
    logits,
    packed,
    padded,
    tiny_model,
    tokens,
)
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

import diffqkv
from diffqkv.models import attention as diffqkv_attention_module
from diffqkv.models.sigma import generation_sigma

pytestmark = [
    pytest.mark.usefixtures("library"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

LENGTHS = [5, 3, 9, 1, 6, 10]
ROWS = ["plain", "left", "right", "packed", "bounds"]
TOKENS = 17  # of each of the two rows: no other size of the tiny models


def batch_of(rows):
    """Two rows of 17 tokens, as the keyword arguments of a model; "packed" and "bounds" hold three sequences each."""
    if rows == "plain":
        ids = tokens(2, TOKENS)
        return {"input_ids": ids, "labels": ids}
    if rows in ("left", "right"):
        ids, mask = padded([TOKENS, 9], rows)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        given = {"attention_mask": mask, "position_ids": positions}
    else:
        ids, positions = packed(LENGTHS, 2)
        bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
        longest = max(LENGTHS)
        given = {"position_ids": positions}
        if rows == "bounds":
            given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    # A sequence's first token is not predicted, from padding or from the sequence before.
    return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), **given}


def loss_and_gradients(model, seed=0, **batch):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**{"use_cache": False, **batch}).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, want, atol=2e-5):
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-5)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got[1][name], gradient, atol=atol, rtol=2e-3, msg=name)


def assert_equal_gradients(got, want):
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(got[1][name], gradient) for name, gradient in want[1].items())


def attention_ops(record):
    return {name: count for name, count in record.ops.items() if "attention" in name}


def expected_ops(rows, layers=2):
    op = "flash_attention_varlen" if rows in ("packed", "bounds") else "flash_attention"
    return {op: layers, f"{op}_backward": layers}


# ---------------------------------------------------------------- the ops, and what they compute


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("heads, compression", list(product(HEADS, COMPRESSIONS)))
def test_the_ops_train_what_sdpa_trains(heads, compression, rows):
    model = tiny_model(heads, k_compression=compression, initializer_range=0.1).train()
    batch = batch_of(rows)
    with Recorder(TOKENS) as record:
        got = loss_and_gradients(model, **batch)
    assert attention_ops(record) == expected_ops(rows)
    assert not record.dense
    model.set_attn_implementation("sdpa")
    with Recorder(TOKENS) as record:
        want = loss_and_gradients(model, **batch)
    assert not attention_ops(record) and (rows == "plain" or record.dense)
    assert_same_gradients(got, want)


@pytest.mark.parametrize("rows", ROWS)
def test_both_paths_of_the_ops_train(api, rows):
    model = tiny_model((12, 4, 6), initializer_range=0.1).train()
    batch = batch_of(rows)
    got = loss_and_gradients(model, **batch)
    model.set_attn_implementation("sdpa")
    assert_same_gradients(got, loss_and_gradients(model, **batch))


def test_packed_sequences_train_like_separate_and_like_padded_ones():
    model = tiny_model((12, 4, 6), initializer_range=0.1).train()
    got = loss_and_gradients(model, **batch_of("packed"))
    sequences = tokens(1, sum(LENGTHS)).split(LENGTHS, dim=1)
    predicted = [length - 1 for length in LENGTHS]

    model.zero_grad()
    losses = [model(x, labels=x).loss * n for x, n in zip(sequences, predicted, strict=True) if n]
    loss = sum(losses) / sum(predicted)
    loss.backward()
    assert_same_gradients(got, (loss.detach(), {name: p.grad for name, p in model.named_parameters()}))

    ids = torch.nn.utils.rnn.pad_sequence([x[0] for x in sequences], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x[0]) for x in sequences], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    assert_same_gradients(got, loss_and_gradients(model, input_ids=ids, attention_mask=mask, labels=labels))


def test_packed_rows_train_bitwise_alike_however_they_are_told_and_cut():
    model = tiny_model().train()
    want = loss_and_gradients(model, **batch_of("packed"))
    assert_equal_gradients(loss_and_gradients(model, **batch_of("bounds")), want)
    one_row = {name: x.view(1, -1) for name, x in batch_of("packed").items()}
    two_rows, one_row_logits = (model(**batch, use_cache=False).logits for batch in (batch_of("packed"), one_row))
    assert torch.equal(two_rows.flatten(0, 1), one_row_logits.flatten(0, 1))
    assert_equal_gradients(loss_and_gradients(model, **one_row), want)


def test_packed_rows_of_a_training_loop_make_no_cache(monkeypatch):
    model = tiny_model().train()
    warned = []
    monkeypatch.setattr(generation_sigma.logger, "warning_once", warned.append)
    out = model(**batch_of("packed"))
    assert cache_in(out) is None
    assert len(warned) == 1 and "jumps begin new sequences in a row, which do not see the tokens before" in warned[0]


def test_what_the_ops_cannot_train_takes_stock_attention(monkeypatch):
    warned = []
    monkeypatch.setattr(diffqkv_attention_module.logger, "warning_once", warned.append)
    model = tiny_model(initializer_range=0.1).train()
    batch = batch_of("plain")
    holes = torch.ones_like(batch["input_ids"])
    holes[0, 3:5] = 0
    for options in ({"attention_mask": holes}, {"output_attentions": True}):
        results = []
        for attention in ("diffqkv", "eager"):
            model.set_attn_implementation(attention)
            with Recorder(TOKENS) as record:
                results.append(loss_and_gradients(model, **batch, **options))
            assert not attention_ops(record) and record.dense
        assert_same_gradients(*results)
    assert len(warned) == 2 and all("the mask is not one span of keys per row" in text for text in warned)


@pytest.mark.parametrize("rows", ROWS)
def test_attention_dropout(rows):
    model = tiny_model(attention_dropout=0.5).train()
    batch = batch_of(rows)
    with Recorder(TOKENS) as record:
        first = loss_and_gradients(model, seed=1, **batch)
    assert attention_ops(record) == expected_ops(rows) and not record.dense
    assert_equal_gradients(loss_and_gradients(model, seed=1, **batch), first)
    assert loss_and_gradients(model, seed=2, **batch)[0] != first[0]
    assert_equal_gradients(loss_and_gradients(model.eval(), **batch), loss_and_gradients(tiny_model(), **batch))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(use_reentrant, dropout, rows):
    model = tiny_model(attention_dropout=dropout).train()
    batch = batch_of(rows)
    want = loss_and_gradients(model, **batch)
    checkpoint_activations(model, use_reentrant=use_reentrant)
    with Recorder(TOKENS) as record:
        assert_equal_gradients(loss_and_gradients(model, **batch), want)
    forward, backward = expected_ops(rows)
    assert attention_ops(record) == {forward: 4, backward: 2} and not record.dense
    assert cache_in(model(**batch_of("plain"))) is None


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


# ---------------------------------------------------------------- caches


def test_training_with_the_default_cache_gives_the_same_gradients():
    model = tiny_model(initializer_range=0.1).train()
    ids = tokens(2, TOKENS)
    want = loss_and_gradients(model, input_ids=ids, labels=ids)
    model.zero_grad()
    out = model(ids, labels=ids)
    with Recorder(TOKENS) as record:
        got = loss_and_gradients(model, input_ids=ids, labels=ids, use_cache=True)
    assert attention_ops(record) == expected_ops("plain")
    assert_equal_gradients(got, want)
    assert cache_in(out).get_seq_length() == TOKENS
    assert cache_in(out).layers[0].keys.requires_grad  # steps behind it are differentiable
    with torch.no_grad():
        assert type(cache_in(model(ids))) is diffqkv.Cache


@pytest.mark.parametrize("side", ["left", None])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_gradients_flow_through_cached_steps(compression, side):
    model = tiny_model((12, 4, 6), k_compression=compression, initializer_range=0.1).train()
    ids, mask = padded([TOKENS, TOKENS - 3 if side else TOKENS], side or "left")
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    seen = mask.bool()

    def gradients(parts):
        model.zero_grad()
        out = torch.cat([part for part in parts], 1)[seen]
        out.square().mean().backward()
        return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    def steps():
        cache = DynamicCache(config=model.config)  # diffqkv.Cache keeps no graph
        for begin, end in ((0, 11), (11, 12), (12, TOKENS)):
            part = {name: x[:, begin:end] for name, x in batch.items()} | {"attention_mask": mask[:, :end]}
            yield model(**part, cache=cache).logits

    with Recorder(TOKENS) as record:
        got = gradients(steps())
    assert attention_ops(record) == {"flash_attention": 6, "flash_attention_backward": 6}
    assert_same_gradients(got, gradients([model(**batch, use_cache=False).logits]))


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradients_flow_through_the_default_cache(compression, attention):
    """A prompt, then the completion behind its cache, and a loss of the completion alone."""
    model = tiny_model((12, 4, 6), k_compression=compression, initializer_range=0.1).train()
    model.set_attn_implementation(attention)
    ids = tokens(2, TOKENS)

    def gradients(completion):
        model.zero_grad()
        completion.log_softmax(-1)[..., 3].mean().backward()
        return completion.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    want = gradients(model(ids, use_cache=False).logits[:, 6:])
    prompt = cache_in(model(ids[:, :6], use_cache=True))
    assert_same_gradients(gradients(model(ids[:, 6:], cache=prompt).logits), want)


def test_a_cache_that_lost_a_graph_is_refused():
    model, ids = tiny_model(), tokens(2, 12)
    want = logits(model, ids)
    cache = diffqkv.Cache(model.config)
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
    first = model(ids[:, 4:6], cache=cache).logits  # behind constants
    torch.testing.assert_close(first.detach(), want[:, 4:6], atol=1e-4, rtol=1e-4)
    held = [x.clone() for x in cache.to_dense()[0]]
    with pytest.raises(ValueError, match="cache: got a step that records gradients behind tokens .* from number 4 on"):
        model(ids[:, 6:], cache=cache)
    k, v = (torch.randn_like(x[:, :, :1], requires_grad=True) for x in (cache.layers[0].keys, cache.layers[0].values))
    with pytest.raises(ValueError, match="cache: got a step that records gradients"):
        cache.update(k, v, 0)
    assert all(map(torch.equal, cache.to_dense()[0], held))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, 6:], cache=cache).logits, want[:, 6:], atol=1e-4, rtol=1e-4)
    cache.crop(-8)  # what was recorded is gone
    assert model(ids[:, 4:], cache=cache).logits.requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_drop_no_cached_tokens(reentrant):
    model, ids = tiny_model(), tokens(1, 12)
    want = logits(model, ids)[:, 6:]
    with torch.no_grad():
        cache = cache_in(model(ids[:, :6], use_cache=True))
    stock = cache.to_dynamic()
    checkpoint_activations(model.train(), use_reentrant=reentrant)
    for filled in (cache, stock):
        with pytest.raises(ValueError, match="cache: got one with tokens while activations are checkpointed"):
            model(ids[:, 6:], cache=filled)
        assert filled.get_seq_length() == 6
    with torch.no_grad():  # nothing is run once more
        torch.testing.assert_close(model(ids[:, 6:], cache=cache).logits, want, atol=1e-4, rtol=1e-4)
    empty = diffqkv.Cache(model.config)
    out = model(ids, cache=empty, labels=ids)
    out.loss.backward()
    assert cache_in(out) is None and empty.get_seq_length() == 0


def test_cached_steps_with_grad_mode_on():
    model = tiny_model()
    ids = tokens(2, 9)
    cache = DynamicCache(config=model.config)
    got = torch.cat([model(part, cache=cache).logits for part in ids.split([6, 1, 2], dim=1)], 1)
    torch.testing.assert_close(got.detach(), logits(model, ids), atol=1e-4, rtol=1e-4)


def test_a_frozen_model_in_grad_mode_decodes():
    model = tiny_model().requires_grad_(False)
    ids, mask = padded([9, 5], "left")
    want = logits(model, ids, attention_mask=mask)
    cache = diffqkv.Cache(model.config)
    with Recorder(9) as record:
        got = [model(ids[:, a:b], attention_mask=mask[:, :b], cache=cache).logits for a, b in ((0, 6), (6, 7), (7, 9))]
    assert attention_ops(record) == {"flash_attention": 2, "decode_attention": 4}
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], want[mask.bool()], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- autocast, torch.compile


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
@torch.no_grad()
def test_autocast_of_a_model_in_the_other_half_precision(dtypes):
    model, ids = tiny_model().to(dtypes[0]), tokens(1, 8)
    with torch.autocast("cpu", dtypes[1]):
        whole = model(ids, use_cache=False).logits
        cache = diffqkv.Cache(model.config)
        steps = torch.cat([model(part, cache=cache).logits for part in ids.split([5, 1, 2], 1)], 1)
    torch.testing.assert_close(steps.float(), whole.float(), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("rows", ROWS)
def test_autocast(rows):
    model = tiny_model((12, 4, 6), initializer_range=0.1).train()
    batch = batch_of(rows)
    want_loss, want = loss_and_gradients(model, **batch)
    seen = []

    class Dtypes(Recorder):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if "attention" in op._schema.name and op.namespace == "diffqkv":
                seen.extend({x.dtype for x in args if isinstance(x, torch.Tensor) and x.dim() >= 3})
            return super().__torch_dispatch__(op, types, args, kwargs)

    with Dtypes(TOKENS) as record, torch.autocast("cpu", torch.bfloat16):
        loss, got = loss_and_gradients(model, **batch)
    assert attention_ops(record) == expected_ops(rows) and not record.dense
    assert torch.bfloat16 in seen and seen.count(torch.float32) <= 2  # lse, in the backward ops
    torch.testing.assert_close(loss, want_loss, atol=0.02, rtol=0.02)
    for name, gradient in want.items():
        assert torch.nn.functional.cosine_similarity(got[name].flatten(), gradient.flatten(), dim=0) > 0.99, name


@pytest.fixture
def graphs():
    """A backend that compiles nothing, and the ops of the forward and backward graphs it is given."""
    seen = Counter()

    def count(module, inputs):
        seen.update(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return make_boxed_func(module.forward)

    torch.compiler.reset()
    yield aot_autograd(fw_compiler=count, bw_compiler=count), seen
    torch.compiler.reset()


def ops_in(seen):
    return {name.split(".")[1]: count for name, count in seen.items() if "diffqkv" in name and "attention" in name}


@pytest.mark.parametrize("rows", ROWS)
def test_a_compiled_step_in_one_graph(graphs, rows):
    backend, seen = graphs
    model = tiny_model().train()
    batch = batch_of(rows)
    want = loss_and_gradients(model, **batch)
    got = loss_and_gradients(torch.compile(model, backend=backend, fullgraph=True), **batch)
    assert ops_in(seen) == expected_ops(rows)
    prefix = "_orig_mod."
    assert_equal_gradients((got[0], {name.removeprefix(prefix): x for name, x in got[1].items()}), want)


@pytest.mark.parametrize("attention", ["diffqkv", "sdpa"])
def test_a_compiled_packed_step_that_fills_a_cache(graphs, attention):
    model = tiny_model(num_hidden_layers=1).train()
    model.set_attn_implementation(attention)
    want = model(**batch_of("packed")).loss
    got = torch.compile(model, backend=graphs[0], fullgraph=True)(**batch_of("packed"), use_cache=True)
    assert cache_in(got) is not None
    torch.testing.assert_close(got.loss, want)


def test_compiled_dropout_takes_sdpa(graphs):
    backend, seen = graphs
    model = tiny_model(attention_dropout=0.5, num_hidden_layers=1).train()
    for rows in ("left", "packed"):
        losses = []
        for attention in ("diffqkv", "sdpa"):
            model.set_attn_implementation(attention)
            torch.compiler.reset()
            compiled = torch.compile(model, backend=backend, fullgraph=True)
            losses.append(loss_and_gradients(compiled, **batch_of(rows))[0])
        assert not ops_in(seen)
        torch.testing.assert_close(*losses)


def test_holes_are_an_error_of_compiled_code(graphs):
    model = tiny_model()
    compiled = torch.compile(model, backend=graphs[0], fullgraph=True)
    ids = tokens(2, TOKENS)
    mask = torch.ones_like(ids)
    logits(compiled, ids, attention_mask=mask, use_cache=False)
    mask[0, 3:5] = 0
    with pytest.raises(RuntimeError, match="attention_mask: got holes"):
        logits(compiled, ids, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("backend, rows", [("aot_eager", "plain"), ("aot_eager", "bounds"), ("inductor", "packed")])
def test_one_graph_for_any_length(backend, rows):
    torch.compiler.reset()
    model = tiny_model(num_hidden_layers=1).train()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for lengths in ([3, 8, 5, 6], [9, 9, 17, 1], [2, 11, 4, 9]):
        ids, positions = packed(lengths, 2)
        batch = {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100)}
        if rows == "packed":
            batch["position_ids"] = positions
        if rows == "bounds":
            batch["cu_seq_lens_q"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            batch["max_length_q"] = max(lengths)
        got = loss_and_gradients(compiled, **batch)
        frames.append(counter.frame_count)
        got = got[0], {name.removeprefix("_orig_mod."): gradient for name, gradient in got[1].items()}
        assert_same_gradients(got, loss_and_gradients(model, **batch))
    assert len(set(frames)) == 1
    torch.compiler.reset()


def test_a_compiled_run_saves_and_goes_on_uncompiled(tmp_path):
    torch.compiler.reset()

    def steps(model, optimizer, count):
        for _ in range(count):
            loss_and_gradients(model, **batch_of("packed"))
            optimizer.step()
        return model(**batch_of("packed"), use_cache=False).loss.detach()

    def optimizer_of(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-3)

    model = tiny_model().train()
    model.compile(backend="aot_eager", fullgraph=True)
    optimizer = optimizer_of(model)
    steps(model, optimizer, 2)
    model.save_pretrained(tmp_path)
    loaded = diffqkv.SigmaForCausalLM.from_pretrained(tmp_path).train()
    resumed = optimizer_of(loaded)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(steps(loaded, resumed, 2), steps(model, optimizer, 2))
    torch.compiler.reset()


# ---------------------------------------------------------------- Trainer, FSDP2, PEFT


def documents(count=24):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, TOKENS + 1, (count,), generator=generator).tolist()
    return [{"input_ids": ids, "labels": ids} for ids in (tokens(1, n, seed=n)[0].tolist() for n in lengths)]


def pad(features):
    """Right-padded rows; a row's first token is no label, as in DataCollatorWithFlattening."""
    rows = [torch.tensor(feature["input_ids"]) for feature in features]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trainer_of(folder, collator, model=None, **options):
    model = tiny_model(initializer_range=0.05, attention_dropout=0.1) if model is None else model
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        **options,
    }
    arguments = TrainingArguments(**settings)
    return Trainer(model=model, args=arguments, train_dataset=documents(), data_collator=collator)


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


COLLATORS = {"padded": pad, "flattened": DataCollatorWithFlattening(return_flash_attn_kwargs=True)}


@pytest.mark.parametrize("name", COLLATORS)
def test_trainer_resumes_to_the_bit(tmp_path, name):
    """In bf16, with gradient accumulation and attention dropout."""
    options = {"bf16": True, "gradient_accumulation_steps": 2, "max_steps": 6}
    whole = trainer_of(tmp_path, COLLATORS[name], save_strategy="steps", save_steps=3, **options)
    with Recorder(TOKENS) as record:
        whole.train()
    assert attention_ops(record) == {
        op: 6 * 2 * n for op, n in expected_ops("packed" if name == "flattened" else "plain").items()
    }
    resumed = trainer_of(tmp_path, COLLATORS[name], tiny_model(seed=1, attention_dropout=0.1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses_of(resumed) == losses_of(whole) and len(set(losses_of(whole))) == 6
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(whole.model.lm_head.weight, tiny_model(initializer_range=0.05).lm_head.weight)


def test_trainer_learns_alike_without_padding(tmp_path):
    losses = {}
    for name, collator in COLLATORS.items():
        trainer = trainer_of(tmp_path, collator, tiny_model(initializer_range=0.05), max_steps=8)
        trainer.train()
        losses[name] = torch.tensor(losses_of(trainer))
    torch.testing.assert_close(losses["flattened"], losses["padded"], atol=1e-3, rtol=1e-3)
    assert losses["padded"][-1] < losses["padded"][0]


def test_trainer_evaluates_with_a_cache_in_the_outputs(tmp_path):
    """It gathers logits alone: `keys_to_ignore_at_inference` names the cache."""
    trainer = trainer_of(tmp_path, pad, use_cache=True, per_device_eval_batch_size=2)
    seen = []
    trainer.compute_metrics = lambda prediction: (
        seen.append(prediction.predictions.shape) or {"rows": len(prediction.label_ids)}
    )
    assert trainer.evaluate(documents(6))["eval_rows"] == 6
    assert len(seen) == 1 and seen[0][0] == 6 and seen[0][2] == trainer.model.config.vocab_size


def test_two_processes_with_fsdp2_train_like_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        + [str(SUPPORT / "fsdp2_steps.py"), str(tmp_path / "result.pt")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sharded = torch.load(tmp_path / "result.pt")

    model = tiny_model().train()
    optimizer = torch.optim.SGD(model.parameters(), fsdp2_steps.LEARNING_RATE, momentum=0.9)
    losses = []
    for _ in range(fsdp2_steps.STEPS):
        losses.append(loss_and_gradients(model, **fsdp2_steps.batch())[0])
        torch.nn.utils.clip_grad_norm_(model.parameters(), fsdp2_steps.LARGEST_NORM)
        optimizer.step()
    torch.testing.assert_close(torch.stack(sharded["losses"]), torch.stack(losses), atol=1e-5, rtol=1e-5)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sharded["weights"][name], parameter.detach(), atol=1e-5, rtol=1e-4, msg=name)


def test_lora(tmp_path):
    base = tiny_model(initializer_range=0.05)
    frozen = copy.deepcopy(base.state_dict())
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings).train()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    assert any("q_gate_proj" in name for name in trainable)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(10):
        with Recorder(TOKENS) as record:
            loss, gradients = loss_and_gradients(model, **batch_of("packed"))
        assert attention_ops(record) == expected_ops("packed") and gradients.keys() == trainable
        optimizer.step()
        losses.append(loss)
    assert losses[-1] < losses[0] - 0.5
    model.save_pretrained(tmp_path)
    for name, value in model.get_base_model().state_dict().items():
        assert "lora_" in name or torch.equal(value, frozen[name.replace("base_layer.", "")])

    again = tiny_model()
    again.load_state_dict(frozen)
    again = peft.PeftModel.from_pretrained(again, tmp_path).eval()
    ids = tokens(2, TOKENS)
    want = logits(model.eval(), ids)
    assert torch.equal(logits(again, ids), want)
    torch.testing.assert_close(logits(again.merge_and_unload(), ids), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config", "LoHaConfig"])
def test_peft_knows_the_layers_of_the_model(method):
    model = peft.get_peft_model(tiny_model(), getattr(peft, method)(task_type="CAUSAL_LM"))
    adapted = {part for name, x in model.named_parameters() if x.requires_grad for part in name.split(".")}
    assert ({"k_proj", "v_proj", "down_proj"} if method == "IA3Config" else {"q_proj", "v_proj"}) <= adapted
    model(input_ids=tokens(1, 5), labels=tokens(1, 5)).loss.backward()
    assert all(x.grad is not None for x in model.parameters() if x.requires_grad)
