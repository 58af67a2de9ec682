"""The folder of samples: nothing is lost, nothing foreign is mixed in."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from diffqkv.study.samples import Samples

IDENTITY = {"layers": 1, "machine": {"cpu": "one", "threads": 2}, "systems": ["sigma", "std"], "commit": None}


def add(samples, context=1, system="sigma"):
    samples.add({"step": 0.5}, {"time": 1.0}, kind="step", system=system, context=context, dtype="bfloat16", batch=1)


def count(samples, context=1, system="sigma"):
    return samples.count(kind="step", system=system, context=context, dtype="bfloat16", batch=1)


def test_samples_come_back(tmp_path):
    folder = tmp_path / "new" / "study"
    with Samples(folder, IDENTITY) as samples:
        add(samples)
        add(samples)
        add(samples, 2)
        assert (len(samples), count(samples), count(samples, 2), count(samples, 1, "std")) == (3, 2, 1, 0)
        want = list(samples)
    with Samples(folder, IDENTITY) as samples:
        assert list(samples) == want
        assert (count(samples), count(samples, 2)) == (2, 1)
        add(samples)
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 4


def test_a_sample_that_was_cut_is_dropped(tmp_path):
    with Samples(tmp_path, IDENTITY) as samples:
        add(samples)
        add(samples)
    file = tmp_path / "samples.jsonl"
    file.write_bytes(file.read_bytes()[:-10])
    with Samples(tmp_path, IDENTITY) as samples:
        assert len(samples) == 1
        add(samples, 2)
    with Samples(tmp_path, IDENTITY) as samples:
        assert [sample["context"] for sample in samples] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 2}, "samples of layers 1, want 2"),
        ({"machine": {"cpu": "one", "threads": 4}}, "samples of machine.threads 2, want 4"),
        ({"systems": ["sigma"]}, r"samples of systems \['sigma', 'std'\], want \['sigma'\]"),
        ({"commit": "abc"}, "samples of commit None, want abc"),
        ({"more": 1}, "samples of more None, want 1"),
    ],
)
def test_another_study_is_refused_by_what_differs(tmp_path, change, message):
    with Samples(tmp_path, IDENTITY) as samples:
        add(samples)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        Samples(tmp_path, IDENTITY | change)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with Samples(tmp_path, IDENTITY) as samples:  # the lock is free
        assert len(samples) == 1


@pytest.mark.parametrize("file", ["study.json", "samples.jsonl"])
@pytest.mark.parametrize("content", ["{nonsense\n", "[1, 2]\n"])
def test_damaged_files_are_refused_by_name(tmp_path, file, content):
    with Samples(tmp_path, IDENTITY) as samples:
        add(samples)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=f"damaged {file}"):
        Samples(tmp_path, IDENTITY)
    assert (tmp_path / file).read_text() == content


def test_a_folder_in_use_is_refused(tmp_path):
    with Samples(tmp_path, IDENTITY), pytest.raises(ValueError, match="another study is under way"):
        Samples(tmp_path, IDENTITY)
    with Samples(tmp_path, IDENTITY):
        pass


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Samples(tmp_path / "file" / "study", IDENTITY)


def _add_forever(folder):
    with Samples(folder, IDENTITY) as samples:
        while True:
            add(samples)


def test_a_kill_loses_no_sample_that_was_taken(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_add_forever, args=(tmp_path,))
    process.start()
    file = tmp_path / "samples.jsonl"
    deadline = time.monotonic() + 60
    while not (file.exists() and file.stat().st_size > 2000):
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    whole = file.read_bytes().count(b"\n")
    with Samples(tmp_path, IDENTITY) as samples:
        assert len(samples) == whole > 0
        add(samples, 7)
    assert all(json.loads(line)["kind"] == "step" for line in file.read_text().splitlines())
