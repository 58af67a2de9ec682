"""`python -m diffqkv quantize`: the model that loads straight, what it reports, and what it refuses by name."""

import json
import shutil

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file, save_file
from tiny_sigma import MODEL_FILES, save_with_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from diffqkv import WeightsConfig
from diffqkv.__main__ import main
from diffqkv.convert import files, to_integers
from diffqkv.convert.measure import read_windows

CHANGES = {"q_aug_dim": 64, "intermediate_size": 128, "max_position_embeddings": 64, "attention_bias": True}
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(autouse=True)
def needs(library):
    """Weights are packed where the library is that reads them."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "sigma"
    save_with_tokenizer(folder, **CHANGES)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((ROOT / "README.md").read_text()[:3000])
    return path


def edited(source, folder, edit):
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights, group_size", [("int8", 32), ("int4", 64)])
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_that_loads_straight(tmp_path, source, weights, group_size, dtype, tied):
    if tied:
        source = tmp_path / "tied"
        save_with_tokenizer(source, tie_word_embeddings=True, **CHANGES)
    output = tmp_path / "out"
    options = ["--weights", weights, "--group-size", str(group_size), "--dtype", dtype, "--max-shard-size", "20KB"]
    assert main(["quantize", str(source), str(output), *options]) == 0
    config = WeightsConfig(weights, group_size)
    want = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), quantization_config=config)
    got = AutoModelForCausalLM.from_pretrained(output)
    assert got.packed_weights == weights and got.dtype == getattr(torch, dtype)
    state, wanted = got.state_dict(), want.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(x, wanted[name]) for name, x in state.items())
    assert len(list(output.glob("*.safetensors"))) > 1
    assert {path.name for path in output.glob("*.py")} == MODEL_FILES
    assert (
        AutoTokenizer.from_pretrained(output)("words")["input_ids"]
        == AutoTokenizer.from_pretrained(source)("words")["input_ids"]
    )


def test_report(tmp_path, source, text, capsys):
    output = tmp_path / "out"
    options = ["--weights", "int4", "--text", str(text), "--context", "32", "--text-tokens", "1024"]
    assert main(["quantize", str(source), str(output), *options]) == 0
    report, printed = json.loads((output / "quantization.json").read_text()), capsys.readouterr().out
    plain, small = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, output))
    assert report["before"]["parameters"] == plain.num_parameters()
    sizes = [sum(x.nbytes for x in load_file(folder / "model.safetensors").values()) for folder in (source, output)]
    assert [report[side]["bytes"] for side in ("before", "after")] == sizes
    # Gate and up take Q's place, which was of their width and had 128 outputs: 64 + 64 rows instead of 128 and 2 * 64.
    folded = plain.num_parameters() - 2 * 2 * 64 * 128
    assert report["after"]["parameters"] == folded
    assert report["before"]["bits_per_weight"] == 32
    assert report["after"]["bits_per_weight"] == pytest.approx(8 * sizes[1] / folded)
    windows = read_windows([text], source, plain.config.vocab_size, 32, 1024, 1)
    with torch.no_grad():
        p, q = plain(windows, labels=windows), small(windows, labels=windows)
    measured = report["text"]
    assert measured["perplexity"]["before"] == pytest.approx(p.loss.exp().item(), rel=1e-4)
    assert measured["perplexity"]["after"] == pytest.approx(q.loss.exp().item(), rel=1e-4)
    assert measured["perplexity_quotient"] == pytest.approx((q.loss - p.loss).exp().item(), rel=1e-4)
    assert measured["max_logit_difference"] == pytest.approx((p.logits - q.logits).abs().max().item(), rel=1e-3)
    for part in (f"{sizes[1]:,}", "int4 by groups of 32", f"{measured['perplexity_quotient']:.5f}", "1,024 tokens"):
        assert part in printed


def test_an_error_leaves_nothing(tmp_path, source, monkeypatch):
    written = []

    def interrupted(*args):
        written.extend(tmp_path.glob(".out.part/*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_integers(source, tmp_path / "out", weights="int8")
    assert written and not list(tmp_path.iterdir())


def test_overwrite(tmp_path, source, capsys):
    command = ["quantize", str(source), str(tmp_path / "out"), "--weights"]
    assert main([*command, "int8"]) == 0
    assert main([*command, "int4"]) == 2
    assert "quantize: output: got " in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").packed_weights == "int8"
    assert main([*command, "int4", "--overwrite"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").packed_weights == "int4"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestRefusals:
    @staticmethod
    def refused(message, source, output, capsys, *options):
        assert main(["quantize", str(source), str(output), "--weights", "int4", *map(str, options)]) == 2
        error = capsys.readouterr().err  # behind the bars of transformers
        assert f"quantize: {message}" in error, error
        assert not output.exists() and not list(output.parent.glob(".*.part"))

    @pytest.mark.parametrize(
        "message, options",
        [
            ("group_size: got 48, want a multiple of 32 up to 256", ["--group-size", 48]),
            ("lm_head: got 64 input features, want a multiple of 128", ["--group-size", 128]),
            ("context: got 65, want 2 to max_position_embeddings (64)", ["--text", "TEXT", "--context", 65]),
            ("text: got 3", ["--text", "TEXT", "--context", 64, "--text-tokens", 9999]),
            ("max_shard_size: got '5 parsecs'", ["--max-shard-size", "5 parsecs"]),
        ],
    )
    def test_options(self, tmp_path, source, capsys, message, options):
        (tmp_path / "short.txt").write_text("so")
        options = [tmp_path / "short.txt" if x == "TEXT" else x for x in options]
        if message.startswith("lm_head"):  # the first layer that does not fit
            message = "model.layers.0.self_attn.q_proj: got 64 input features"
        self.refused(message, source, tmp_path / "out", capsys, *options)

    def test_form(self, tmp_path, source):
        with pytest.raises(ValueError, match="^weights: got 'packed', want 'int8' or 'int4'$"):
            to_integers(source, tmp_path / "out", weights="packed")

    def test_sources(self, tmp_path, source, text, capsys):
        output = tmp_path / "out"
        self.refused("source: got 'maker/none'", "maker/none", output, capsys)
        llama = LlamaForCausalLM(
            LlamaConfig(**{name: 32 for name in ("hidden_size", "intermediate_size", "vocab_size")})
        )
        llama.save_pretrained(tmp_path / "llama")
        self.refused("model_type: got 'llama', want 'sigma_diffqkv'", tmp_path / "llama", output, capsys)
        to_integers(source, tmp_path / "int8", weights="int8")
        self.refused("quantization_config: got a quantised model", tmp_path / "int8", output, capsys)
        bare = shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*"))
        self.refused("text: got a source without tokenizer", bare, output, capsys, "--text", text, "--context", 32)

    @pytest.mark.parametrize("bad, dtype", [(torch.nan, "float32"), (torch.inf, "bfloat16"), (1e6, "float16")])
    def test_weights_that_are_not_finite(self, tmp_path, source, capsys, bad, dtype):
        broken = edited(source, tmp_path / "broken", lambda tensors: tensors[GATE].view(-1)[7:8].fill_(bad))
        shown = "nan" if bad != bad else "inf"
        message = f"{GATE}: got {shown} in {dtype}, want finite numbers"
        self.refused(message, broken, tmp_path / "out", capsys, "--dtype", dtype)

    def test_weights_that_overflow_when_they_are_folded(self, tmp_path, source, capsys):
        name = "model.layers.0.self_attn.{}.weight"

        def edit(tensors):
            for part in ("q_proj", "q_gate_proj"):
                tensors[name.format(part)].fill_(1e3)

        broken = edited(source, tmp_path / "broken", edit)
        self.refused(
            "source: got weights that are not finite in float16 when folded",
            broken,
            tmp_path / "out",
            capsys,
            "--dtype",
            "float16",
        )
