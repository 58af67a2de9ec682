"""The cost model: bytes of shapes, lines, where they cross, sums over steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffqkv import SigmaConfig
from diffqkv.study import costs
from diffqkv.study.costs import Line

SIGMA = SigmaConfig.from_preset("sigma-1.5b")


def test_elements_are_those_of_the_paper():
    standard = SigmaConfig.from_preset("sigma-1.5b", num_key_heads=16)
    assert costs.cache_elements(SIGMA) == 1280
    assert costs.cache_elements(standard) == 2048
    assert 1 - costs.cache_elements(SIGMA) / costs.cache_elements(standard) == 0.375  # eq. 15


@pytest.mark.parametrize("changes", [{}, {"q_aug_dim": None}, {"k_head_dim": 32, "k_compression": "absorbed"}])
def test_weights_are_those_of_the_modules(changes):
    import torch

    from diffqkv import SigmaModel

    config = SigmaConfig(num_hidden_layers=1, vocab_size=8, **changes)
    with torch.device("meta"):
        layer = SigmaModel(config).layers[0]
    linear = {name: m.weight.numel() for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    small = sum(size for name, size in linear.items() if "absorb" in name)
    added = {f"self_attn.q_{name}_proj" for name in ("gate", "up", "down")}
    augmented = sum(size for name, size in linear.items() if name in added)
    assert costs.augmented_q_weights(config, is_folded=False) == augmented
    assert costs.other_weights(config) == sum(linear.values()) - augmented - small
    if config.q_aug_dim:
        fused = 2 * config.q_aug_dim * config.hidden_size + config.q_aug_dim * 2048
        assert costs.augmented_q_weights(config, is_folded=True) == fused - linear["self_attn.q_proj"]


def test_bytes_of_forms():
    assert costs.weight_bytes(64, "plain", 2) == costs.weight_bytes(64, "packed", 2) == 128
    assert costs.weight_bytes(64, "int8", 2) == 64 + 2 * 2
    assert costs.weight_bytes(64, "int4", 4) == 32 + 2 * 2


def test_costs_of_a_step():
    found = costs.costs(SIGMA, "plain", 2, batch=8, bytes_per_second=1e9)
    assert found.per_token == pytest.approx(8 * 1280 * 2 / 1e9)
    assert found.augmented_q == pytest.approx(3 * 2048 * 3072 * 2 / 1e9)
    assert found.total(1000) == pytest.approx(1000 * found.per_token + found.augmented_q)


def test_the_papers_crossing_by_bytes():
    """At batch 1 in bfloat16 the weights of augmented Q weigh as much as 24,576 tokens of what GQA-16 reads more."""
    ours, theirs = (
        costs.costs(SigmaConfig.from_preset("sigma-1.5b", num_key_heads=n), "plain", 2, 1, 1e9) for n in (4, 16)
    )
    assert ours.augmented_q / (theirs.per_token - ours.per_token) == pytest.approx(24576)


@given(st.floats(1e-12, 1e-6), st.floats(1e-6, 1e-2))
def test_a_line_is_found(slope, offset):
    x = [1000, 20000, 300000, 4000000]
    found = costs.fit(x, [slope * each + offset for each in x])
    assert found.slope == pytest.approx(slope, rel=1e-3, abs=1e-13)
    assert found.offset == pytest.approx(offset, rel=1e-3, abs=1e-9)


def test_a_line_through_one_point_is_flat():
    assert costs.fit([5, 5], [1.0, 3.0]) == Line(0.0, 2.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "want"),
    [
        (Line(1, 10), Line(2, 0), 10),
        (Line(1, 0), Line(2, 0), 0),
        (Line(1, 0), Line(2, 5), 0),
        (Line(2, 5), Line(1, 0), None),
        (Line(1, 5), Line(1, 0), None),
        (Line(2, 0), Line(1, 5), None),
        (Line(1, 0), Line(1, 0), 0),
    ],
)
def test_crossover(ours, theirs, want):
    assert costs.crossover(ours, theirs) == want


def test_measured_crossover():
    contexts = [1, 100, 200, 400]
    assert costs.measured_crossover(contexts, [5, 5, 5, 5], [1, 3, 7, 9]) == 150
    assert costs.measured_crossover(contexts, [1, 1, 1, 1], [2, 2, 2, 2]) == 0
    assert costs.measured_crossover(contexts, [3, 3, 3, 3], [2, 2, 2, 2]) is None
    # Noise: below once, above again, below at last.
    assert costs.measured_crossover(contexts, [5, 1, 5, 5], [1, 3, 4, 6]) == 300


@given(st.integers(0, 5000), st.integers(1, 5000))
def test_sums_of_straight_costs_are_exact(prefix, output):
    contexts = [0, 1000, 3000, 10000]
    seconds = [1 + 2 * context for context in contexts]
    want = output + (prefix + output) ** 2 - prefix**2
    assert costs.cumulative(contexts, seconds, prefix, output) == pytest.approx(want)


def test_sums_beyond_what_was_measured_are_refused():
    with pytest.raises(ValueError, match=r"prefix \+ output: got 101, want at most 100"):
        costs.cumulative([0, 100], [1.0, 2.0], 1, 100)
