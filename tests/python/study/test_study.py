"""`python -m diffqkv study` from the command line: what it writes, that it goes on, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_sigma import tiny_config

from diffqkv.__main__ import main
from diffqkv.commands import study as command
from diffqkv.study import measure, run

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture
def shape(tmp_path):
    """A folder with the configuration of a small Sigma."""
    folder = tmp_path / "shape"
    tiny_config((8, 2, 4), num_hidden_layers=2, max_position_embeddings=8192).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(command.GRIDS, "small", ((0, 256), (256, 512)))
    monkeypatch.setattr(run, "ROUNDS", 6)
    monkeypatch.setattr(run, "_VALIDATED", 1)


def study(shape, out, *options, minutes="2"):
    return main(["study", "--config", shape, "--out", str(out), "--minutes", minutes, "--grid", "small", *options])


FILES = {"samples.jsonl", "results.json", "table8.md", "report.md", "study.json", "study.lock"}
FIGURES = {
    f"{name}-bfloat16-batch1.{kind}"
    for name in ("figure2", "figure3", "figure4", "figure5", "figure6", "model")
    for kind in ("png", "svg")
}


def test_a_study(shape, tmp_path, capsys):
    out = tmp_path / "out"
    every = [
        "sigma",
        "std",
        "std-stock",
        "group-sharing",
        "half-k-absorbed",
        "half-k-expand",
        "selective-v",
        "sigma-int8",
    ]
    assert study(shape, out, "--systems", *every) == 0
    said = capsys.readouterr().out
    assert "sigma over std, prefix 256, output 512" in said and str(out / "report.md") in said
    names = {file.name for file in out.iterdir()}
    assert names >= FILES | FIGURES
    assert not [name for name in names if name.endswith(".part")]
    found = json.loads((out / "results.json").read_text())
    assert set(found["described"]) == {*every, "std-int8"}
    contexts = [1, 256, 512, 768]
    for system in found["described"]:
        steps = [row for row in found["steps"] if row["system"] == system]
        assert [row["context"] for row in steps] == contexts
        assert all(row["samples"] == 6 and 0 < row["attention"]["median"] < row["step"]["median"] for row in steps)
        assert len([row for row in found["ceet"] if row["system"] == system]) == 4
        assert [row["prefix"] for row in found["ops"] if row["system"] == system] == [256, 768]
    assert {row["system"] for row in found["validation"]} == {"sigma", "std"}
    ops = {row["system"]: row["ops"] for row in found["ops"]}
    assert ops["sigma"] == ops["sigma-int8"] == ["diffqkv::decode_attention"]
    assert ops["selective-v"] == ["diffqkv::selective_v_attention"]
    assert ops["std-stock"] == ops["group-sharing"] == ["aten::scaled_dot_product_attention"]
    report = (out / "report.md").read_text()
    for file in FIGURES:
        assert (f"]({file})" in report) == file.endswith(".png")

    # Again: nothing is measured, and the numbers are the same.
    before = (out / "samples.jsonl").read_bytes()
    assert study(shape, out, "--systems", *every) == 0
    assert (out / "samples.jsonl").read_bytes() == before
    again = json.loads((out / "results.json").read_text())
    assert again["steps"] == found["steps"]


def test_a_study_of_several_sizes_and_layers(shape, tmp_path):
    out = tmp_path / "out"
    options = ["--systems", "sigma", "--batch", "1", "2", "--dtypes", "float32", "bfloat16", "--layers", "all"]
    assert study(shape, out, *options, minutes="0.4") == 0
    found = json.loads((out / "results.json").read_text())
    assert found["layers"] == 2
    sizes = {(row["dtype"], row["batch"]) for row in found["steps"]}
    assert sizes == {("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2)}
    assert (out / "figure6-float32-batch2.png").exists()


def test_a_killed_study_goes_on(shape, tmp_path):
    out = tmp_path / "out"
    options = ["--config", shape, "--out", str(out), "--minutes", "0.3", "--grid", "small", "--systems", "sigma"]
    process = subprocess.Popen([sys.executable, "-m", "diffqkv", "study", *options], stderr=subprocess.DEVNULL)
    samples = out / "samples.jsonl"
    deadline = time.monotonic() + 120
    while not (samples.exists() and samples.read_bytes().count(b"\n") >= 5):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    taken = samples.read_bytes()
    taken = taken[: taken.rfind(b"\n") + 1]
    found = json.loads((out / "study.json").read_text())
    assert found["prefixes"] == [0, 2048, 4096]  # the command's own grid
    done = subprocess.run(
        [sys.executable, "-m", "diffqkv", "study", *options], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert samples.read_bytes().startswith(taken)
    assert (out / "report.md").exists()


def test_ctrl_c_keeps_the_samples(shape, tmp_path, monkeypatch, capsys):
    out, step = tmp_path / "out", measure.Subject.step
    taken = []

    def interrupted(subject, context):
        taken.append(context)
        if len(taken) == 9:
            raise KeyboardInterrupt
        return step(subject, context)

    monkeypatch.setattr(measure.Subject, "step", interrupted)
    assert study(shape, out, "--systems", "sigma") == 130
    assert "the same command goes on" in capsys.readouterr().err
    # Two of the steps warmed up.
    assert len((out / "samples.jsonl").read_text().splitlines()) == 6
    monkeypatch.undo()
    monkeypatch.setitem(command.GRIDS, "small", ((0, 256), (256, 512)))
    assert study(shape, out, "--systems", "sigma") == 0


def test_little_time_leaves_out_and_says_so(shape, tmp_path):
    out = tmp_path / "out"
    assert study(shape, out, "--systems", "sigma", minutes="0.001") == 0
    found = json.loads((out / "results.json").read_text())
    assert any("contexts 512, 768" in sentence for sentence in found["left_out"])
    assert any("no generation fits" in sentence for sentence in found["left_out"])
    assert {row["context"] for row in found["steps"]} == {1, 256}
    assert all(sentence in (out / "report.md").read_text() for sentence in found["left_out"])


def test_without_matplotlib_the_tables_are_written(shape, tmp_path):
    out = tmp_path / "out"
    options = [
        "study",
        "--config",
        shape,
        "--out",
        str(out),
        "--minutes",
        "0.001",
        "--grid",
        "small",
        "--systems",
        "sigma",
    ]
    program = (
        "import sys; sys.modules['matplotlib'] = None; from diffqkv.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install 'diffqkv[study]'" in done.stderr
    assert {file.name for file in out.iterdir()} == FILES
    assert "No figures:" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "sigma-2b"], "--config: got 'sigma-2b'"),
        (["--heads", "8/3/4"], "num_key_heads: got 3"),
        (["--heads", "8/2"], "--heads: got '8/2'"),
        (["--dims", "8/16/4"], "--dims: got '8/16/4'"),
        (["--layers", "3"], "--layers: got '3', want 1 to 2, or all"),
        (["--systems", "flash"], "--systems: got 'flash'"),
        (["--device", "tpu"], "--device: got 'tpu'"),
        (["--device", "cuda"], "--device: got 'cuda'"),
        (["--weights", "int8"], "--weights: got one without --advise"),
        (["--batch", "10000000"], r"--grid: got contexts up to 768 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(shape, tmp_path, options, message, capsys):
    out = tmp_path / "out"
    assert study(shape, out, *options) == 2
    assert message in capsys.readouterr().err
    assert not (out / "samples.jsonl").exists()


def test_memory_that_is_needed_is_told(shape, tmp_path, capsys, monkeypatch):
    assert study(shape, tmp_path / "out", "--batch", "10000000") == 2
    said = capsys.readouterr().err
    assert "GiB that are free" in said and "not even 1024 tokens fit" in said


def test_a_read_only_folder(shape, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert study(shape, tmp_path / "file" / "out") == 2
    assert "file" in capsys.readouterr().err


def test_another_study_is_refused(shape, tmp_path, capsys):
    out = tmp_path / "out"
    assert study(shape, out, "--systems", "sigma", minutes="0.001") == 0
    assert study(shape, out, "--systems", "sigma", "--batch", "2", minutes="0.001") == 2
    assert "with samples of batches [1], want [2]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ([], "from 24,576 tokens on"),
        (["--batch", "8"], "from 3,072 tokens on"),
        (["--weights", "int8"], "from 10,155 tokens on"),
        (["--heads", "32/16/16"], "save nothing"),
    ],
)
def test_advice(options, want, tmp_path, capsys):
    assert main(["study", "--advise", "--out", str(tmp_path / "new"), *options]) == 0
    said = capsys.readouterr().out
    assert want in said
    assert "GB/s" in said
    assert {file.suffix for file in (tmp_path / "new").iterdir()} == {".png", ".svg"}


def test_advice_for_a_gpu_that_is_not_here(capsys):
    assert main(["study", "--advise", "--device", "h100"]) == 0
    assert "specification of h100" in capsys.readouterr().out
    assert main(["study", "--advise", "--device", "h999"]) == 2
    assert "--device: got 'h999'" in capsys.readouterr().err


def test_numbers_agree_with_a_layers_clock(shape):
    """The ranges of a step lie within what the step takes, by another clock."""
    import torch

    from diffqkv.study.measure import Size, subjects
    from diffqkv.study.systems import chosen, configuration

    config = configuration(shape)
    (subject, *_) = subjects(chosen(["sigma"], config), config, 2, Size(torch.float32, 1), 512, 8, torch.device("cpu"))
    subject.step(512)
    begin = time.perf_counter()
    seconds = subject.step(512)
    whole = time.perf_counter() - begin
    assert sum(seconds[name] for name in ("kv_cache", "attention", "augmented_q", "layers_rest")) < seconds["step"]
    assert seconds["step"] <= whole
