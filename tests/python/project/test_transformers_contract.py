"""What the models take from transformers besides its public names, one by one: a failure here says what has changed.

Run with the oldest and the newest release that is supported.
"""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from paths import ROOT
from tiny_sigma import (
    CACHE,
    COMPRESSIONS,
    MODEL_FILES,
    checkpoint_activations,
    logits,
    padded,
    tiny_config,
    tiny_model,
    tokens,
)
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedModel,
    cache_utils,
    masking_utils,
)
from transformers.dynamic_module_utils import get_imports, get_relative_imports
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import is_flash_attention_requested

import diffqkv
from diffqkv import _transformers
from diffqkv._version import NEWEST_TRANSFORMERS, OLDEST_TRANSFORMERS
from diffqkv.models.sigma import configuration_sigma, modeling_sigma

source = inspect.getsource


def run(script, *arguments, path=None):
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- releases


def test_the_releases_are_the_same_everywhere():
    stated = re.findall(r'"transformers>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    numbers, (major, minor) = ([int(x) for x in x.split(".")] for x in (OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS))
    assert stated == [(OLDEST_TRANSFORMERS, f"{major}.{minor + 1}")]
    assert f"release < {tuple(numbers)}" in source(configuration_sigma)
    assert f"want {OLDEST_TRANSFORMERS} or newer" in source(configuration_sigma)
    newest = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(), re.M).group(1)
    assert newest.startswith(f"{NEWEST_TRANSFORMERS}.")


@pytest.mark.parametrize("release", ["5.12.1", "4.57.6"])
def test_older_releases_leave_the_ops_and_say_what_is_missing(release):
    out = run(
        """
        import sys
        import torch
        if sys.argv[1] < "5":
            import types
            sys.modules["transformers"] = types.ModuleType("transformers")
        import transformers
        transformers.__version__ = sys.argv[1]
        import diffqkv
        gate = torch.randn(3, 8)
        assert torch.allclose(diffqkv.swiglu(gate, gate), torch.nn.functional.silu(gate) * gate, atol=1e-6)
        for name in ("Cache", "SigmaForCausalLM"):
            try:
                getattr(diffqkv, name)
            except ImportError as error:
                print(error)
        """,
        release,
    )
    lines = out.splitlines()
    assert len(lines) == 2
    for name, line in zip(("Cache", "SigmaForCausalLM"), lines, strict=True):
        assert line.startswith(f"diffqkv.{name} needs transformers {OLDEST_TRANSFORMERS} or newer: ")
    if release > "5":
        assert lines[0].endswith(f"transformers: got {release}, want {OLDEST_TRANSFORMERS} or newer")


ASK = """
import torch
import diffqkv
gate = torch.randn(3, 8)
assert torch.allclose(diffqkv.swiglu(gate, gate), torch.nn.functional.silu(gate) * gate, atol=1e-6)
assert diffqkv.flash_attention(*[torch.ones(1, 1, 1, 8)] * 3).sum() == 8
assert "Cache" not in diffqkv.__all__
for name in ("Cache", "SigmaForCausalLM"):
    try:
        getattr(diffqkv, name)
    except ImportError as error:
        print(f"{error} | {error.__cause__!r}")
assert not hasattr(diffqkv, "unknown")
diffqkv.show_config()
"""


@pytest.mark.parametrize(
    "package, error",
    [
        ("torchvision", "RuntimeError"),
        ("torchvision", "ImportError"),
        ("transformers", "OSError"),
        ("transformers.masking_utils", "AttributeError"),
    ],
)
def test_a_broken_transformers_leaves_the_ops_and_says_why(tmp_path, package, error):
    """A torchvision of another build, or transformers itself, fails to import: anywhere, with any exception."""
    breakage = f"raise {error}('operator nms does not exist')"
    if package == "torchvision":
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(breakage)
        metadata = tmp_path / "torchvision-0.1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
        script = ASK
    else:
        (tmp_path / "broken.py").write_text(breakage)
        script = f"""
import importlib.util, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {package!r}:
            return importlib.util.spec_from_file_location(name, {str(tmp_path / "broken.py")!r})
sys.meta_path.insert(0, Finder())
{ASK}"""
    out = run(script, path=tmp_path)
    lines = out.splitlines()
    for name, line in zip(("Cache", "SigmaForCausalLM"), lines, strict=False):
        message, cause = line.split(" | ")
        assert message.startswith(f"diffqkv.{name} needs transformers {OLDEST_TRANSFORMERS} or newer: "), line
        assert cause.startswith((error, "ModuleNotFoundError")), line
    assert "operator nms does not exist" in out
    assert any(line.startswith("  models      none: ") for line in lines)


def test_all_that_is_needed_of_transformers_is_tried_first():
    """Else its failure would look like one of ours."""
    package = Path(diffqkv.__file__).parent
    files = [file for folder in ("cache", "models") for file in (package / folder).rglob("*.py")]
    imported = {
        node.module.partition(".")[2]
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers.")
    }
    assert imported <= set(_transformers.NEEDED)
    assert "cache_utils" in imported and "masking_utils" in imported


def test_a_mistake_of_our_own_is_not_taken_for_one_of_transformers():
    script = """
        import sys
        import transformers
        if len(sys.argv) > 1:
            transformers.__version__ = sys.argv[1]
        transformers.AttentionInterface.register = None  # as if models/attention.py called it wrongly
        try:
            import diffqkv
        except TypeError as error:
            print(error)
        else:
            print(diffqkv._transformers.why_not())
            try:
                diffqkv.Cache
            except ImportError as error:
                print(error)
        """
    assert run(script) == "'NoneType' object is not callable\n"
    with_untested = run(script, "6.0.0").splitlines()
    assert with_untested[0] == "TypeError: 'NoneType' object is not callable"
    assert with_untested[1].startswith(f"diffqkv.Cache needs transformers {OLDEST_TRANSFORMERS} or newer: TypeError")


@pytest.mark.parametrize("release", ["5.24.7", "5.25.0.dev0"])
def test_only_an_untested_release_gives_one_warning_that_says_what_to_do(release):
    out = run(
        """
        import sys
        import warnings
        import transformers
        transformers.__version__ = sys.argv[1]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import diffqkv
            from diffqkv.models import SigmaModel
        for warning in caught:
            if "diffqkv" in str(warning.message):
                print(warning.category.__name__, warning.message)
        assert diffqkv.Cache and diffqkv.SigmaForCausalLM
        """,
        release,
    )
    if release == "5.24.7":
        assert out == ""
    else:
        (line,) = out.splitlines()
        assert line.startswith(f"UserWarning transformers: got {release}, want 5.13 to 5.24, ")
        assert "pip install 'transformers<5.25'" in line


def test_remote_code_refuses_older_releases_itself():
    out = run(
        """
        import sys
        import transformers
        transformers.__version__ = "5.9.0"
        try:
            exec(compile(open(sys.argv[1]).read(), "configuration_sigma.py", "exec"))
        except ImportError as error:
            print(error.name, error)
        """,
        configuration_sigma.__file__,
    )
    assert out == f"transformers transformers: got 5.9.0, want {OLDEST_TRANSFORMERS} or newer\n"


# ---------------------------------------------------------------- caches and masks


def test_static_layers_take_k_and_v_of_their_own_widths():
    initialise = source(cache_utils.StaticLayer.lazy_initialization)
    assert "k_head_dim" in initialise and "v_head_dim" in initialise


def test_caches_have_the_methods_that_ours_has():
    names = ["update", "get_seq_length", "get_max_length", "get_mask_sizes", "crop", "reorder_cache", "reset"]
    names += ["batch_repeat_interleave", "batch_select_indices", "early_initialization", "offload", "prefetch"]
    names += ["batch_size", "is_initialized", "is_compileable", "is_sliding"]
    assert not [name for name in names if not hasattr(cache_utils.Cache, name)]
    layer = ["lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "get_max_length"]
    assert not [name for name in layer if not hasattr(cache_utils.CacheLayerMixin, name)]
    # Else transformers has a new one that ours may have to answer.
    abstract = cache_utils.CacheLayerMixin.__abstractmethods__
    assert abstract <= set(layer)


def test_a_name_without_a_mask_function_gets_no_mask():
    assert "_global_mapping" in source(masking_utils._preprocess_mask_arguments)
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["diffqkv"] is diffqkv.models.mask.diffqkv_mask
    assert AttentionInterface._global_mapping["diffqkv"] is diffqkv.models.attention.diffqkv_attention


def test_padding_is_lost_without_a_mask_function():
    model = tiny_model()
    ids, mask = padded([9, 5], "left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    alone = logits(model, ids[1:, 4:])[0]
    AttentionInterface.register("ours-without-mask", AttentionInterface._global_mapping["diffqkv"])
    try:
        errors = {}
        for attention in ("diffqkv", "ours-without-mask"):
            model.set_attn_implementation(attention)
            got = logits(model, ids, attention_mask=mask, position_ids=positions)[1, 4:]
            errors[attention] = (got - alone).abs().max()
    finally:
        del AttentionInterface._global_mapping["ours-without-mask"]
    assert errors["diffqkv"] < 1e-4 and errors["ours-without-mask"] > 0.1


@pytest.mark.parametrize("cached", [0, 3])
def test_a_mask_of_ours_passes_through_create_causal_mask(cached):
    """With a static cache, generate makes the mask before the forward pass, which makes it again."""
    config = tiny_model().config
    cache = cache_utils.DynamicCache()
    if cached:
        for layer in range(config.num_hidden_layers):
            cache.update(torch.zeros(2, 2, cached, 16), torch.zeros(2, 2, cached, 32), layer)
    _, mask = padded([9, 5], "left")
    arguments = {"config": config, "inputs_embeds": torch.zeros(2, 9 - cached, 64), CACHE: cache}
    once = masking_utils.create_causal_mask(**arguments, attention_mask=mask)
    assert once.dtype == torch.int32 and once.dim() == 4
    assert masking_utils.create_causal_mask(**arguments, attention_mask=once) is once


def test_generate_asks_the_model_for_its_cache():
    signature = inspect.signature(GenerationMixin._prepare_cache_for_generation)
    assert (
        signature.parameters.keys()
        == inspect.signature(diffqkv.SigmaForCausalLM._prepare_cache_for_generation).parameters.keys()
    )
    assert hasattr(GenerationMixin, "_get_static_cache_init_shape")
    assert "_get_static_cache_init_shape" in source(GenerationMixin._prepare_static_cache)


# ---------------------------------------------------------------- the model class


def test_conventions_of_the_class():
    model = tiny_model()
    for flag in ("flash_attn", "sdpa", "flex_attn", "attention_backend"):
        assert getattr(model, f"_supports_{flag}") is True
    assert model._can_compile_fullgraph and model.supports_gradient_checkpointing and model.can_generate()
    assert model._can_set_attn_implementation()
    assert type(model)._no_split_modules == ["SigmaDecoderLayer"]
    assert isinstance(model.model.layers[0], GradientCheckpointingLayer)
    assert type(model)._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not model._is_stateful
    assert hasattr(PreTrainedModel, "get_correct_attn_implementation")  # where ours makes "diffqkv" the default
    assert hasattr(PreTrainedModel, "_tp_size")  # which transformers sets before it shards, and ours checks
    # Declared, it would be filled by transformers, with a warning.
    assert "cache_position" not in inspect.signature(type(model).forward).parameters
    assert {"logits_to_keep", "inputs_embeds"} <= inspect.signature(type(model).forward).parameters.keys()
    assert diffqkv.SigmaConfig.keys_to_ignore_at_inference == ["cache", "past_key_values"]
    assert "get_interface(" in source(modeling_sigma) and "eager_attention_forward" in source(modeling_sigma)


@pytest.mark.parametrize("compression", [None, "absorbed"])
def test_weights_that_no_checkpoint_has_are_initialised(compression):
    torch.manual_seed(0)
    want = tiny_model(k_compression=compression)
    with torch.device("meta"):
        model = diffqkv.SigmaForCausalLM(tiny_config(k_compression=compression))
    model.to_empty(device="cpu")
    for x in (*model.parameters(), *model.buffers()):
        x.data.fill_(float("nan"))
    for module in model.modules():
        module._is_hf_initialized = False
    for x in (*model.parameters(), *model.buffers()):
        x._is_hf_initialized = False
    torch.manual_seed(0)
    model.init_weights()
    assert all(torch.isfinite(x).all() for x in (*model.parameters(), *model.buffers()))
    for (name, got), x in zip(model.named_parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(got.std(), x.std(), atol=0.03, rtol=0.3, msg=name)
    assert torch.equal(model.model.rotary_emb.inv_freq, want.model.rotary_emb.inv_freq)
    assert torch.equal(model.model.rotary_emb.original_inv_freq, want.model.rotary_emb.inv_freq)


def test_loaded_weights_are_not_initialised_again(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = diffqkv.SigmaForCausalLM.from_pretrained(tmp_path)
    loaded.init_weights()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_tuples_and_captured_outputs():
    model = tiny_model()
    ids = tokens(1, 5)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, use_cache=False)
        plain = model(ids, output_hidden_states=True, use_cache=False, return_dict=False)
    assert type(plain) is tuple and torch.equal(plain[0], out.logits)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)


def test_logits_to_keep():
    model = tiny_model()
    ids = tokens(2, 7)
    with torch.no_grad():
        every = model(ids).logits
        for keep, want in (
            (0, every),
            (1, every[:, -1:]),
            (3, every[:, -3:]),
            (torch.tensor([0, 4]), every[:, [0, 4]]),
            (torch.tensor([[1, 2], [6, 0]]), torch.stack([every[0, [1, 2]], every[1, [6, 0]]])),
            (ids > 40, every[ids > 40]),
        ):
            torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, want)


def test_names_of_attention_functions():
    model = tiny_model()
    for make in (model.set_attn_implementation, lambda name: tiny_model(attn_implementation=name)):
        with pytest.raises(ValueError, match="attn_implementation=.*nonsense.* is not supported"):
            make("nonsense")
    # A name with "flash" in it would be told of packed rows and masks as FlashAttention is.
    assert model.config._attn_implementation == "diffqkv"
    assert not is_flash_attention_requested(model.config)
    request = inspect.signature(PreTrainedModel.get_correct_attn_implementation).parameters
    assert request.keys() == inspect.signature(type(model).get_correct_attn_implementation).parameters.keys()


def test_loss_over_accumulated_batches():
    """Trainer divides by the tokens of all batches of a step, in models whose forward pass takes any argument."""
    model = tiny_model()
    ids = tokens(2, 9)
    with torch.no_grad():
        mean, shared = (model(ids, labels=ids, **options).loss for options in ({}, {"num_items_in_batch": 40}))
    torch.testing.assert_close(shared, mean * 16 / 40)


@pytest.mark.parametrize("given", [False, True])
def test_recomputed_layers_write_no_cache(given):
    """They would write each token twice; transformers takes the cache from them."""
    ids, gradients = tokens(2, 9), []
    for recompute in (False, True):
        model = tiny_model().train()
        if recompute:
            checkpoint_activations(model)
        cache = diffqkv.Cache(model.config) if given and recompute else None
        out = model(ids, labels=ids, cache=cache, use_cache=recompute)
        out.loss.backward()
        gradients.append([x.grad for x in model.parameters()])
        assert cache is None or cache.get_seq_length() == 0
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_flex_attention(compression):
    model = tiny_model((12, 4, 6), k_compression=compression)
    ids, mask = padded([9, 5], "left")
    want = logits(model, ids, attention_mask=mask, use_cache=False)[mask.bool()]
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # what is compiled is torch's
        got = logits(model, ids, attention_mask=mask, use_cache=False)[mask.bool()]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_stock_attentions_get_equal_heads_and_dimensions():
    seen = []

    def probe(module, query, key, value, attention_mask, **kwargs):
        assert kwargs.pop("of_the_caller") == 1
        seen.append((query.shape[1:], key.shape[1:], value.shape[1:], module.num_key_value_groups))
        return modeling_sigma.eager_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("probe", probe)
    masking_utils.AttentionMaskInterface.register("probe", masking_utils.eager_mask)
    try:
        for heads, shared in (((8, 2, 4), 4), ((8, 4, 2), 4), ((12, 4, 6), 12)):
            for compression in (None, "expand", "absorbed"):
                model = tiny_model(heads, k_compression=compression)
                want = model(tokens(2, 5), use_cache=False).logits
                model.set_attn_implementation("probe")
                got = model(tokens(2, 5), of_the_caller=1).logits
                torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
                shapes = (heads[0], 5, 16), (shared, 5, 16), (shared, 5, 16), heads[0] // shared
                assert seen == [shapes] * 2
                seen.clear()
    finally:
        del AttentionInterface._global_mapping["probe"]
        del masking_utils.AttentionMaskInterface._global_mapping["probe"]


# ---------------------------------------------------------------- Auto classes


AUTO = {
    AutoModel: diffqkv.SigmaModel,
    AutoModelForCausalLM: diffqkv.SigmaForCausalLM,
    AutoModelForSequenceClassification: diffqkv.SigmaForSequenceClassification,
    AutoModelForTokenClassification: diffqkv.SigmaForTokenClassification,
    AutoModelForQuestionAnswering: diffqkv.SigmaForQuestionAnswering,
}


def test_registering_again_is_safe():
    importlib.reload(diffqkv.models.sigma)
    assert AutoModelForCausalLM._model_mapping[diffqkv.SigmaConfig] is diffqkv.SigmaForCausalLM


def test_the_copied_files_need_nothing_but_each_other():
    """save_pretrained copies what it finds by pattern, and from_pretrained wants every other import installed."""
    files = {Path(name).stem for name in MODEL_FILES}
    for name in files:
        module = importlib.import_module(f"diffqkv.models.sigma.{name}")
        imports = files - {name} if module is modeling_sigma else set()
        assert set(get_relative_imports(module.__file__)) == imports
        assert not set(get_imports(module.__file__)) & {"diffqkv", "sigma"}
        assert not re.search(r"^\s*from \.(\.| import)", source(module), re.M)  # such imports it does not understand


@pytest.mark.parametrize("auto, model_class", AUTO.items(), ids=lambda x: x.__name__)
def test_auto_classes(auto, model_class, tmp_path):
    assert type(auto.from_config(tiny_config())) is model_class
    tiny_model().save_pretrained(tmp_path)
    assert type(auto.from_pretrained(tmp_path)) is model_class
    assert not hasattr(transformers, "SigmaConfig")  # the day it has one, names must be settled
