"""Sigma checkpoints: saved, loaded by every way that transformers has, and refused by name if something else."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_sigma import (
    COMPRESSIONS,
    MODEL_FILES,
    NEW_TOKENS,
    VOCAB,
    generate,
    logits,
    packed,
    padded,
    save_with_tokenizer,
    tiny_config,
    tiny_model,
    tokens,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

import diffqkv

# Folders with other releases, as scripts/test_matrix.py names them.
OTHER_TRANSFORMERS = list(filter(None, os.environ.get("DIFFQKV_TEST_TRANSFORMERS", "").split(os.pathsep)))

# ---------------------------------------------------------------- saving, Auto classes, pipelines, remote code


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"k_compression": "expand", "q_aug_dim": None}])
def test_save_and_load(tmp_path, options):
    model = tiny_model(**options)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is diffqkv.SigmaForCausalLM and loaded.config._attn_implementation == "diffqkv"
    assert loaded.config.tie_word_embeddings == options.get("tie_word_embeddings", False)
    ids = tokens(2, 9)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    base = AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert type(base) is diffqkv.SigmaModel and base.config._attn_implementation == "sdpa"
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16


def test_weight_names_are_the_papers():
    names = {name.removeprefix("model.layers.0.") for name in tiny_model().state_dict() if "layers.0." in name}
    projections = {f"self_attn.{name}_proj.weight" for name in ("q", "k", "v", "o", "q_gate", "q_up", "q_down")}
    mlp = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert names == projections | mlp | {"input_layernorm.weight", "post_attention_layernorm.weight"}


def test_text_generation_pipeline(tmp_path):
    model, tokenizer = save_with_tokenizer(tmp_path)
    prompts = ["a prompt", "another, longer prompt"]
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert generator.model.config._attn_implementation == "diffqkv"
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_full_text": False}
    alone = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
    batched = [result[0]["generated_text"] for result in generator(prompts, batch_size=2, **options)]
    assert batched == alone
    ids = tokenizer(prompts[0], return_tensors="pt").input_ids
    new = generate(model, ids)[0, ids.shape[1] :]
    assert alone[0] == tokenizer.decode(new, skip_special_tokens=True)


def run_without_the_package(script, folder, blocks=True, packages=""):
    """Runs a script whose argument is the folder; with `blocks`, no import of diffqkv succeeds in it.

    packages: a folder where it finds packages first.
    """
    blocked = """
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "diffqkv":
                    raise ImportError(f"{name} is blocked", name=name)
        sys.meta_path.insert(0, Blocked())
    """
    code = "import sys" + textwrap.dedent(blocked if blocks else "") + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={
            **os.environ,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")])),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_remote_code_without_the_package(tmp_path):
    model = tiny_model((12, 4, 6))
    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    assert {path.name for path in checkpoint.glob("*.py")} == MODEL_FILES
    ids, mask = padded([9, 5], "left")
    rows, positions = packed([5, 4, 9], 2)
    example = {"ids": ids, "mask": mask, "want": generate(model, ids, mask)}
    example |= {"rows": rows, "positions": positions, "bounds": torch.tensor([0, 5, 9, 18], dtype=torch.int32)}
    torch.save(example | {"packed": logits(model, rows, position_ids=positions)}, tmp_path / "example.pt")
    script = """
        import torch
        from transformers import AutoModelForCausalLM
        folder = sys.argv[1]
        model = AutoModelForCausalLM.from_pretrained(folder + "/checkpoint", trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        assert model.config._attn_implementation == "sdpa"
        example = torch.load(folder + "/example.pt")
        options = {"attention_mask": example["mask"], "max_new_tokens": 8, "do_sample": False}
        for attention in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
            for cache in ({}, {"cache_implementation": "static"}, {"num_beams": 1, "use_cache": False}):
                assert torch.equal(model.generate(example["ids"], **options, **cache), example["want"])
            for told in ({"position_ids": example["positions"]}, {"cu_seq_lens_q": example["bounds"]}):
                got = model(example["rows"], **told).logits
                torch.testing.assert_close(got, example["packed"], atol=1e-4, rtol=1e-4)
        model.save_pretrained(folder + "/again")
        again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
        assert torch.equal(again.generate(example["ids"], **options), example["want"])
        assert torch.equal(again.fuse_for_inference().generate(example["ids"], **options), example["want"])
        assert not [name for name in sys.modules if name.partition(".")[0] == "diffqkv"]
    """
    run_without_the_package(script, tmp_path)


def test_remote_code_of_all_heads(tmp_path):
    heads = {
        "AutoModel": diffqkv.SigmaModel,
        "AutoModelForCausalLM": diffqkv.SigmaForCausalLM,
        "AutoModelForQuestionAnswering": diffqkv.SigmaForQuestionAnswering,
        "AutoModelForSequenceClassification": diffqkv.SigmaForSequenceClassification,
        "AutoModelForTokenClassification": diffqkv.SigmaForTokenClassification,
    }
    ids = tokens(1, 7)
    want = {}
    for name, model_class in heads.items():
        model = tiny_model((12, 4, 6), model_class=model_class)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            want[name] = model(ids)[0]
    torch.save({"ids": ids, "want": want}, tmp_path / "example.pt")
    script = """
        import torch
        import transformers
        folder = sys.argv[1]
        example = torch.load(folder + "/example.pt")
        for name, want in example["want"].items():
            auto = getattr(transformers, name)
            model = auto.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
            assert type(model).__module__.startswith("transformers_modules"), type(model)
            assert type(model.base_model).__module__.startswith("transformers_modules")
            with torch.no_grad():
                torch.testing.assert_close(model(example["ids"])[0], want, atol=1e-4, rtol=1e-4)
            # A checkpoint of one head serves all others, whose own weights are then new.
            other = auto.from_pretrained(folder + "/AutoModelForCausalLM", trust_remote_code=True)
            assert type(other).__name__ == type(model).__name__
    """
    run_without_the_package(script, tmp_path)


def test_remote_code_beside_the_package_takes_the_ops(tmp_path):
    model = tiny_model((12, 4, 6))
    model.save_pretrained(tmp_path / "checkpoint")
    ids = tokens(2, 7)
    torch.save({"ids": ids, "want": generate(model, ids)}, tmp_path / "example.pt")
    script = """
        import torch
        from transformers import AutoModelForCausalLM
        folder = sys.argv[1]
        model = AutoModelForCausalLM.from_pretrained(folder + "/checkpoint", trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        assert model.config._attn_implementation == "diffqkv"
        import diffqkv
        example = torch.load(folder + "/example.pt")
        options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
        out = model.generate(example["ids"], **options)
        assert torch.equal(out.sequences, example["want"])
        assert any(type(x) is diffqkv.Cache for x in out.values())
    """
    run_without_the_package(script, tmp_path, blocks=False)


@pytest.mark.skipif(not OTHER_TRANSFORMERS, reason="DIFFQKV_TEST_TRANSFORMERS names no other transformers")
@pytest.mark.parametrize("other", OTHER_TRANSFORMERS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_remote_code_in_another_release(other, compression, tmp_path):
    model = tiny_model((12, 4, 6), k_compression=compression)
    model.save_pretrained(tmp_path / "checkpoint")
    ids, mask = padded([9, 5], "left")
    ours = transformers.__version__
    torch.save({"ids": ids, "mask": mask, "want": generate(model, ids, mask), "ours": ours}, tmp_path / "example.pt")
    script = """
        import torch
        import transformers
        folder = sys.argv[1]
        example = torch.load(folder + "/example.pt")
        assert transformers.__version__ != example["ours"], transformers.__file__
        auto = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(folder + "/checkpoint", trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        options = {"attention_mask": example["mask"], "max_new_tokens": 8, "do_sample": False}
        for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
            assert torch.equal(model.generate(example["ids"], **options, **cache), example["want"]), cache
    """
    run_without_the_package(script, tmp_path, packages=other)


# ---------------------------------------------------------------- checkpoints of something else


def save_changed(folder, change, **options):
    """A checkpoint whose weights have been changed."""
    tiny_model(**options).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


GATE, NORM = "model.layers.1.self_attn.q_gate_proj.weight", "model.norm.weight"


@pytest.mark.parametrize("load", [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification])
def test_missing_weights_are_refused(tmp_path, load):
    save_changed(tmp_path, lambda weights: [weights.pop(name) for name in (GATE, NORM)])
    names = [name.removeprefix("model." if load is AutoModel else "") for name in (GATE, NORM)]
    with pytest.raises(ValueError, match=f"got a checkpoint without {', '.join(names)}, want the weights of a Sigma"):
        load.from_pretrained(tmp_path)
    model, info = load.from_pretrained(tmp_path, output_loading_info=True)
    assert set(names) <= set(info["missing_keys"]) and isinstance(model, diffqkv.models.SigmaPreTrainedModel)


def test_weights_without_a_place_are_refused(tmp_path):
    save_changed(
        tmp_path, lambda weights: weights.update({f"model.layers.{i}.extra": torch.ones(2) for i in range(2, 7)})
    )
    with pytest.raises(ValueError, match=r"got a checkpoint with model\.layers\.2\.extra, .* and 2 more, want"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_head_may_be_new_but_not_that_of_a_language_model(tmp_path):
    diffqkv.SigmaModel(tiny_model().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got a checkpoint without lm_head.weight, want"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).score.weight.isfinite().all()
    save_changed(tmp_path, lambda weights: None, tie_word_embeddings=True)
    tied = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize(
    "heads, name, got, want",
    [
        ((8, 4, 4), "k_proj", [32, 64], [64, 64]),
        ((8, 2, 8), "v_proj", [64, 64], [128, 64]),
    ],
)
def test_weights_of_other_head_counts_are_refused(tmp_path, heads, name, got, want):
    tiny_model().save_pretrained(tmp_path)
    tiny_config(heads).save_pretrained(tmp_path)
    shapes = f"{name}.weight of shape {got} and 1 more of other shapes, want {want} by the configuration"
    for load in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        for kind in (ValueError, RuntimeError):
            with pytest.raises(kind, match=f"got a checkpoint with model.layers.0.self_attn.{re.escape(shapes)}"):
                load.from_pretrained(tmp_path)
    changed = AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert getattr(changed.model.layers[1].self_attn, name).weight.isfinite().all()
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)


def llama(folder=None) -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, head_dim=16, **sizes))
    if folder is not None:
        model.save_pretrained(folder)
    return model


MODELS = [diffqkv.SigmaModel, diffqkv.SigmaForCausalLM, diffqkv.SigmaForSequenceClassification]


@pytest.mark.parametrize("model_class", MODELS)
def test_a_llama_is_refused(tmp_path, model_class):
    config = llama(tmp_path).config
    with pytest.raises(ValueError, match="config: got a LlamaConfig, want a SigmaConfig"):
        model_class(config)
    with pytest.raises(ValueError, match="config: got a LlamaConfig, want a SigmaConfig"):
        model_class.from_pretrained(tmp_path, config=config)
    with pytest.raises(ValueError, match="model_type: got 'llama', want 'sigma_diffqkv'"):
        model_class.from_pretrained(tmp_path)


def test_the_weights_of_a_llama_are_refused(tmp_path):
    llama(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got a checkpoint without model.layers.0.self_attn.q_down_proj.weight, "):
        diffqkv.SigmaForCausalLM.from_pretrained(tmp_path)
    tiny_config(q_aug_dim=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got a checkpoint with .*v_proj.weight of shape \[32, 64\] and 1 more"):
        diffqkv.SigmaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_class", MODELS)
def test_a_sigma_moe_is_refused(tmp_path, model_class):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for changes, message in (
        ({"model_type": "sigma"}, "model_type: got 'sigma', want 'sigma_diffqkv'"),
        ({"model_type": "sigma", "n_routed_experts": 8}, "n_routed_experts: got a field of Sigma-MoE"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace: got a field of Sigma-MoE"),
    ):
        path.write_text(json.dumps(fields | changes))
        with pytest.raises(ValueError, match=message):
            model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_key_heads": 3}, r"num_key_heads: got 3, want a divisor of num_attention_heads \(8\)"),
        ({"num_value_heads": 0}, "num_value_heads: got 0, want a positive integer"),
        ({"k_head_dim": 8}, "k_head_dim: got 8 without k_compression"),
        ({"selective_v_top_k": 0}, "selective_v_top_k: got 0, want an integer >= 1"),
        ({"selective_v_top_k": -2}, "selective_v_top_k: got -2, want an integer >= 1"),
        ({"selective_v_top_k": [4]}, r"selective_v_top_k: got \[4\], want a list of one number per layer \(2\)"),
    ],
)
def test_fields_that_change_after_the_configuration_was_made_are_checked(tmp_path, changes, message):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, **changes)
    config = tiny_config()
    for name, value in changes.items():
        setattr(config, name, value)
    for model_class in MODELS:
        with pytest.raises(ValueError, match=message):
            model_class(config)
    if "selective_v_top_k" in changes:
        model.config.selective_v_top_k = changes["selective_v_top_k"]
        with pytest.raises(ValueError, match=message):
            generate(model, tokens(1, 5))
