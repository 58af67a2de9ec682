"""The examples of docs/models.md run as printed, one after another, and its statements of names and numbers hold."""

import re
from pathlib import Path

import diffqkv
from diffqkv._version import OLDEST_TRANSFORMERS
from diffqkv.models.sigma.modeling_sigma import AUTO_CLASSES

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


def test_python_blocks_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "models.md", "exec"), names)
    printed = capsys.readouterr().out
    assert len(re.findall(r"layer \d: \d+\.\d% of the softmax read", printed)) == 2


def test_names_and_numbers():
    table = dict(re.findall(r"^\| `(Sigma\w+)` \| `(AutoModel\w*)` \|$", PAGE, re.MULTILINE))
    assert table == {model.__name__: auto.__name__ for auto, model in AUTO_CLASSES.items()}
    assert f"transformers {OLDEST_TRANSFORMERS} and newer" in PAGE
    fields = {name for name in diffqkv.SigmaConfig().to_dict() if name.startswith("selective_v_")}
    assert set(re.findall(r"`(selective_v_\w+)`", PAGE)) == fields
    config = diffqkv.SigmaConfig.from_preset("sigma-1.5b")
    kv = (config.num_key_heads + config.num_value_heads) * config.head_dim
    assert f"{2 * config.q_aug_dim + kv} rows" in PAGE
    assert f"instead of {2 * config.q_aug_dim + config.hidden_size + kv}" in PAGE
