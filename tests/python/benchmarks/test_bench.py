"""`python -m diffqkv bench` on tiny sizes: what it prints and writes, and that a wrong result gets no ratio."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_sigma import tiny_config

import diffqkv
from diffqkv import reference
from diffqkv.__main__ import main
from diffqkv.benchmarks.common import peers, targets, timing
from diffqkv.benchmarks.common.accuracy import difference, distance
from diffqkv.benchmarks.common.inputs import as_caches
from diffqkv.benchmarks.common.line import DISTURBED, MEASURED, Contenders, cells, measure
from diffqkv.benchmarks.common.timing import Clock, Elsewhere, Timing, interleaved
from diffqkv.benchmarks.cpu import layer, llama_cpp, models
from diffqkv.benchmarks.cpu.cases import CASES, model_decode, model_training
from diffqkv.benchmarks.cpu.report import markdown
from diffqkv.benchmarks.cpu.targets import TARGETS

pytestmark = pytest.mark.usefixtures("library")
TINY = ["--tokens", "256", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setattr(timing, "POOL_BYTES", 1 << 20)
    monkeypatch.setattr(layer.CLOCK, "pool_bytes", 1 << 20)
    monkeypatch.setattr(models, "sigma_config", tiny_config)
    monkeypatch.setattr(llama_cpp, "has_peer", lambda dtype: False)
    monkeypatch.setattr(model_training, "LARGE", model_training.SMALL)
    model_decode._pool.cache_clear()
    model_decode.models_of.cache_clear()
    model_training._steps.cache_clear()


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "diffqkv", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def split(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_every_case(tmp_path, capsys, threads):
    threads(2)
    numbers, table = tmp_path / "run.json", tmp_path / "run.md"
    assert main(["bench", *TINY, "--threads", "1", "--json", str(numbers), "--markdown", str(table)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.md"]

    run = json.loads(numbers.read_text())
    facts, lines = run["machine"], run["lines"]
    assert facts["threads"] == 1 and facts["torch"] == torch.__version__ and facts["diffqkv"] == diffqkv.__version__
    assert {"date", "cpu", "cpu_family", "cpu_isa", "cores", "commit", "python"} <= facts.keys()
    shapes = [(x["case"], x["tokens"], x["batch"], x["prompt"], x["weights"], x["dtype"]) for x in lines]
    assert len(set(shapes)) == len(shapes) == 2 * (1 + 2 + 2 + 1 + 1 + 1 + 3 + 1 + 6 + 3 + 2)
    assert {shape[0] for shape in shapes} == set(CASES)
    for line in lines:
        assert line["correct"] and line["tokens"] == 256
        assert line["ms"].keys() == line["spread_ms"].keys() and line["ms"]["ours"] > 0
        assert 0 <= line["cpu_elsewhere"]
        assert all(ratio > 0 for ratio in line["ratios"].values())
        for column, target in line["targets"].items():
            bound = targets.Bound(target["sign"], target["value"])
            disturbed = line["cpu_elsewhere"] > DISTURBED
            assert target["reached"] is (None if disturbed else bound.reached_by(line["ratios"][column]))
        if line["case"] in ("call_overhead", "model_training"):
            assert line["rate"] is line["limit"] is None
        else:
            assert line["limit"]["per_second"] > 0 and line["rate"]["unit"] == line["limit"]["unit"]
        if line["case"] == "model_decode":
            stock = {"Llama, GQA-16"} if line["weights"] == "packed" else set()
            assert line["ratios"].keys() == {"of limit", "Sigma / own GQA-16", "no augmented Q", *stock}
            assert line["figures"]["tokens/s"].keys() == {"ours", "own GQA-16"}
            rate = line["batch"] * 1e3 / line["ms"]["ours"]
            assert line["figures"]["tokens/s"]["ours"] == pytest.approx(rate)
        if line["case"] == "model_prefill":
            stock = {"Llama, GQA-16"} if line["weights"] == "packed" else set()
            assert line["ratios"].keys() == {"of limit", "unpacked", *stock}
            assert line["figures"]["tokens/s"].keys() == {"ours", "unpacked"}
        if line["case"] == "model_training":
            assert line["figures"]["tokens/s"].keys() == {"ours", "through SDPA"}
    decode = next(line for line in lines if line["case"] == "decode_attention")
    assert {"of limit", "SDPA, K repeated", "SDPA, GQA-16", "torch matmul", "Sigma / own GQA-16"} == decode[
        "ratios"
    ].keys()

    text = table.read_text()
    assert capsys.readouterr().out == text
    for part in text.split("\n**")[1:]:
        assert part.partition("**")[0] in CASES
        head, _, *rows = (split(row) for row in part.splitlines() if row.startswith("|"))
        assert head[:3] == ["size", "dtype", "ours"] and len(rows) in (2, 4, 6, 12)
        assert all(len(row) == len(head) and all(row) for row in rows)


def spoiled(op):
    def wrong(*arguments, **options):
        return op(*arguments, **options) * 1.1

    return wrong


def misplaced(op):
    def wrong(k_cache, v_cache, k, v, *arguments, **options):
        return op(k_cache, v_cache, k.roll(1, dims=1), v, *arguments, **options)

    return wrong


@pytest.mark.parametrize(
    ("case", "owner", "op", "spoil"),
    [
        ("flash_attention", diffqkv, "flash_attention", spoiled),
        ("decode_attention", diffqkv, "decode_attention", spoiled),
        ("kv_cache_update", diffqkv, "kv_cache_update", misplaced),
        ("selective_v_attention", diffqkv, "selective_v_attention", spoiled),
        ("flash_attention_backward", diffqkv, "flash_attention", spoiled),
        ("swiglu", diffqkv, "swiglu", spoiled),
        ("call_overhead", diffqkv, "decode_attention", spoiled),
        ("packed_linear", diffqkv, "packed_linear", spoiled),
        ("model_decode", diffqkv.models.packed_linear, "packed_linear", spoiled),
        ("model_prefill", diffqkv.models.packed_linear, "packed_linear", spoiled),
        ("model_training", diffqkv.models.attention, "flash_attention", spoiled),
    ],
)
def test_a_wrong_result_gets_no_numbers(case, owner, op, spoil, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(owner, op, spoil(getattr(owner, op)))
    numbers = tmp_path / "run.json"
    assert main(["bench", "--cases", case, "--dtypes", "float32", *TINY, "--json", str(numbers)]) == 1
    rows = [split(row) for row in capsys.readouterr().out.splitlines() if row.startswith("|")][2:]
    lines = json.loads(numbers.read_text())["lines"]
    assert len(rows) == len(lines) > 0
    for row, line in zip(rows, lines, strict=True):
        assert len(row) == 3 and row[2].startswith("wrong result: error ")
        assert not line["correct"] and line["error"] > line["tolerance"]
        assert all(line[name] is None for name in MEASURED)


def test_a_run_that_ends_early_leaves_its_lines(monkeypatch, tmp_path):
    numbers, rest = tmp_path / "bench.json", iter([wrong_line(), KeyboardInterrupt()])

    def run_case(*line):
        found = next(rest)
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr("diffqkv.commands.bench.run_case", run_case)
    with pytest.raises(KeyboardInterrupt):
        main(["bench", "--cases", "swiglu", *TINY, "--json", str(numbers)])
    assert json.loads(numbers.read_text())["lines"] == [wrong_line()]
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]


def wrong_line() -> dict:
    line = {"case": "swiglu", "size": "256", "dtype": "float32", "error": 1.0, "tolerance": 0.1, "correct": False}
    return line | dict.fromkeys(MEASURED)


def test_llama_cpp_that_does_not_import_is_no_peer(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    llama_cpp._is_importable.cache_clear()
    assert not llama_cpp.has_peer(torch.bfloat16)
    llama_cpp._is_importable.cache_clear()


def test_an_error_cannot_hide():
    want = torch.tensor([1.0, 100.0])
    assert difference(want + 1, want) == 1
    assert difference(want / 1000 + 1e-3, want / 1000) == pytest.approx(
        0.01, rel=1e-5
    )  # of the largest: none reaches 1
    spoiled = torch.tensor([float("nan"), 100.0])
    assert not difference(spoiled, want) <= 1e9 and not distance(spoiled, want) <= 1e9
    assert not difference([want, spoiled, want], [want] * 3) <= 1e9
    assert not difference(want[:1], want) <= 1e9 and not distance(want[:1], want) <= 1e9
    assert distance(want * 1.01, want) == pytest.approx(0.01, rel=1e-4)


def test_peers_compute_the_same():
    q, k, v = (layer.heads(count, tokens, torch.float64, 2) for count, tokens in ((32, 1), (4, 50), (16, 50)))
    want = reference.attention(q, k, v)
    for out in (peers.sdpa(q, k, v), peers.matmul_decode(q, k, v), peers.matmul_top_k(q, k, v, 50)):
        torch.testing.assert_close(out, want)
    best, _ = reference.selective_v_attention(q, *as_caches(k, v), torch.tensor([50, 50]), 7)
    torch.testing.assert_close(peers.matmul_top_k(q, k, v, 7), best)


class TestTargets:
    def bounds(self, case, dtype, tokens, limit="", rate=0.0):
        limit = {"name": limit, "per_second": rate}
        return targets.bounds(TARGETS, {"case": case, "dtype": dtype, "tokens": tokens, "limit": limit})

    def bound(self, column, *line):
        bound = self.bounds(*line).get(column)
        return bound and bound.value

    @pytest.mark.parametrize(
        ("tokens", "float32", "dot", "no_dot"),
        [(511, None, None, None), (512, 0.65, None, None), (2047, 0.65, None, None), (2048, 0.80, 0.72, 0.75)],
    )
    def test_flash_attention_of_the_limit(self, tokens, float32, dot, no_dot):
        assert self.bound("of limit", "flash_attention", "float32", tokens, "FMA", 1e11) == float32
        assert self.bound("of limit", "flash_attention", "bfloat16", tokens, "bf16 dot", 1e11) == dot
        assert self.bound("of limit", "flash_attention", "bfloat16", tokens, "FMA", 1e11) == no_dot

    @pytest.mark.parametrize(
        ("tokens", "float32", "bfloat16"), [(511, None, None), (512, 2.2, 2), (1023, 2.2, 2), (1024, 1.3, 1.25)]
    )
    def test_flash_attention_against_torch(self, tokens, float32, bfloat16):
        assert self.bound("SDPA, K repeated", "flash_attention", "float32", tokens) == float32
        assert self.bound("SDPA, K repeated", "flash_attention", "bfloat16", tokens) == bfloat16

    @pytest.mark.parametrize(("read", "of_limit", "over_twin"), [(49.9e9, 0.90, 0.70), (50e9, 0.75, 0.85)])
    def test_decode_attention_depends_on_the_memory(self, read, of_limit, over_twin):
        line = ("decode_attention", "bfloat16", 2048, "read", read)
        assert self.bound("of limit", *line) == of_limit
        assert self.bound("Sigma / own GQA-16", *line) == over_twin
        assert (self.bound("SDPA, K repeated", *line), self.bound("SDPA, GQA-16", *line)) == (15, 10)

    def test_flash_attention_backward(self):
        assert self.bound("of limit", "flash_attention_backward", "float32", 512, "FMA", 1e11) is None
        assert self.bound("of limit", "flash_attention_backward", "float32", 1024, "FMA", 1e11) == 0.6
        assert self.bound("SDPA, K repeated", "flash_attention_backward", "float32", 1024) == 1.3
        assert self.bound("SDPA, K repeated", "flash_attention_backward", "float32", 2048) == 1.15
        assert self.bound("SDPA, K repeated", "flash_attention_backward", "bfloat16", 2048) == 6
        assert self.bound("own MHA", "flash_attention_backward", "bfloat16", 2048) == 1

    def test_others(self):
        assert self.bound("own dense", "selective_v_attention", "float32", 8191) is None
        assert self.bound("own dense", "selective_v_attention", "float32", 8192) == 2
        assert self.bound("own dense", "selective_v_attention", "bfloat16", 8192) == 1.4
        assert self.bound("SDPA, GQA-16", "call_overhead", "float32", 128) == 0.5
        assert self.bounds("kv_cache_update", "float32", 8192) == {}

    def test_bounds_are_reached_exactly(self):
        least, most = targets.Bound("≥", 0.9), targets.Bound("≤", 0.7)
        assert least.reached_by(0.9) and least.reached_by(1.0) and not least.reached_by(0.8999)
        assert most.reached_by(0.7) and most.reached_by(0.1) and not most.reached_by(0.7001)
        assert not least.reached_by(float("nan")) and not most.reached_by(float("nan"))


def test_ratios_are_paired():
    # The machine was twice as slow in two of three rounds, for one of them and then the other.
    assert Timing([1.0, 2.0, 2.0]).over(Timing([0.5, 1.0, 1.0])) == 2
    assert Timing([1.0, 2.0, 9.0]).over(Timing([1.0, 2.0, 1.0])) == 1


def test_interleaved_rounds():
    calls = []
    both = {"a": [lambda: calls.append("a"), lambda: calls.append("A")], "b": [lambda: calls.append("b")]}
    times, without = interleaved(Clock(), both, seconds=0, rounds=3)
    assert calls == ["a", "b", "A", "b"] * 2  # the first of each warms up; a's data take turns
    assert len(times["a"].samples) == len(times["b"].samples) == 3 and without == {}


def overhead(seconds, **peers):
    """The record of a line whose own call does nothing."""
    who = Contenders(0.0, [lambda: None], {name: [call] for name, call in peers.items()})
    return measure("call_overhead", layer.Size(128), torch.float32, seconds, who, Clock(), TARGETS)


def test_a_peer_that_raises_is_left_out():
    def no_peer():
        raise ValueError("no such backend")

    record = overhead(0, other=no_peer)
    assert record["ratios"] == {} and cells(record)["notes"] == "other: no such backend"
    with pytest.raises(ValueError, match="no such backend"):
        interleaved(Clock(), {"ours": [no_peer]}, seconds=0)


def test_work_of_other_processes_is_seen():
    elsewhere = Elsewhere()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    assert elsewhere.share() > 0


@pytest.mark.parametrize(("share", "ours", "verdict"), [(0.05, "", ": reached"), (0.051, ", disturbed", "")])
def test_a_disturbed_line_is_not_judged(share, ours, verdict, monkeypatch):
    monkeypatch.setattr(Elsewhere, "share", lambda self: share)
    line = cells(overhead(1e-3, **{targets.SDPA_TWIN: lambda: sum(range(10_000))}))
    assert line["ours"].endswith(f"µs{ours}")
    assert line[targets.SDPA_TWIN].endswith(f"(≥ 0.5{verdict})")


def test_table_without_a_checkout():
    names = "date cpu cpu_family threads cpu_isa torch torch_isa diffqkv commit"
    facts = dict.fromkeys(names.split())
    assert "commit" not in markdown(facts, [])


@pytest.mark.parametrize(
    "options",
    [
        ["--cases", "learning"],
        ["--dtypes", "float16"],
        ["--tokens", "0"],
        ["--tokens", "many"],
        ["--seconds", "-1"],
        ["--seconds", "nan"],
        ["--seconds", "inf"],
        ["--threads", "0"],
        ["--json", "missing/folder/run.json"],
        ["--markdown", "."],
    ],
)
def test_bad_options(options, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *options])
    assert caught.value.code == 2
    assert f"argument {options[0]}: " in capsys.readouterr().err


def test_without_the_library():
    result = bench(DIFFQKV_DISABLE_LIBRARY="1")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "bench: there is no compiled library to measure: DIFFQKV_DISABLE_LIBRARY=1\n"


def test_as_a_command_it_keeps_quiet_in_a_pipe():
    result = bench("--cases", "call_overhead", "--dtypes", "float32", "--seconds", "0.01")
    assert result.returncode == 0 and result.stderr == ""
    assert "| 128  | float32 |" in result.stdout


def test_no_command_prints_the_configuration(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.startswith(f"diffqkv {diffqkv.__version__}, torch")
