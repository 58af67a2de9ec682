"""Weights of int8 and int4: read straight from plain checkpoints, saved and read again; and what is refused."""

import copy
import json
import os
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_checkpoints import run_without_the_package
from tiny_sigma import MODEL_FILES, generate, logits, tiny_model, tokens
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    QuantoConfig,
)

import diffqkv
from diffqkv import WeightsConfig
from diffqkv.models import packed_linear

MODELS = [
    {},
    {"tie_word_embeddings": True},
    {"q_aug_dim": None, "attention_bias": True, "mlp_bias": True},
    {"k_compression": "absorbed"},
]


@pytest.fixture(autouse=True)
def needs(library):
    """Weights are packed where the library is that reads them."""


def same(got, want):
    """The same modules and numbers, and the same logits for them."""
    assert str(got) == str(want) and got.dtype == want.dtype and got.packed_weights == want.packed_weights
    got_state, want_state = got.state_dict(), want.state_dict()
    assert got_state.keys() == want_state.keys()
    for name, value in want_state.items():
        assert got_state[name].dtype == value.dtype and torch.equal(got_state[name], value), name
    assert not any(parameter.requires_grad for parameter in got.parameters())
    with torch.no_grad():
        assert torch.equal(got(tokens(2, 9))[0], want(tokens(2, 9))[0])
    return True


def saved(folder, **changes):
    tiny_model(**changes).to(torch.bfloat16).save_pretrained(folder, max_shard_size="50KB")
    return folder


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
@pytest.mark.parametrize("weights", ["packed", "int8", "int4"])
@pytest.mark.parametrize("changes", MODELS)
def test_loaded_straight_is_loaded_and_fused(tmp_path, changes, weights, dtype):
    plain = saved(tmp_path / "plain", **changes)
    want = AutoModelForCausalLM.from_pretrained(plain, dtype=dtype).fuse_for_inference(weights)
    config = WeightsConfig(weights)
    assert same(AutoModelForCausalLM.from_pretrained(plain, dtype=dtype, quantization_config=config), want)


@pytest.mark.parametrize(
    "weights, group_size, route", [("int8", 32, "fused"), ("int4", 32, "fused"), ("int4", 64, "straight")]
)
@pytest.mark.parametrize("changes", MODELS)
def test_saved_and_loaded(tmp_path, changes, weights, group_size, route):
    plain = saved(tmp_path / "plain", **{"q_aug_dim": 128, "intermediate_size": 128, **changes})
    if route == "straight":
        config = WeightsConfig(weights, group_size)
        model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    else:
        model = AutoModelForCausalLM.from_pretrained(plain).fuse_for_inference(weights, group_size=group_size)
    folder = tmp_path / "integers"
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and MODEL_FILES <= {x.name for x in folder.iterdir()}
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (entry["quant_method"], entry["weights"], entry["group_size"]) == ("diffqkv", weights, group_size)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert same(again, model) and again.is_fused and not again.training
    assert torch.equal(generate(again, tokens(2, 7)), generate(model, tokens(2, 7)))
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert same(wide, copy.deepcopy(model).to(torch.float32))
    again.save_pretrained(tmp_path / "twice")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "twice"), model)
    base = diffqkv.SigmaModel.from_pretrained(folder)
    assert same(base, again.model)
    base.save_pretrained(tmp_path / "base")
    assert same(diffqkv.SigmaModel.from_pretrained(tmp_path / "base"), base)


def test_heads_of_tasks(tmp_path):
    classifier = tiny_model(model_class=diffqkv.SigmaForSequenceClassification, num_labels=3)
    classifier.fuse_for_inference("int4").save_pretrained(tmp_path / "classifier")
    assert same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier"), classifier)
    tiny_model().fuse_for_inference("int4").save_pretrained(tmp_path / "head")
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "head", num_labels=3)
    assert type(fresh.score) is torch.nn.Linear and fresh.score.weight.std() > 0


def test_copies_and_dtypes():
    model = tiny_model(tie_word_embeddings=True).to(torch.bfloat16).fuse_for_inference("int4")
    assert same(copy.deepcopy(model), model) and same(pickle.loads(pickle.dumps(model)), model)
    want = copy.deepcopy(model)
    # A dtype is what is computed in: the weights that the integers stand for stay.
    other = copy.deepcopy(model).to(torch.float16)
    assert other.dtype == torch.float16 and logits(other, tokens(1, 3)).dtype == torch.float16
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert same(other.to(torch.bfloat16), want)
    with pytest.raises(ValueError, match="half.* is not supported for quantized model"):
        model.half()


def test_layers_are_packed_as_they_are_read(tmp_path, monkeypatch):
    plain = saved(tmp_path, num_hidden_layers=4)
    most = [0]
    quantize = packed_linear.quantization.quantize_to_panels

    def counting(weight, *args):
        linears = [x for x in models[-1].modules() if type(x) is torch.nn.Linear and not x.weight.is_meta]
        most.append(sum(x.weight.numel() for x in linears))
        return quantize(weight, *args)

    models = []
    take = diffqkv.SigmaForCausalLM._check_form
    monkeypatch.setattr(diffqkv.SigmaForCausalLM, "_check_form", lambda x, *form: models.append(x) or take(x, *form))
    monkeypatch.setattr(packed_linear.quantization, "quantize_to_panels", counting)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=WeightsConfig("int4"))
    attention = tiny_model().model.layers[0].self_attn
    assert len(most) > 4 * 6 and max(most) <= sum(weight.numel() for weight in attention.parameters())


MEMORY = """
import sys, threading, torch, diffqkv

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

def load(folder, **options):
    peak, done = [anonymous()], threading.Event()

    def watch():
        while not done.wait(0.003):
            peak.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    model = diffqkv.SigmaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    done.set()
    thread.join()
    return model, max(peak) - peak[0]

tiny, folder = sys.argv[1:]
torch.set_num_threads(2)
integers = {"quantization_config": diffqkv.WeightsConfig("int4")}
load(tiny, **integers)
model, packed = load(folder, **integers)
result = sum(x.numel() * x.element_size() for x in model.parameters()) / 2**20
del model
model, plain = load(folder)
print(result, packed, plain)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_memory(tmp_path):
    saved(tmp_path / "tiny")
    sizes = {"hidden_size": 768, "intermediate_size": 2304, "head_dim": 96, "q_aug_dim": 1024, "vocab_size": 4096}
    model = tiny_model(num_hidden_layers=10, **sizes)
    layer = sum(x.numel() for x in model.model.layers[0].parameters()) * 2 / 2**20
    model.save_pretrained(tmp_path / "large", max_shard_size="50MB")
    del model
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "tiny"), str(tmp_path / "large")],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed goes back to the system at once
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result, packed, plain = map(float, done.stdout.split())
    assert plain > 6 * layer, (plain, layer)
    print(f"result {result:.0f} MB, peak {packed:.0f} MB, of the plain model {plain:.0f} MB, layer {layer:.0f} MB")
    assert packed < result + 3 * layer < 0.6 * plain


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("int3",), "weights: got 'int3', want"),
        (("int4", 48), "group_size: got 48, want a multiple of 32 up to 256"),
    ],
)
def test_other_forms(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightsConfig(*arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"quantization_config": WeightsConfig("int4", 64)},
            "q_down_proj: got 96 input features, want a multiple of 64",
        ),
        ({"dtype": torch.float64}, "q_proj: got a weight of type Tensor, torch.float64"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, r"device_map: got \['cpu', 'disk'\], want one device"),
        ({"device_map": "auto", "max_memory": {"cpu": 60000}}, r"device_map: got \['cpu', 'disk'\], want one device"),
    ],
)
def test_loading_straight_is_refused(tmp_path, options, message):
    plain = saved(tmp_path / "plain")
    options = {"quantization_config": WeightsConfig("int4"), "offload_folder": tmp_path / "offload", **options}
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(plain, **options)


def test_other_models_are_refused(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 97}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization_config: got one for a LlamaForCausalLM, want a Sigma model"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=WeightsConfig())


UP = "model.layers.0.mlp.up_proj."


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize(
    "name, message",
    [
        ("model.norm.weight", r"with model.norm.weight of shape \[63\], want \[64\]"),
        (UP + "weight", rf"with {UP}weight of shape \[(95|2), .*\], want \[(96|3), "),
        (UP + "scales", rf"with {UP}scales of shape \[2, 2, 32\], want \[3, 2, 32\]"),
        ("model.layers.1.self_attn.k_proj.weight", r"with .*k_proj.weight of shape \[31, 64\], want \[32, 64\]"),
    ],
)
def test_weights_that_are_missing_or_of_other_shapes(tmp_path, name, message, is_packed):
    model = tiny_model()
    if is_packed:
        model.fuse_for_inference("int4")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if name not in weights:
        return
    options = {} if is_packed else {"quantization_config": WeightsConfig()}
    for value, words in ((weights[name][:-1].clone(), message), (None, f"without {name}")):
        changed = {key: x for key, x in weights.items() if key != name} | ({} if value is None else {name: value})
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=words):
            AutoModelForCausalLM.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"group_size": 64}, r"up_proj.scales of shape|lm_head.scales of shape"),
        ({"weights": "int8"}, "lm_head.weight of shape"),
        ({"weights": "int2"}, "weights: got 'int2', want"),
        ({"weights": "packed"}, "weights: got 'packed' in a configuration that was saved, want 'int8' or 'int4'"),
        ({"quant_method": "other"}, "got a checkpoint without"),
    ],
)
def test_configurations_of_other_weights(tmp_path, changes, message):
    tiny_model(q_aug_dim=128, intermediate_size=128).fuse_for_inference("int4").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_a_model_of_integers_cannot(tmp_path):
    tiny_model().fuse_for_inference("int8").save_pretrained(tmp_path / "integers")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "integers")
    with pytest.raises(RuntimeError, match="train: got a model after fuse_for_inference"):
        model.train()
    with pytest.raises(ValueError, match="tp_size: got 2, want 1: a model of weights='int8' lies in one process"):
        model._tp_size = 2
    for layers in (["o_proj"], None):
        with pytest.raises(ValueError, match=r"PackedLinear\(.*is not supported|not found in the base model"):
            peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=layers))
    with pytest.raises(ValueError, match="device_map: got .* want one device that holds all packed weights"):
        places = {"model": "cpu", "lm_head": "disk"}
        AutoModelForCausalLM.from_pretrained(tmp_path / "integers", device_map=places, offload_folder=tmp_path / "disk")
    with pytest.raises(ValueError, match="weights: got 'int4', want 'int8', which the model has already"):
        model.fuse_for_inference("int4")
    assert model.fuse_for_inference("int8") is model
    for weights in (None, "packed"):
        with pytest.raises(RuntimeError, match="save_pretrained: got a model after fuse_for_inference"):
            tiny_model().fuse_for_inference(weights).save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_weights_that_others_have_quantised_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8"))
    want = logits(model, tokens(1, 5))
    for weights in (None, "packed", "int4"):
        with pytest.raises(ValueError, match=r"q_proj: got a optimum\.quanto\..*QLinear, want a torch.nn.Linear"):
            model.fuse_for_inference(weights)
    assert not model.is_fused and torch.equal(logits(model, tokens(1, 5)), want)
    plain = tiny_model()  # as of a method whose layers pass for plain ones
    plain.quantization_method = "compressed-tensors"
    with pytest.raises(ValueError, match="got a model that compressed-tensors has quantised, want plain weights"):
        plain.fuse_for_inference("int4")
    assert not plain.is_fused


# ---------------------------------------------------------------- elsewhere


def test_without_the_compiled_library(tmp_path):
    model = tiny_model(tie_word_embeddings=True).fuse_for_inference("int4")
    model.save_pretrained(tmp_path / "integers")
    torch.save(logits(model, tokens(2, 9)), tmp_path / "want.pt")
    saved(tmp_path / "plain")
    code = """
import sys, torch, diffqkv
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder + "/integers")
ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, torch.load(folder + "/want.pt"), atol=5e-3, rtol=5e-3)
try:
    AutoModelForCausalLM.from_pretrained(folder + "/plain", quantization_config=diffqkv.WeightsConfig())
except ValueError as error:
    assert "weights: got 'int4', want None: the compiled library of diffqkv is not there" in str(error), error
else:
    raise AssertionError("weights were packed")
"""
    environment = os.environ | {"DIFFQKV_DISABLE_LIBRARY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_remote_code(tmp_path):
    model = tiny_model().fuse_for_inference("int4")
    model.save_pretrained(tmp_path / "checkpoint")
    torch.save(generate(model, tokens(2, 7)), tmp_path / "want.pt")
    load = """
        import torch
        from transformers import AutoModelForCausalLM
        folder = sys.argv[1]
        load = lambda: AutoModelForCausalLM.from_pretrained(folder + "/checkpoint", trust_remote_code=True)
    """
    refused = """
        try:
            load()
        except ValueError as error:
            assert "quantization_config: got quant_method 'diffqkv', want the package diffqkv" in str(error), error
        else:
            raise AssertionError("read without the package")
    """
    run_without_the_package(load + refused, tmp_path)
    with_the_package = """
        import diffqkv
        model = load()
        assert model.packed_weights == "int4"
        ids = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(0))
        got = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert torch.equal(got, torch.load(folder + "/want.pt"))
    """
    run_without_the_package(load + with_the_package, tmp_path, blocks=False)
