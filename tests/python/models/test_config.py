"""SigmaConfig: presets, derived fields, errors that name the field."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_sigma import tiny_config
from transformers import CONFIG_MAPPING, AutoConfig

from diffqkv import SigmaConfig, SigmaModel
from diffqkv.models import PRESETS


def test_default_is_sigma_1_5b():
    default, preset = SigmaConfig().to_dict(), SigmaConfig.from_preset("sigma-1.5b").to_dict()
    assert default == preset
    assert (default["num_attention_heads"], default["num_key_heads"], default["num_value_heads"]) == (32, 4, 16)
    assert (default["head_dim"], default["q_aug_dim"], default["rope_parameters"]["rope_theta"]) == (64, 3072, 50000.0)


def test_sigma_10b_is_table_7():
    config = SigmaConfig.from_preset("sigma-10b")
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (32, 4096, 14336)
    assert (config.q_aug_dim, config.head_dim, config.vocab_size) == (6144, 128, 128256)
    assert config.rope_parameters["rope_theta"] == 500000.0


@pytest.mark.parametrize(("name", "billions"), [("sigma-1.5b", 1.5), ("sigma-10b", 10.0), ("table1-gqa16", 1.0)])
def test_presets_have_the_size_of_their_name(name, billions):
    with torch.device("meta"):
        model = SigmaModel(SigmaConfig.from_preset(name))
    # Embeddings apart: Table 7 does not say whether they are tied, and they are 0.26 of the small model's billions.
    parameters = sum(parameter.numel() for parameter in model.layers.parameters()) / 1e9
    assert billions * 0.9 < parameters < billions * 1.2


# Rows of each table: number of models, and the smallest and largest cache in elements per token and layer (eq. 14).
@pytest.mark.parametrize(
    ("table", "rows", "smallest", "largest"),
    [
        (1, 9, (1 + 4) * 64, 64 * 64),
        (2, 6, 4 * 32 + 4 * 64, 64 * 64),
        (3, 6, 8 * 64, 64 * 64),
        (4, 8, 8 * 64, 64 * 64),
        (5, 9, 32 * 64, 32 * 64),
        (6, 5, 4 * 32 + 16 * 64, 32 * 64),
    ],
)
def test_every_row_of_the_ablation_tables_has_a_preset(table, rows, smallest, largest):
    configs = [SigmaConfig.from_preset(name) for name in PRESETS if name.startswith(f"table{table}-")]
    assert len(configs) == rows
    elements = [c.num_key_heads * c.k_head_dim + c.num_value_heads * c.head_dim for c in configs]
    assert (min(elements), max(elements)) == (smallest, largest)
    assert all((c.num_hidden_layers, c.hidden_size, c.num_attention_heads) == (22, 2048, 32) for c in configs)


def test_table_rows_in_detail():
    top100 = SigmaConfig.from_preset("table3-gqa16-top100")
    assert (top100.selective_v_top_k, top100.selective_v_tail) == (100, "drop")
    both = SigmaConfig.from_preset("table5-augf3-augq")
    assert (both.intermediate_size, both.q_aug_dim) == (5632 + 3 * 3072, 3072)
    all_three = SigmaConfig.from_preset("table6-augq-k4-half-k-dim")
    assert (all_three.num_key_heads, all_three.k_head_dim, all_three.k_compression) == (4, 32, "expand")


def test_preset_overrides_do_not_change_the_preset():
    config = SigmaConfig.from_preset("sigma-1.5b", num_hidden_layers=2)
    config.rope_parameters["rope_theta"] = 1.0
    assert config.num_hidden_layers == 2
    assert SigmaConfig.from_preset("sigma-1.5b").rope_parameters["rope_theta"] == 50000.0
    with pytest.raises(ValueError, match=r"name: got 'sigma-2b', want one of sigma-1.5b"):
        SigmaConfig.from_preset("sigma-2b")


@pytest.mark.parametrize("heads, groups", [((32, 4, 16), 4), ((32, 16, 4), 4), ((12, 4, 6), 2), ((8, 8, 8), 8)])
def test_num_key_value_heads_is_the_number_of_groups(heads, groups):
    config = tiny_config(heads)
    assert config.num_key_value_heads == groups
    config.num_key_value_heads = groups  # tools assign what they have read
    with pytest.raises(ValueError, match=f"num_key_value_heads: got 1, want {groups}, the greatest common divisor"):
        config.num_key_value_heads = 1


def test_k_dimensions():
    assert tiny_config().k_head_dim == 16
    expand, absorbed = tiny_config(k_compression="expand"), tiny_config(k_compression="absorbed", k_head_dim=4)
    assert (expand.k_head_dim, expand.attention_head_dim) == (8, 16)
    assert (absorbed.k_head_dim, absorbed.attention_head_dim) == (4, 4)


def test_selective_v_per_layer():
    options = {"tail": "drop", "max_error": None, "keep_first": 0, "keep_last": 0}
    assert tiny_config().selective_v() == [None, None]
    assert tiny_config(selective_v_top_k=7).selective_v() == [{"top_k": 7, **options}] * 2
    config = tiny_config(selective_v_top_k=[0, 5], selective_v_tail="mean", selective_v_keep_last=2)
    options |= {"tail": "mean", "keep_last": 2}
    assert config.selective_v() == [None, {"top_k": 5, **options}]
    assert config.selective_v({"max_error": 0.5}) == [None, {"top_k": 5, **options, "max_error": 0.5}]
    assert config.selective_v({"top_k": 3, "tail": "renorm"}) == [{"top_k": 3, **options, "tail": "renorm"}] * 2
    assert config.selective_v({"top_k": None}) == [None, None]
    assert config.selective_v() == [None, {"top_k": 5, **options}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "selective_v_top_k: got 0, want an integer >= 1"),
        ({"top_k": True}, "selective_v_top_k: got True"),
        ({"top_k": [1]}, r"selective_v_top_k: got \[1\], want a list of one number per layer \(2\)"),
        ({"top_k": [1, -1]}, r"selective_v_top_k: got \[1, -1\], want integers >= 0"),
        ({"top_k": 2, "tail": None}, "selective_v_tail: got None"),
        ({"top_k": 2, "max_error": -1.0}, "selective_v_max_error: got -1.0"),
        ({"top_k": 2, "max_error": float("nan")}, "selective_v_max_error: got nan"),
        ({"top_k": 2, "keep_first": -1}, "selective_v_keep_first: got -1"),
        ({"top_k": 2, "keep_last": 0.5}, "selective_v_keep_last: got 0.5"),
        ({"topk": 2}, r"selective_v: got \['topk'\], want some of top_k, tail"),
    ],
)
def test_what_a_call_may_select(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config().selective_v(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_heads": None}, "num_key_heads: got None"),
        ({"num_value_heads": None}, "num_value_heads: got None"),
        ({"num_attention_heads": None}, "num_attention_heads: got None"),
        ({"num_key_heads": 0}, "num_key_heads: got 0"),
        ({"num_key_heads": 3}, r"num_key_heads: got 3, want a divisor of num_attention_heads \(8\)"),
        ({"num_value_heads": 5}, "num_value_heads: got 5, want a divisor"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: got 4, want 2"),
        ({"head_dim": 15}, "head_dim: got 15, want a positive even"),
        ({"head_dim": None, "hidden_size": 60}, "hidden_size: got 60, want a multiple"),
        ({"k_head_dim": 8}, "k_head_dim: got 8 without k_compression"),
        ({"k_compression": "half"}, "k_compression: got 'half', want"),
        ({"k_compression": "expand", "k_head_dim": 7}, "k_head_dim: got 7, want a positive even"),
        ({"k_compression": "expand", "k_head_dim": 32}, "k_head_dim: got 32, want at most"),
        ({"q_aug_dim": 0}, "q_aug_dim: got 0"),
        ({"selective_v_top_k": [1, 2, 3]}, r"selective_v_top_k: got \[1, 2, 3\], want a list of one number per"),
        ({"selective_v_top_k": -1}, "selective_v_top_k: got -1"),
        ({"selective_v_top_k": 0}, "selective_v_top_k: got 0, want an integer >= 1"),
        ({"selective_v_top_k": [4, -1]}, r"selective_v_top_k: got \[4, -1\], want integers >= 0"),
        ({"selective_v_max_error": -0.5}, "selective_v_max_error: got -0.5, want a number >= 0"),
        ({"selective_v_keep_first": -1}, "selective_v_keep_first: got -1"),
        ({"selective_v_tail": "keep"}, "selective_v_tail: got 'keep'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: got 0"),
        ({"sliding_window": 64}, "sliding_window: got 64, want None"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: got 'sliding_attention', want"),
        ({"model_type": "llama"}, "model_type: got 'llama', want 'sigma_diffqkv'"),
        ({"model_type": "sigma"}, "model_type: got 'sigma', want 'sigma_diffqkv'"),
        ({"n_routed_experts": 8}, "n_routed_experts: got a field of Sigma-MoE"),
        ({"moe_intermediate_size": 8}, "moe_intermediate_size: got a field of Sigma-MoE"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters: got partial_rotary_factor=0.5",
        ),
    ],
)
def test_errors_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_wrong_types_are_refused():
    with pytest.raises(StrictDataclassError, match="num_key_heads"):
        tiny_config(num_key_heads="4")
    config = tiny_config()
    with pytest.raises(StrictDataclassError, match="num_key_heads"):
        config.num_key_heads = "4"
    assert config.num_key_heads == 2


def test_the_number_of_groups_is_said_by_nobody_else():
    config = tiny_config(num_key_value_heads=2)  # as files of other tools may
    assert config.num_key_value_heads == 2
    # A file would make it an attribute, which it cannot be; an alias would let one of two counts be set unseen.
    assert "num_key_value_heads" not in config.to_dict()
    assert not SigmaConfig.attribute_map


def test_rope_by_its_older_names():
    assert tiny_config().rope_parameters == {"rope_type": "default", "rope_theta": 50000.0}
    assert tiny_config(rope_theta=123.0).rope_parameters == {"rope_type": "default", "rope_theta": 123.0}
    scaled = tiny_config(rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert scaled.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0}
    with pytest.raises(AttributeError):
        _ = scaled.rope_theta


def test_sigma_is_the_name_of_another_model(tmp_path):
    assert SigmaConfig.model_type == "sigma_diffqkv" and "sigma_diffqkv" in CONFIG_MAPPING
    assert "sigma" not in CONFIG_MAPPING
    (tmp_path / "config.json").write_text('{"model_type": "sigma", "num_attention_heads": 8, "n_routed_experts": 8}')
    with pytest.raises(ValueError, match="sigma"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="n_routed_experts: got a field of Sigma-MoE"):
        SigmaConfig.from_pretrained(tmp_path)


def test_json_round_trip(tmp_path):
    config = tiny_config((12, 4, 6), k_compression="absorbed", selective_v_top_k=[3, 0], selective_v_tail="mean")
    config.save_pretrained(tmp_path)
    for loaded in (SigmaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is SigmaConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()


def test_a_llama_config_is_not_taken_for_sigma(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 8, "hidden_size": 64}')
    with pytest.raises(ValueError, match="model_type: got 'llama'"):
        SigmaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("missing", ["num_attention_heads", "num_key_heads", "num_value_heads"])
def test_a_saved_configuration_without_a_head_count_is_refused(tmp_path, missing):
    SigmaConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields[missing]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"^{missing}: got none"):
        AutoConfig.from_pretrained(tmp_path)
