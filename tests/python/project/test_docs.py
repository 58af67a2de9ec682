"""The examples of each page of docs run as printed, one after another, and its statements of names and numbers hold."""

import re

import pytest
from paths import ROOT
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

import diffqkv
from diffqkv._version import NEWEST_TRANSFORMERS, OLDEST_TRANSFORMERS
from diffqkv.models.sigma.modeling_sigma import AUTO_CLASSES

DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}
MODELS, CACHES = PAGES["models.md"], PAGES["caches-and-generation.md"]


@pytest.mark.parametrize("name", sorted(PAGES.keys() - {"serving.md"}))  # see test_evaluation.py, test_serving.py
def test_python_blocks_run(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGES[name], re.MULTILINE | re.DOTALL):
        exec(compile(block, name, "exec"), names)
    printed = capsys.readouterr().out
    assert len(re.findall(r"layer \d: \d+\.\d% of the softmax read", printed)) == 2 * (name == "models.md")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGES[name]):
        assert (DOCS / target).exists(), target


def test_names_and_numbers_of_the_models():
    table = dict(re.findall(r"^\| `(Sigma\w+)` \| `(AutoModel\w*)` \|$", MODELS, re.MULTILINE))
    assert table == {model.__name__: auto.__name__ for auto, model in AUTO_CLASSES.items()}
    assert f"work with transformers {OLDEST_TRANSFORMERS} to {NEWEST_TRANSFORMERS}; " in MODELS
    fields = {name for name in diffqkv.SigmaConfig().to_dict() if name.startswith("selective_v_")}
    assert set(re.findall(r"`(selective_v_\w+)`", MODELS)) == fields
    config = diffqkv.SigmaConfig.from_preset("sigma-1.5b")
    kv = (config.num_key_heads + config.num_value_heads) * config.head_dim
    assert f"{2 * config.q_aug_dim + kv} rows" in MODELS
    assert f"instead of {2 * config.q_aug_dim + config.hidden_size + kv}" in MODELS


def test_names_of_the_caches_and_modes():
    kinds = set(re.findall(r'`(?:cache_implementation=)?"(\w+)"', CACHES))
    assert kinds - {"paged"} <= set(ALL_CACHE_IMPLEMENTATIONS) and len(kinds) == 6
    known = vars(GenerationConfig()).keys() | vars(GenerationMixin.generate)["__wrapped__"].__annotations__.keys()
    modes = CACHES.partition("## Modes")[2].partition("**")[0]
    names = set(re.findall(r"`(\w+)`", modes)) - {"generate"}
    assert names - known == {"inputs_embeds"}  # which the model takes
    for method in re.findall(r"`(?:Cache\.)?((?:to|from|batch|reorder|crop)_?\w+)(?:\(-?\w+\))?`", CACHES):
        assert hasattr(diffqkv.Cache, method), method
