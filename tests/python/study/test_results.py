"""From samples to numbers: a machine whose costs are known gives the tables, crossings and tests that follow."""

import pytest
import torch

from diffqkv import SigmaConfig
from diffqkv.study import report
from diffqkv.study.measure import Size, ladder
from diffqkv.study.results import hidden_share, parts, results
from diffqkv.study.run import Recipe
from diffqkv.study.systems import chosen

CONFIG = SigmaConfig.from_preset("sigma-1.5b")
SIZE = Size(torch.bfloat16, 1)
PER_ELEMENT, AUGMENTED, CACHE, REST = 2e-10, 1e-3, 1e-5, 4e-3  # seconds, of a layer
READ = 2 / PER_ELEMENT


def recipe(*names):
    return Recipe(CONFIG, 1, chosen(names, CONFIG), [SIZE], (0, 2048, 4096), (2048, 4096), torch.device("cpu"))


def seconds_of(system, context):
    attention = PER_ELEMENT * context * (2048 if system.name.startswith("std") else 1280)
    seconds = {"kv_cache": CACHE, "attention": attention, "augmented_q": AUGMENTED, "layers_rest": REST}
    return seconds | {"step": sum(seconds.values())}


def samples(study, rounds=5, noise=0.0):
    generator = torch.Generator().manual_seed(0)
    found = []
    for system in study.systems:
        what = {"system": system.name, **SIZE.keys}
        facts = {"time": 0.0, "cpu_elsewhere": 0.01, "read_bytes_per_s": READ}
        for context in ladder(study.prefixes, study.outputs):
            for _ in range(rounds):
                factor = 1 + noise * torch.randn((), generator=generator).item()
                seconds = {name: factor * x for name, x in seconds_of(system, context).items()}
                found.append({"kind": "step", "context": context, "seconds": seconds, **what, **facts})
        prefix, output = 2048, 2048
        summed = {name: 0.0 for name in seconds_of(system, 1)}
        for context in range(prefix, prefix + output):
            summed = {name: x + seconds_of(system, context)[name] for name, x in summed.items()}
        found.append({"kind": "generate", "prefix": prefix, "output": output, "seconds": summed, **what})
        ops = {"diffqkv::decode_attention": 10 * seconds_of(system, 2048)["attention"]}
        found += [{"kind": "ops", "prefix": 2048, "output": 10, "seconds": ops, **what}] * 3
    return found


def rows(found, table, **what):
    return [row for row in found[table] if all(row[name] == value for name, value in what.items())]


def test_a_machine_that_reads_at_one_rate():
    study = recipe("sigma", "std")
    found = results(study, samples(study), [])

    for row in rows(found, "steps"):
        assert row["samples"] == 5
        assert row["attention"]["median"] == pytest.approx(
            26 * PER_ELEMENT * row["context"] * found["described"][row["system"]]["elements"]
        )
        assert row["attention"]["spread"] == pytest.approx(0, abs=1e-12)

    # Sums: of all layers, from prefix to prefix + output.
    (ours,) = rows(found, "ceet", system="sigma", prefix=2048, output=4096)
    tokens = sum(range(2048, 2048 + 4096))
    assert ours["seconds"]["attention"] == pytest.approx(26 * PER_ELEMENT * 1280 * tokens, rel=1e-3)
    assert ours["seconds"]["augmented_q"] == pytest.approx(26 * 4096 * AUGMENTED)
    assert ours["improvement"]["attention"] == pytest.approx(0.375)
    assert ours["improvement"]["kv_cache"] == pytest.approx(0)
    (theirs,) = rows(found, "ceet", system="std", prefix=2048, output=4096)
    assert "improvement" not in theirs
    # Attached to the standard model and not counted.
    parts_of_total = theirs["seconds"]["attention"] + theirs["seconds"]["kv_cache"]
    assert theirs["seconds"]["total"] == pytest.approx(parts_of_total)
    assert len(rows(found, "ceet")) == 2 * 3 * 2

    for row in rows(found, "validation"):
        assert row["error"] == pytest.approx(dict.fromkeys(row["error"], 0), abs=1e-3)
    (ket,) = rows(found, "ops", system="sigma")
    assert ket["improvement"] == pytest.approx(0.375)
    assert ket["attention"]["median"] == pytest.approx(26 * 10 * PER_ELEMENT * 1280 * 2048)

    (both,) = rows(found, "lines", name="sigma and std")
    assert both["alpha"] == pytest.approx(26 * PER_ELEMENT) == both["alpha_of_reading"]
    assert both["beta"] == pytest.approx(26 * CACHE)
    assert both["worst_error"] < 1e-6

    # Equal where augmented Q costs as much as the K that is not read: at 6510 tokens, measured up to 8192.
    want = AUGMENTED / (PER_ELEMENT * 768)
    (crossing,) = rows(found, "crossovers")
    assert crossing["measured"] == pytest.approx(want)
    assert crossing["fitted"] == pytest.approx(want)
    assert crossing["by_bytes"] == pytest.approx(3 * 2048 * 3072 / 768)


def test_the_test_of_augmented_q():
    study = recipe("sigma")
    (same,) = results(study, samples(study, noise=0.05), [])["tests"]
    assert same["n"] == 5 * len(ladder(study.prefixes, study.outputs))
    assert same["p"] > 0.05
    slower = [
        {**s, "seconds": {**s["seconds"], "augmented_q": 1.1 * s["seconds"].get("augmented_q", 0)}}
        if s["system"] == "sigma"
        else s
        for s in samples(study, noise=0.05)
    ]
    (differs,) = results(study, slower, [])["tests"]
    assert differs["p"] < 0.01 and differs["t"] < 0


def test_folded_augmented_q_gets_its_share_of_the_fused_product():
    study = recipe("sigma-int8")
    system = study.systems[0]
    seconds = {"kv_cache": 0.0, "attention": 0.0, "augmented_q": 1.0, "layers_rest": 10.0, "step": 11.0}
    found = parts(seconds, system, hidden_share(system, study))
    # Gate and up read the hidden state; q_proj is gone.
    more = 2 * 2048 * 3072 - 2048 * 2048
    others = 2048 * (2 * 2048 + 1280 + 3 * 6144)
    assert found["augmented_q"] == pytest.approx(1.0 + 10.0 * more / (others + more))
    assert found["total"] == pytest.approx(found["augmented_q"])
    assert found["step"] == 11.0


def test_points_beyond_the_measured_contexts_are_left_out():
    study = recipe("sigma")
    short = [s for s in samples(study) if s.get("context", 0) <= 4096]
    found = results(study, short, ["batch 1: contexts 8,192, for lack of time"])
    assert {(row["prefix"], row["output"]) for row in found["ceet"]} == {(0, 2048), (0, 4096), (2048, 2048)}
    assert found["crossovers"][0]["measured"] is None  # not up to there
    text = report.text(found, [], "matplotlib is missing")
    for part in ("contexts 8,192, for lack of time", "not up to 4,096", "No figures: matplotlib is missing"):
        assert part in text


def test_nothing_measured_makes_a_report():
    study = recipe("sigma")
    found = results(study, [], [])
    assert all(found[name] == [] for name in ("steps", "ceet", "validation", "ops", "tests"))
    assert "# Efficiency study" in report.text(found, [], None)


def test_report_has_the_papers_numbers_beside_ours():
    study = recipe("sigma", "std")
    text = report.text(results(study, samples(study), []), [], None)
    (row,) = [line for line in text.splitlines() if line.startswith("| 2k ") and "sigma" in line]
    assert "+37.5%" in row and "+1.4%" in row  # Table 8
    assert "total -40.1%" in text  # section 3.3.2, prefix 0 and output 2k
    assert "1 of 26 layers" in text
