"""Examples of the README and docs run as printed, in order; their links, commands, names and numbers hold."""

import argparse
import inspect
import re
import shutil

import pytest
from pages import PAGES, anchors, blocks, links, prose
from paths import ROOT
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

import diffqkv
from diffqkv import flash_attn_interface
from diffqkv.__main__ import main
from diffqkv._version import NEWEST_TRANSFORMERS, OLDEST_TRANSFORMERS
from diffqkv.models.sigma.configuration_sigma import PRESETS
from diffqkv.models.sigma.modeling_sigma import AUTO_CLASSES
from diffqkv.ops import dispatch

MODELS, CACHES, OPS, SETTINGS, TRAINING = (
    PAGES[f"docs/{name}.md"] for name in ("models", "caches-and-generation", "ops", "settings", "training")
)
# What the examples of a page print, among other things.
PRINTED = {
    "README.md": [r"torch.Size\(\[1, 36\]\) diffqkv", r"tensor\(True\)"],
    "docs/efficiency.md": [r"h200, 132 multiprocessors", r"'diffqkv::flash_attention'"],
    "docs/models.md": [r"(layer \d: \d+\.\d% of the softmax read, at least \d+\.\d%\n){2}"],
    "docs/ops.md": [
        r"tensor\(True\) tensor\(0\.\d+\)\ntensor\(True\) tensor\(\d+\.\d*\)",
        r"(tensor\(True\)\n){2}",
        r"torch.Size\(\[1, 256, 32, 128\]\)\ntorch.Size\(\[1, 1, 32, 128\]\)",
    ],
    "docs/training.md": [r"K heads 8, V heads 2: \d+ parameters", r"4 16 3072"],
}
EXAMPLES = {name for name, text in PAGES.items() if blocks(text, "python")}


def test_pages_with_examples():
    assert EXAMPLES == {*PRINTED, "docs/caches-and-generation.md", "docs/serving.md"}


@pytest.mark.parametrize("name", sorted(EXAMPLES - {"docs/serving.md"}))  # see test_evaluation.py, test_serving.py
def test_python_blocks_run(name, capsys, monkeypatch, tmp_path):
    if name == "docs/training.md":  # the reader's own text
        (tmp_path / "corpus").mkdir()
        for path in (ROOT / "python" / "diffqkv").glob("*.py"):
            shutil.copy(path, tmp_path / "corpus" / f"{path.stem}.txt")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks(PAGES[name], "python"):
        exec(compile(block, name, "exec"), names)
    printed = capsys.readouterr().out
    for pattern in PRINTED.get(name, []):
        assert re.search(pattern, printed), pattern


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for link in links(PAGES[name]):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path.read_text()), link


def test_readme_leads_to_every_page():
    assert {name for name in PAGES if name.startswith("docs/")} <= set(links(PAGES["README.md"]))


@pytest.mark.parametrize("name", PAGES)
def test_lines_are_short(name):
    assert [line for line in PAGES[name].splitlines() if len(line) > 120] == []


def commands() -> list[str]:
    """The lines of the blocks that are typed, not run by these tests."""
    typed = (block for text in PAGES.values() for language in ("bash", "text") for block in blocks(text, language))
    return [line.partition(" #")[0].strip() for block in typed for line in block.replace("\\\n", "").splitlines()]


def test_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    texts = [*commands(), *(code for text in PAGES.values() for code in re.findall(r"`([^`]+)`", prose(text)))]
    assert {x.split()[1] for x in texts if x.startswith("make ")} <= targets
    for text in texts:
        for extra in re.findall(r"pip install .*\[(\w+)\]", text):
            assert re.search(rf"^{extra} =", extras, re.MULTILINE), text
        if script := re.match(r"(?:\S*python )((?:examples|scripts|benchmarks|tests)/\S+\.(?:py|sh))", text):
            assert (ROOT / script[1]).is_file(), text


def test_options_of_the_commands_exist(monkeypatch):
    parsed = []
    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(self, arguments=None):
        parsed.append(parse_args(self, arguments))
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    ours = [line for line in commands() if re.match(r"python -m diffqkv (bench|convert|quantize|study)\b", line)]
    for line in ours:
        with pytest.raises(SystemExit) as end:
            main(line.split()[3:])
        assert end.value.code == 0, line
    assert len(parsed) == len(ours) >= 6


# ---------------------------------------------------------------- names and numbers


def test_names_and_numbers_of_the_models():
    table = dict(re.findall(r"^\| `(Sigma\w+)` \| `(AutoModel\w*)` \|$", MODELS, re.MULTILINE))
    assert table == {model.__name__: auto.__name__ for auto, model in AUTO_CLASSES.items()}
    assert f"work with transformers {OLDEST_TRANSFORMERS} to {NEWEST_TRANSFORMERS}; " in MODELS
    fields = {name for name in diffqkv.SigmaConfig().to_dict() if name.startswith("selective_v_")}
    assert set(re.findall(r"`(selective_v_\w+)`", MODELS)) == fields
    config = diffqkv.SigmaConfig.from_preset("sigma-1.5b")
    kv = (config.num_key_heads + config.num_value_heads) * config.head_dim
    words = " ".join(MODELS.split())
    assert f"{2 * config.q_aug_dim + kv} rows" in words
    assert f"instead of {2 * config.q_aug_dim + config.hidden_size + kv}" in words


def test_names_of_the_presets():
    named = re.findall(r"`([\w.-]+?)(?:\.\.\.)?`", TRAINING.partition("| preset |")[2].partition("\n\n")[0])
    assert {name.partition("-")[0] for name in named} == {name.partition("-")[0] for name in PRESETS}


def test_names_of_the_caches_and_modes():
    kinds = set(re.findall(r'`(?:cache_implementation=)?"(\w+)"', CACHES))
    assert kinds - {"paged"} <= set(ALL_CACHE_IMPLEMENTATIONS) and len(kinds) == 6
    known = vars(GenerationConfig()).keys() | vars(GenerationMixin.generate)["__wrapped__"].__annotations__.keys()
    modes = CACHES.partition("## Modes")[2].partition("**")[0]
    names = set(re.findall(r"`(\w+)`", modes)) - {"generate"}
    assert names - known == {"inputs_embeds"}  # which the model takes
    for method in re.findall(r"`(?:Cache\.)?((?:to|from|batch|reorder|crop)_?\w+)(?:\(-?\w+\))?`", CACHES):
        assert hasattr(diffqkv.Cache, method), method


def arguments(heading: str) -> set[str]:
    table = OPS.partition(f"| argument of {heading} |")[2].partition("\n\n")[0]
    return {name for row in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}


def test_arguments_of_the_ops():
    both = arguments("both")
    assert both == set(inspect.signature(diffqkv.flash_attention).parameters)
    varlen = set(inspect.signature(diffqkv.flash_attention_varlen).parameters)
    assert both | arguments("`flash_attention_varlen`") == varlen
    for name in ("decode_attention", "kv_cache_update", "selective_v_attention", "packed_linear"):
        assert arguments(f"`{name}`") == set(inspect.signature(getattr(diffqkv, name)).parameters), name
    for name in re.findall(r"\bflash_attn_\w+func\b", OPS):
        assert hasattr(flash_attn_interface, name)


def variables_of_the_sources() -> set[str]:
    """Environment variables that C++ and Python read; setup.py hands some of them to CMake by a list."""
    paths = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "python").rglob("*.py")]
    text = "\n".join(path.read_text() for path in paths)
    read = set(re.findall(r'(?:getenv\(|environ\.get\(|environ\[)"(\w+)"', text))
    return read | set(re.findall(r'"(\w+)"', re.search(r"^OPTIONS = \((.*)\)$", text, re.MULTILINE)[1]))


def test_settings_are_all_that_the_sources_read():
    rows = set(re.findall(r"^\| (`.+?`) \|", SETTINGS, re.MULTILINE))
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    ours = {name for name in variables_of_the_sources() | {"DIFFQKV_LIBRARY"}}
    tests = {name for name in named if name.startswith("DIFFQKV_TEST_")}
    read_by_tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    # The Makefile exports the Python that it was given, and a script reads the other.
    make = set(re.findall(r"\$\(([A-Z_]+)\)", (ROOT / "Makefile").read_text())) | {"PYTHON", "HF_SUITE"}
    assert named == ours | tests | make - {"BIN", "PATH", "SOURCES"}
    assert all(f'"{name}"' in read_by_tests for name in tests)
    # No other page names a variable that is not on this one.
    for name, text in PAGES.items():
        assert set(re.findall(r"\bDIFFQKV_[A-Z_]+\b", prose(text))) <= named | {"DIFFQKV_BUILD_TESTS"}, name


def test_result_files_are_on_the_page_of_benchmarks():
    results = {f"../benchmarks/results/{path.name}" for path in (ROOT / "benchmarks" / "results").glob("*.md")}
    assert results <= set(links(PAGES["docs/benchmarks.md"]))


# ---------------------------------------------------------------- places

CONTRIBUTING = PAGES["CONTRIBUTING.md"]
# What an op does without, or shares with another, as the list below the table says.
ELSEWHERE = {
    "csrc/ops/flash_attention_backward.cpp",
    "csrc/plan/cpu/flash_attention.cpp",
    "csrc/plan/cpu/decode_attention.cpp",
    "csrc/plan/cpu/swiglu.cpp",
    "csrc/cpu/flash_attention.cpp",
    "csrc/cpu/decode_attention.cpp",
    "csrc/plan/cuda/swiglu.cpp",
    "tests/cpp/plan/cpu/test_flash_attention.cpp",
    "tests/cpp/plan/cpu/test_decode_attention.cpp",
    "tests/cpp/plan/cpu/test_swiglu.cpp",
    "tests/cpp/plan/cuda/test_kv_cache_update.cpp",
    "tests/cpp/plan/cuda/test_swiglu.cpp",
    "tests/cpp/cpu/test_flash_attention.cpp",
    "tests/cpp/cpu/test_decode_attention.cpp",
    "tests/cpp/cpu/test_kv_cache_update.cpp",
    "benchmarks/gpu/calls/flash_attention_backward.py",
    "python/diffqkv/ops/flash_attention_backward.py",
    "tests/python/support/fuzz/calls/flash_attention_backward.py",
    "csrc/plan/cuda/packed_linear.cpp",
    "csrc/cuda/packed_linear",
    "csrc/cuda/packed_linear/packed_linear.cu",
    "tests/cpp/plan/cuda/test_packed_linear.cpp",
    "tests/cpp/cuda/test_packed_linear.cpp",
    "benchmarks/gpu/calls/packed_linear.py",
    "benchmarks/gpu/speed/packed_linear.py",
}
# Ops for the CPU alone, without plans.
ELSEWHERE |= {
    part.replace("OP", op)
    for op in ("rms_norm", "rotary_embedding")
    for part in (
        "csrc/plan/cpu/OP.cpp",
        "csrc/plan/cuda/OP.cpp",
        "csrc/cuda/OP",
        "csrc/cuda/OP/OP.cu",
        "tests/cpp/plan/cpu/test_OP.cpp",
        "tests/cpp/plan/cuda/test_OP.cpp",
        "tests/cpp/cuda/test_OP.cpp",
        "python/diffqkv/benchmarks/cpu/cases/OP.py",
        "benchmarks/gpu/calls/OP.py",
        "benchmarks/gpu/speed/OP.py",
    )
}


def test_parts_of_an_op_are_where_its_name_says():
    table = CONTRIBUTING.partition("| part | file |")[2].partition("\n\n")[0]
    patterns = re.findall(r"`([^`]+)`", table)
    ops = [
        "flash_attention",
        "flash_attention_backward",
        *(op for op in dispatch.OPS if not op.startswith("flash_attention")),
    ]
    paths = {re.sub(r"\bx\b|(?<=test_)x\b", op, pattern) for pattern in patterns for op in ops}
    assert {path for path in paths if not (ROOT / path).exists()} == ELSEWHERE


def test_folders_and_files_of_the_tree_exist():
    named = [
        name for page in ("CONTRIBUTING.md", "docs/architecture.md") for name in re.findall(r"`([^`\s]+)`", PAGES[page])
    ]
    paths = {name for name in named if re.match(r"(csrc|python|tests|benchmarks|scripts|cmake|docs)/", name)}
    paths |= {f"python/diffqkv/{name}" for name in named if re.match(r"(ops|rules|models)/\w+\.py", name)}
    paths = {path.replace("diffqkv/rules/", "diffqkv/ops/rules/") for path in paths}
    paths -= {path for path in paths if re.search(r"\b(test_)?x\b|[{]|\.so$|/test_\w+\.py$", path)}
    assert len(paths) > 40
    assert {path for path in paths if not (ROOT / path).exists()} == set()
