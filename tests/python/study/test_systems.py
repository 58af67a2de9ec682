"""The systems of a shape, and shapes from the command line."""

import pytest

from diffqkv import SigmaConfig
from diffqkv.study.costs import cache_elements
from diffqkv.study.systems import MAIN, chosen, configuration, systems_of

SIGMA = SigmaConfig.from_preset("sigma-1.5b")


def test_systems_of_sigma():
    systems = systems_of(SIGMA)
    heads = {name: system.config(SIGMA, 2) for name, system in systems.items()}
    assert {name: cache_elements(config) for name, config in heads.items()} == {
        **dict.fromkeys(("sigma", "group-sharing", "selective-v"), 1280),
        **dict.fromkeys(("std", "std-stock"), 2048),
        **dict.fromkeys(("half-k-absorbed", "half-k-expand"), 1152),
        **{f"{name}-{form}": n for form in ("packed", "int8", "int4") for name, n in (("sigma", 1280), ("std", 2048))},
    }
    for name, config in heads.items():
        assert config.num_hidden_layers == 2
        assert config.q_aug_dim == 3072  # attached to the standard model, too
        assert (config.selective_v_top_k == 100) == (name == "selective-v")
        assert systems[name].counts_augmented_q != name.startswith("std")
        if name.endswith("expand"):
            assert config.k_compression == "expand"
    assert SIGMA.num_hidden_layers == 26


def test_baselines_come_along():
    names = [system.name for system in chosen(["sigma-int8", "group-sharing"], SIGMA)]
    assert names == ["sigma-int8", "std-int8", "group-sharing", "std-stock"]
    assert {system.name for system in chosen(None, SIGMA)} == set(MAIN)


def test_a_shape_that_groups_do_not_divide_has_no_integers():
    odd = configuration("sigma-1.5b", "5/1/5", "8/8")
    names = [system.name for system in chosen(None, odd)]
    assert [name for name in names if "int" in name] == [] and "sigma-packed" in names
    with pytest.raises(ValueError, match="--systems: got 'sigma-int4', want some of"):
        chosen(["sigma-int4"], odd)


def test_unknown_systems_are_refused():
    with pytest.raises(ValueError, match="--systems: got 'flash', want some of sigma, std"):
        chosen(["flash"], SIGMA)


def test_a_shape_with_half_k_has_no_halves():
    half = configuration("sigma-1.5b", None, "32/64")
    assert (half.k_head_dim, half.head_dim, half.k_compression) == (32, 64, "absorbed")
    assert not any("half" in name for name in systems_of(half))
    assert systems_of(half)["std"].config(half, 1).k_head_dim == 64


def test_configurations(tmp_path):
    assert configuration("sigma-10b").hidden_size == 4096
    config = configuration("sigma-1.5b", "16/2/8", "64/128")
    got = [getattr(config, f"num_{side}_heads") for side in ("attention", "key", "value")]
    assert (got, config.k_head_dim, config.head_dim) == ([16, 2, 8], 64, 128)
    SIGMA.save_pretrained(tmp_path)
    assert configuration(str(tmp_path)).to_dict() == SIGMA.to_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sigma-2b",), "--config: got 'sigma-2b', want a folder with config.json, or one of sigma-1.5b"),
        (("sigma-1.5b", "32/4"), "--heads: got '32/4', want positive integers n_q/n_k/n_v"),
        (("sigma-1.5b", "32/4/x"), "--heads: got '32/4/x'"),
        (("sigma-1.5b", "32/0/16"), "--heads: got '32/0/16'"),
        (("sigma-1.5b", "32/5/16"), "num_key_heads: got 5"),
        (("sigma-1.5b", None, "64"), "--dims: got '64'"),
        (("sigma-1.5b", None, "64/32"), "--dims: got 64/32, want d_k at most d_v"),
    ],
)
def test_bad_shapes_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        configuration(*arguments)
