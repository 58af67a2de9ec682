"""Tensor parallelism, pipelines and FSDP2 on two processes give what one process gives, and share their checkpoints."""

import os
import subprocess
import sys

import fsdp2_steps
import parallel_steps
import pytest
import torch
from paths import SUPPORT
from tiny_sigma import COMPRESSIONS, MODEL_FILES, tiny_config, tiny_model, tokens
from transformers import StaticCache

from diffqkv import SigmaForCausalLM


def fsdp2_training_in_one_process(model):
    model.zero_grad()
    optimizer = torch.optim.SGD(model.train().parameters(), fsdp2_steps.LEARNING_RATE, momentum=0.9)
    losses = []
    for _ in range(fsdp2_steps.STEPS):
        loss = model(**fsdp2_steps.batch(), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), fsdp2_steps.LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def assert_same_inference(got, want):
    torch.testing.assert_close(got["logits"], want["logits"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got["steps"], want["steps"], atol=1e-4, rtol=1e-4)
    assert all(torch.equal(tokens, want["tokens"][0]) for tokens in got["tokens"])


def test_two_processes_are_as_one(tmp_path):
    model = tiny_model(vocab_size=96, k_compression="expand", k_head_dim=16)
    model.save_pretrained(tmp_path / "whole")
    other = tiny_model((12, 4, 6), vocab_size=96, q_aug_dim=None)
    other.save_pretrained(tmp_path / "other")
    tiny_model((8, 1, 4), num_hidden_layers=1).save_pretrained(tmp_path / "one-group")
    script = SUPPORT / "parallel_steps.py"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(script),
            str(tmp_path),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt")

    assert_same_inference(results["other"], parallel_steps.inference(other, [{}]))
    want = parallel_steps.inference(model, [{}])
    assert_same_inference(results["tensor parallel"], want)
    if parallel_steps.HAS_PIPELINES:
        assert_same_inference(results["pipeline"], want)

    want = parallel_steps.training_step(model)
    got = results["tensor parallel"]
    torch.testing.assert_close(got["loss"], want["loss"], atol=1e-5, rtol=1e-5)
    for name, gradient in want["gradients"].items():
        if got["gradients"][name].shape == gradient.shape:  # before transformers 5.16: parts of them
            torch.testing.assert_close(got["gradients"][name], gradient, atol=2e-5, rtol=2e-3, msg=name)

    losses = fsdp2_training_in_one_process(model)
    torch.testing.assert_close(torch.stack(results["fsdp2"]["losses"]), torch.stack(losses), atol=1e-4, rtol=1e-4)
    assert_same_inference(results["tensor parallel again"], parallel_steps.inference(model.eval(), [{}]))
    for folder in ("tensor-parallel", "fsdp2"):
        names = {path.name for path in (tmp_path / folder).iterdir()}
        assert {name for name in names if name.endswith(".py")} == MODEL_FILES
    weights = SigmaForCausalLM.from_pretrained(tmp_path / "fsdp2").state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("q_aug_dim", [None, 96])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_plan_names_every_projection(compression, q_aug_dim):
    model = tiny_model(k_compression=compression, q_aug_dim=q_aug_dim)
    plan = model.tp_plan
    projections = {name for name, x in model.named_modules() if isinstance(x, torch.nn.Linear) and ".0." in name}
    assert {name.replace(".0.", ".*.") for name in projections} == {name for name in plan if "layers" in name}
    last = "q_proj" if q_aug_dim is None else "q_down_proj"
    assert plan[f"model.layers.*.self_attn.{last}"] == "colwise"
    assert {plan[f"model.layers.*.self_attn.{name}_proj"] for name in "kv"} == {"colwise"}
    assert type(model)._tp_plan == {"lm_head": "colwise_gather_output"}
    assert {"model.embed_tokens", "model.layers", "model.norm"} <= model.pp_plan.keys() and "lm_head" in type(
        model
    )._pp_plan


@pytest.mark.parametrize("heads, degree", [((8, 2, 4), 4), ((12, 4, 6), 4), ((12, 4, 6), 3), ((8, 1, 8), 2)])
def test_degrees_that_do_not_divide_the_groups_are_refused(heads, degree):
    model = tiny_model(heads)
    groups = tiny_config(heads).num_key_value_heads
    for part in (model, model.model):
        with pytest.raises(ValueError, match=f"tp_size: got {degree}, want a divisor of {groups}"):
            part._tp_size = degree
    assert model.tp_size is None
    model._tp_size = groups
    assert model.tp_size == model.model.tp_size == groups


def test_a_stage_of_a_pipeline_refuses_a_static_cache():
    model = tiny_model()
    model.model.layers[1] = torch.nn.Identity()
    with pytest.raises(NotImplementedError, match="cache: a static cache is not built for pipeline"):
        model(tokens(1, 5), cache=StaticCache(config=model.config, max_cache_len=8))
