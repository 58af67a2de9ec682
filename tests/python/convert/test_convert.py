"""Conversion: exact where heads stay or repeat, pooled or fitted where they do not, and nothing half-written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import PAGES
from paths import ROOT
from safetensors.torch import load_file, save_file
from tiny_sigma import tiny_config
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import diffqkv
from diffqkv import SigmaForCausalLM
from diffqkv.__main__ import main
from diffqkv.convert import job, to_llama, to_sigma
from diffqkv.convert.augmented_q import fit_augmented_q
from diffqkv.convert.head_maps import Moments, fit_key_map, pool_heads
from diffqkv.convert.measure import read_windows
from diffqkv.data import byte_tokenizer, train_bpe

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 258,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
    # Wide enough that attention is not flat.
    "initializer_range": 0.15,
}
SCALED_ROPE = {
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
}
K_PROJ, V_PROJ = "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"


def save_source(folder: Path, family="llama", seed=0, dtype=torch.float32, max_shard_size="5GB", **fields) -> Path:
    """A random model of the family with a tokenizer of bytes."""
    torch.manual_seed(seed)
    defaults = {"sliding_window": None} if family == "mistral" else {}
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**{**TINY, **defaults, **fields}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    # Transformers gives every qwen2 a tokenizer of pieces; without merges it is one of bytes too.
    (train_bpe([], 258, 64) if family == "qwen2" else byte_tokenizer(64)).save_pretrained(folder)
    return folder


def logits(folder: Path, tokens=40) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(256, (2, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(folder: Path, edit) -> None:
    tensors = weights(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_source(tmp_path_factory.mktemp("llama") / "source")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((ROOT / "README.md").read_text()[:6000])
    return path


class TestExact:
    """With the source's heads, or each of them several times, the model is the source's."""

    @pytest.mark.parametrize(
        "family, fields",
        [
            ("llama", {}),
            ("llama", {"attention_bias": True, "mlp_bias": True}),
            ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 8}),
            ("llama", {"head_dim": 24}),
            ("mistral", {"head_dim": 24}),
            ("mistral", {"sliding_window": 64}),
            ("qwen2", {}),
            ("qwen2", {"use_sliding_window": False, "sliding_window": 16}),
            *(("llama", {"rope_parameters": {"rope_type": t, "rope_theta": 5e3, **o}}) for t, o in SCALED_ROPE.items()),
        ],
        ids=str,
    )
    def test_same_heads(self, tmp_path, family, fields):
        source = save_source(tmp_path / "source", family, **fields)
        to_sigma(source, tmp_path / "sigma", num_key_heads={**TINY, **fields}["num_key_value_heads"])
        assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "sigma"), SigmaForCausalLM)
        torch.testing.assert_close(logits(tmp_path / "sigma"), logits(source), atol=2e-4, rtol=1e-4)

    @pytest.mark.parametrize("n_k, n_v", [(8, 4), (4, 8), (8, 8)])
    @pytest.mark.parametrize("key_map", ["mean", "fit"])
    def test_repeated_heads(self, tmp_path, llama, n_k, n_v, key_map):
        to_sigma(llama, tmp_path / "out", num_key_heads=n_k, num_value_heads=n_v, key_map=key_map)
        torch.testing.assert_close(logits(tmp_path / "out"), logits(llama), atol=2e-4, rtol=1e-4)

    def test_weights_stay_bit_for_bit(self, tmp_path, llama):
        to_sigma(llama, tmp_path / "out", num_key_heads=4)
        before, after = weights(llama), weights(tmp_path / "out")
        assert before.keys() == after.keys()
        assert all(torch.equal(x, after[name]) for name, x in before.items())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dtype_is_the_sources_or_chosen(self, tmp_path, dtype):
        source = save_source(tmp_path / "source", "qwen2", dtype=dtype)
        to_sigma(source, tmp_path / "kept", num_key_heads=2)
        assert {x.dtype for x in weights(tmp_path / "kept").values()} == {dtype}
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "kept").dtype == dtype
        report = to_sigma(source, tmp_path / "wide", num_key_heads=4, dtype=torch.float32)
        assert {x.dtype for x in weights(tmp_path / "wide").values()} == {torch.float32}
        assert (report["before"]["dtype"], report["after"]["dtype"]) == (str(dtype).removeprefix("torch."), "float32")
        torch.testing.assert_close(logits(tmp_path / "wide"), logits(source), atol=2e-4, rtol=1e-4)

    def test_redundant_tensors_of_old_checkpoints(self, tmp_path):
        source = save_source(tmp_path / "source", tie_word_embeddings=True)
        want = logits(source)

        def add(tensors):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

        edit_weights(source, add)
        report = to_sigma(source, tmp_path / "out", num_key_heads=4)
        assert "lm_head.weight" not in weights(tmp_path / "out")
        assert report["before"]["parameters"] == report["after"]["parameters"]
        torch.testing.assert_close(logits(tmp_path / "out"), want, atol=2e-4, rtol=1e-4)

    @pytest.mark.parametrize("heads", [(8, 2, 4), (12, 4, 6), (8, 1, 8), (8, 8, 8)])
    @pytest.mark.parametrize("fields", [{}, {"attention_bias": True, "tie_word_embeddings": True}], ids=str)
    def test_sigma_to_llama(self, tmp_path, heads, fields):
        fields = {**fields, "hidden_size": 96, "head_dim": 16, "vocab_size": 258}
        torch.manual_seed(0)
        model = SigmaForCausalLM(tiny_config(heads, q_aug_dim=None, **fields))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(tmp_path / "sigma")
        report = to_llama(tmp_path / "sigma", tmp_path / "llama")
        n_kv = {(8, 2, 4): 4, (12, 4, 6): 12, (8, 1, 8): 8, (8, 8, 8): 8}[heads]
        assert report["after"]["heads"] == [heads[0], n_kv, n_kv]
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "llama").config.model_type == "llama"
        torch.testing.assert_close(logits(tmp_path / "llama"), logits(tmp_path / "sigma"), atol=2e-4, rtol=1e-4)

    def test_there_and_back(self, tmp_path, llama):
        to_sigma(llama, tmp_path / "sigma", num_key_heads=8, num_value_heads=4)
        to_llama(tmp_path / "sigma", tmp_path / "back")
        before, after = weights(llama), weights(tmp_path / "back")
        repeated = before[K_PROJ].view(4, 8, 64).repeat_interleave(2, 0).flatten(0, 1)
        assert torch.equal(after[K_PROJ], repeated)
        assert all(
            torch.equal(after[name], x) for name, x in before.items() if "k_proj" not in name and "v_proj" not in name
        )
        torch.testing.assert_close(logits(tmp_path / "back"), logits(llama), atol=2e-4, rtol=1e-4)


class TestPooling:
    @pytest.mark.parametrize("n_k, n_v", [(2, 4), (1, 2), (4, 1)])
    def test_mean_of_adjacent_heads(self, tmp_path, llama, n_k, n_v):
        to_sigma(llama, tmp_path / "out", num_key_heads=n_k, num_value_heads=n_v)
        before, after = weights(llama), weights(tmp_path / "out")
        for name, n in ((K_PROJ, n_k), (V_PROJ, n_v)):
            heads = list(before[name].split(8))
            size = 4 // n
            pooled = [sum(heads[i : i + size]) / size for i in range(0, 4, size)]
            torch.testing.assert_close(after[name], torch.cat(pooled), atol=1e-6, rtol=1e-5)

    def test_heads_that_do_not_divide_each_other(self):
        weight, bias = torch.randn(4 * 8, 16), torch.randn(4 * 8)
        # Of 12 query heads, each new head serves 4, and each old one served 3.
        shares = [(3, 1, 0, 0), (0, 2, 2, 0), (0, 0, 1, 3)]
        for x in (weight, bias):
            want = [sum(share * old for share, old in zip(s, x.split(8), strict=True)) / 4 for s in shares]
            torch.testing.assert_close(pool_heads(x, 4, 3, 12), torch.cat(want))

    def test_16_bit_weights_are_rounded_once(self):
        x = torch.randn(8 * 16, 32).bfloat16()
        want = x.double().view(2, 4, 16, 32).mean(1).flatten(0, 1)
        assert torch.equal(pool_heads(x, 8, 2, 8), want.float().bfloat16())


def rotated_scores(q, k, positions):
    """Scores `[heads, queries, keys]` of q and k `[tokens, heads, d]`, turned as Llama turns them."""
    d = q.shape[-1]
    angles = positions[:, None] * 10000.0 ** -(torch.arange(d // 2) / (d // 2))
    angles = torch.cat((angles, angles), -1)[None]
    q, k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], angles.cos(), angles.sin())
    return (q @ k.mT)[0]


class TestFit:
    @pytest.mark.parametrize("n_q, heads, n_k", [(8, 8, 2), (8, 4, 1), (12, 4, 3), (12, 6, 2)])
    def test_the_criterion_is_the_error_of_the_scores(self, n_q, heads, n_k):
        tokens, d = 1500, 16
        q = torch.randn(tokens, n_q, d) * torch.rand(n_q, d)
        k = torch.randn(tokens, heads, d) + 2 * torch.randn(tokens, 1, d)
        fit = fit_key_map(Moments.of(q, k), n_k)

        def error(new_q, new_k):
            positions = torch.randint(100_000, (tokens,))
            expand = [x.repeat_interleave(n_q // x.shape[1], 1) for x in (k, new_k)]
            exact, changed = (rotated_scores(a, b, positions) for a, b in zip((q, new_q), expand, strict=True))
            return ((exact - changed).square().sum() / exact.square().sum()).item()

        new_q = fit.of_query(q.flatten(1).T).T.view_as(q)
        new_k = fit.of_key(k.flatten(1).T).T.unflatten(1, (n_k, d))
        pooled = pool_heads(k.flatten(1).T, heads, n_k, n_q).T.unflatten(1, (n_k, d))
        assert fit.error < fit.mean_error
        assert error(new_q, new_k) == pytest.approx(fit.error, rel=0.05)
        assert error(q, pooled) == pytest.approx(fit.mean_error, rel=0.05)

    def test_no_other_map_is_better(self):
        q, k = torch.randn(400, 4, 8), torch.randn(400, 4, 8) + torch.randn(400, 1, 8)
        moments = Moments.of(q, k)
        best = fit_key_map(moments, 1)
        from diffqkv.convert import head_maps

        energy = moments.query[:, None]
        covariance = moments.key[:, None]
        b, a = best.key.conj().permute(2, 0, 1), best.query.conj().T[:, None]
        assert head_maps._score_error(covariance, energy, b, a) == pytest.approx(best.error, rel=1e-9)
        for _ in range(20):
            noise = [0.05 * torch.randn_like(x) for x in (b, a)]
            assert head_maps._score_error(covariance, energy, b + noise[0], a + noise[1]) > best.error

    def test_heads_that_are_turned_copies_are_merged_without_loss(self):
        turns = torch.polar(torch.ones(4, 8), torch.rand(4, 8) * 6)
        k = torch.randn(300, 1, 16)
        copies = torch.complex(*k.chunk(2, -1)) * turns
        copies = torch.cat((copies.real, copies.imag), -1)
        fit = fit_key_map(Moments.of(torch.randn(300, 4, 16), copies), 1)
        assert fit.error < 1e-6 < 0.1 < fit.mean_error

    def test_queries_that_are_zero(self):
        fit = fit_key_map(Moments.of(torch.zeros(10, 4, 8), torch.randn(10, 4, 8)), 2)
        assert fit.key.isfinite().all() and fit.query.isfinite().all()

    @pytest.mark.parametrize("family", ["llama", "qwen2"])
    def test_of_a_checkpoint(self, tmp_path, text, family):
        source = save_source(tmp_path / "source", family)
        options = {"num_key_heads": 2, "text": text, "text_tokens": 4096, "context": 64}
        mean = to_sigma(source, tmp_path / "mean", **options)
        fit = to_sigma(source, tmp_path / "fit", key_map="fit", **options)
        assert mean["fit"] is None and fit["fit"]["tokens"] == 2048 and fit["text"]["tokens"] == 2048
        assert len(fit["fit"]["layers"]) == 2
        assert all(layer["score_error"] < layer["score_error_of_mean_pooling"] for layer in fit["fit"]["layers"])
        assert fit["text"]["mean_kl"] < mean["text"]["mean_kl"]
        changed = {
            n.split(".")[4] for n, x in weights(source).items() if not torch.equal(x, weights(tmp_path / "fit")[n])
        }
        assert changed == {"q_proj", "k_proj"}


class TestAugmentedQ:
    @pytest.mark.parametrize("dim", [32, 48, 64])
    def test_hands_q_on(self, dim):
        q = torch.randn(3000, 48) @ torch.diag(0.7 ** torch.arange(48.0)) + 2 * torch.randn(48)
        fit = fit_augmented_q(q, dim)
        assert fit.gate.shape == fit.up.shape == (dim, 48) and fit.down.shape == (48, dim)
        assert fit.error < 1e-3

    def test_reports_the_error_on_other_tokens(self):
        q = torch.randn(4000, 16)  # no direction is constant: nothing to stand on
        fit = fit_augmented_q(q, 24)
        other = torch.randn(4000, 16)
        change = diffqkv.swiglu(other @ fit.gate.T, other @ fit.up.T) @ fit.down.T - other
        assert (change.square().sum() / other.square().sum()).item() == pytest.approx(fit.error, rel=0.1)
        assert fit.error > 0.3

    @pytest.mark.parametrize("key_map", ["mean", "fit"])
    def test_of_a_checkpoint(self, tmp_path, text, key_map):
        source = save_source(tmp_path / "source", "qwen2")
        options = {"num_key_heads": 2, "text": text, "context": 64, "key_map": key_map}
        plain = to_sigma(source, tmp_path / "plain", **options)
        report = to_sigma(source, tmp_path / "augmented", q_aug_dim=96, **options)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "augmented")
        assert model.config.q_aug_dim == 96 and model.model.layers[0].self_attn.q_gate_proj.weight.shape == (96, 64)
        assert all(layer["q_error"] < 0.1 for layer in report["fit"]["layers"])
        assert report["text"]["perplexity"]["after"] < 1.1 * plain["text"]["perplexity"]["after"]
        assert report["after"]["parameters"] - plain["after"]["parameters"] == 2 * 3 * 96 * 64


class TestReport:
    def test_measures_what_the_models_do(self, tmp_path, llama, text):
        report = to_sigma(llama, tmp_path / "out", num_key_heads=2, text=[text], text_tokens=1024, context=32)
        assert json.loads((tmp_path / "out" / "conversion.json").read_text()) == report
        windows = read_windows([text], llama, 258, 32, 1024, 1)
        before, after = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (llama, tmp_path / "out"))
        with torch.no_grad():
            p, q = before(windows, labels=windows), after(windows, labels=windows)
        measured = report["text"]
        assert measured["tokens"] == windows.numel() == 1024
        assert measured["perplexity"]["before"] == pytest.approx(p.loss.exp().item(), rel=1e-4)
        assert measured["perplexity"]["after"] == pytest.approx(q.loss.exp().item(), rel=1e-4)
        assert measured["max_logit_difference"] == pytest.approx((p.logits - q.logits).abs().max().item(), rel=1e-3)
        logs = [x.logits.log_softmax(-1) for x in (p, q)]
        kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item()
        assert measured["mean_kl"] == pytest.approx(kl, rel=1e-3)

    def test_costs(self, tmp_path, llama):
        report = to_sigma(llama, tmp_path / "out", num_key_heads=2)
        for side, folder in (("before", llama), ("after", tmp_path / "out")):
            model = AutoModelForCausalLM.from_pretrained(folder)
            assert report[side]["parameters"] == model.num_parameters()
        assert report["before"]["heads"] == [8, 4, 4] and report["after"]["heads"] == [8, 2, 4]
        assert report["before"]["cache_bytes_per_token"] == 2 * (4 + 4) * 8 * 4
        assert report["after"]["cache_bytes_per_token"] == 2 * (2 + 4) * 8 * 4
        assert report["text"] is None

    def test_windows_begin_as_the_tokenizer_begins(self, tmp_path, text):
        from tokenizers.processors import TemplateProcessing

        tokenizer = byte_tokenizer(64)
        plain = AutoTokenizer.from_pretrained(save_source(tmp_path / "source"))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
        )
        tokenizer.save_pretrained(tmp_path / "bos")
        windows = read_windows([text], tmp_path / "bos", 258, 32, 320, 1)
        assert windows.shape == (10, 32) and (windows[:, 0] == 256).all()
        ids = plain(text.read_text())["input_ids"]
        assert windows[:, 1:].flatten().tolist() == ids[:310]


class TestFiles:
    def test_companions_are_copied(self, tmp_path, llama):
        source = shutil.copytree(llama, tmp_path / "source")
        (source / "LICENSE").write_text("as you like")
        (source / "chat_template.jinja").write_text("{{ messages }}")
        (source / "pytorch_model.bin").write_text("not this")
        to_sigma(source, tmp_path / "out", num_key_heads=4)
        for name in (
            "LICENSE",
            "chat_template.jinja",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
        ):
            assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
        assert not (tmp_path / "out" / "pytorch_model.bin").exists()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert tokenizer.decode(tokenizer("words")["input_ids"]) == "words"

    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
    def test_the_tokenizer_stays_the_same(self, tmp_path, text, family):
        source = save_source(tmp_path / "source", family)
        to_sigma(source, tmp_path / "out", num_key_heads=4)
        before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "out"))
        assert type(after) is type(before)
        ids = before(text.read_text())["input_ids"]
        assert after(text.read_text())["input_ids"] == ids and len(ids) > 5000

    def test_readers_without_the_package(self, tmp_path, llama):
        to_sigma(llama, tmp_path / "out", num_key_heads=4)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["architectures"] == ["SigmaForCausalLM"] and config["model_type"] == "sigma_diffqkv"
        for name in config["auto_map"].values():
            assert (tmp_path / "out" / f"{name.split('.')[0]}.py").exists()

    def test_shards(self, tmp_path, llama):
        source = save_source(tmp_path / "source", max_shard_size="60KB")
        assert len(list(source.glob("*.safetensors"))) > 3
        to_sigma(source, tmp_path / "out", num_key_heads=4, max_shard_size="100KB")
        shards = list((tmp_path / "out").glob("*.safetensors"))
        assert len(shards) > 2 and all(path.stat().st_size < 110_000 for path in shards)
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == weights(tmp_path / "out").keys()
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in weights(tmp_path / "out").values())
        torch.testing.assert_close(logits(tmp_path / "out"), logits(llama), atol=2e-4, rtol=1e-4)

    @pytest.mark.parametrize("there_is_a_model", [False, True])
    def test_an_error_leaves_nothing_new(self, tmp_path, llama, monkeypatch, there_is_a_model):
        output = tmp_path / "out"
        if there_is_a_model:
            shutil.copytree(llama, output)
        written = []

        def interrupted(*args, **kwargs):
            written.extend(tmp_path.glob(".out.part/*.safetensors"))
            raise KeyboardInterrupt

        monkeypatch.setattr(job, "custom_object_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            to_sigma(llama, output, num_key_heads=2, overwrite=True)
        assert written, "the weights had been written elsewhere"
        assert [path.name for path in tmp_path.iterdir()] == (["out"] if there_is_a_model else [])
        if there_is_a_model:
            assert torch.equal(logits(output), logits(llama))

    def test_overwrite(self, tmp_path, llama):
        to_sigma(llama, tmp_path / "out", num_key_heads=2)
        (tmp_path / "out" / "of the old one").touch()
        to_sigma(llama, tmp_path / "out", num_key_heads=4, overwrite=True)
        assert not (tmp_path / "out" / "of the old one").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_key_heads == 4


STREAM = """
import os, sys
from diffqkv.convert import checkpoint
from diffqkv.convert import to_sigma

small, output, files = sys.argv[1], sys.argv[2], int(sys.argv[3])
to_sigma(small, output + "-small", num_key_heads=1, overwrite=True)  # all code is loaded


def sync(path):
    global files
    files -= 1
    if not files:
        os._exit(9)


checkpoint.sync = sync
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forgets the peak
resident = lambda name: int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) << 10
before = resident("VmRSS")
to_sigma("maker/large", output, num_key_heads=1, max_shard_size="8MB")
print(resident("VmHWM") - before)
"""


def test_streams_from_the_hub_cache_and_starts_again_after_a_kill(tmp_path, llama):
    repository = tmp_path / "hub" / "models--maker--large"
    large = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 4096}
    snapshot = save_source(repository / "snapshots" / "c0ffee", max_shard_size="8MB", **large)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    total = sum(path.stat().st_size for path in snapshot.glob("*.safetensors"))
    assert total > 110 << 20
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def run(stop_at):
        command = [sys.executable, "-c", STREAM, str(llama), str(tmp_path / "out"), str(stop_at)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    killed = run(stop_at=4)
    assert killed.returncode == 9, killed.stderr
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / ".out.part").glob("*.safetensors"))) == 4
    whole = run(stop_at=-1)
    assert whole.returncode == 0, whole.stderr
    assert not (tmp_path / ".out.part").exists()
    # Two files of 8 MB, one mapped and one being made, and what torch takes to work.
    assert int(whole.stdout) < 40 << 20
    assert weights(tmp_path / "out")[K_PROJ].shape == (64, 512)


def refused(message, source, output, **options):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        to_sigma(source, output, **{"num_key_heads": 2, **options})
    assert not list(output.parent.glob(f".{output.name}.*")), "nothing was begun"


class TestRefusals:
    @pytest.mark.parametrize(
        "message, options",
        [
            ("num_key_heads: got 3, want a divisor of num_attention_heads", {"num_key_heads": 3}),
            ("num_key_heads: got 0", {"num_key_heads": 0}),
            ("num_value_heads: got 16, want a divisor", {"num_value_heads": 16}),
            ("key_map: got 'median', want 'mean' or 'fit'", {"key_map": "median"}),
            ("q_aug_dim: got 0, want a positive integer", {"q_aug_dim": 0, "text": "text"}),
            ("text: got none, want files of sample text, to which key_map is fitted", {"key_map": "fit"}),
            ("text: got none, .* to which q_aug_dim is fitted", {"q_aug_dim": 64}),
            ("text: got none, .* to which key_map and q_aug_dim is", {"q_aug_dim": 64, "key_map": "fit"}),
            ("dtype: got torch.int8, want torch.float32", {"dtype": torch.int8}),
            ("max_shard_size: got '5 parsecs'", {"max_shard_size": "5 parsecs"}),
            ("context: got 65, want 2 to max_position_embeddings .64.", {"text": "text", "context": 65}),
            ("text_tokens: got 10, want at least 32", {"text": "text", "context": 32, "text_tokens": 10}),
            (
                "text_tokens: got 32, want at least 64",
                {"text": "text", "context": 32, "text_tokens": 32, "key_map": "fit"},
            ),
            ("no such file", {"text": "missing", "context": 32}),
        ],
        ids=str,
    )
    def test_arguments(self, tmp_path, llama, text, message, options):
        if "text" in options:
            options = {**options, "text": text if options["text"] == "text" else tmp_path / "no such file"}
        refused(message, llama, tmp_path / "out", **options)

    def test_short_text(self, tmp_path, llama):
        (tmp_path / "short.txt").write_text("a few words")
        refused(
            "text: got 12 tokens, want at least 32: 1 windows",
            llama, tmp_path / "out", text=tmp_path / "short.txt", context=32,
        )  # fmt: skip

    @pytest.mark.parametrize(
        "message, family, fields",
        [
            ("model_type: got 'qwen3', whose q_norm and k_norm Sigma has no place for", "qwen3", {}),
            ("sliding_window: got 16, want None or at least max_position", "mistral", {"sliding_window": 16}),
            (
                "sliding_window: got 16", "qwen2",
                {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            ),
            ("hidden_act: got 'gelu' with q_aug_dim", "llama", {"hidden_act": "gelu"}),
        ],
    )  # fmt: skip
    def test_models_without_a_place(self, tmp_path, text, message, family, fields):
        source = save_source(tmp_path / "source", family, **fields)
        options = {"q_aug_dim": 64, "text": text} if family == "llama" else {}
        refused(message, source, tmp_path / "out", **options)

    @pytest.mark.parametrize(
        "message, fields",
        [
            ("model_type: got 'gpt2', want 'llama' or 'mistral' or 'qwen2'", {"model_type": "gpt2"}),
            ("model_type: got None", {"model_type": None}),
            ("(?s)config.json: .*head_dim.=7|want .28, 64. by config.json", {"head_dim": 7}),
            ("quantization_config: got a quantised model", {"quantization_config": {"quant_method": "fp8"}}),
            (
                "layer_types: got .'chunked_attention'.",
                {"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2},
            ),
            (
                "rope_parameters: got partial_rotary_factor=0.5",
                {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            ),
            ("shape .32, 64., want .16, 64. by config.json", {"num_key_value_heads": 2}),
            ("source: got no model.layers.2.* and 6 more tensors, want all of", {"num_hidden_layers": 3}),
            ("source: got model.layers.1.* and 6 more tensors, want .* alone", {"num_hidden_layers": 1}),
            ("source: got no model.layers.0.self_attn.q_proj.bias", {"attention_bias": True}),
            ("tie_word_embeddings: got true and a lm_head.weight of its own", {"tie_word_embeddings": True}),
        ],
        ids=str,
    )
    def test_configs_that_do_not_fit_the_weights(self, tmp_path, llama, message, fields):
        source = shutil.copytree(llama, tmp_path / "source")
        edit_config(source, **fields)
        if fields.get("model_type") == "qwen2":
            biases = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
            edit_weights(source, lambda tensors: tensors.update(
                {f"model.layers.{i}.self_attn.{n}.bias": torch.zeros(d) for i in (0, 1) for n, d in biases.items()}
            ))  # fmt: skip
        refused(message, source, tmp_path / "out")

    def test_weights(self, tmp_path, llama):
        source, output = shutil.copytree(llama, tmp_path / "source"), tmp_path / "out"
        file = source / "model.safetensors"
        edit_weights(source, lambda tensors: tensors.update({K_PROJ: tensors[K_PROJ].to(torch.int8)}))
        refused(f"{re.escape(K_PROJ)}: got dtype I8, want one of F64, F32, BF16, F16", source, output)
        file.write_bytes(file.read_bytes()[:-1000])
        refused("source: got a damaged model.safetensors", source, output)
        file.unlink()
        refused("source: got no model.safetensors in", source, output)
        (source / "model.safetensors.index.json").write_text("{}")
        refused("source: got a damaged model.safetensors.index.json", source, output)

    def test_places(self, tmp_path, llama):
        refused("source: got .*, want a folder with config.json", tmp_path / "none", tmp_path / "out")
        refused("source: got 'maker/none'.*local hub cache", "maker/none", tmp_path / "out")
        source = shutil.copytree(llama, tmp_path / "source")
        for output in (source, tmp_path):
            refused("output: got .*, where the source is", source, output, overwrite=True)
        (tmp_path / "file").touch()
        refused("output: got .*, a file or", source, tmp_path / "file")
        notes = tmp_path / "notes"
        notes.mkdir()
        (notes / "thesis.txt").touch()
        refused("output: got .*, which is not empty, want an empty folder or overwrite", source, notes)
        refused("output: got .*, which is no model's", source, notes, overwrite=True)
        assert (notes / "thesis.txt").exists()

    def test_tokenizers(self, tmp_path, llama, text):
        source = shutil.copytree(llama, tmp_path / "source")
        byte_tokenizer(64).save_pretrained(source)
        tokenizer = json.loads((source / "tokenizer.json").read_text())
        tokenizer["added_tokens"].append(
            {**tokenizer["added_tokens"][0], "id": 300, "content": "CMake", "special": False}
        )
        tokenizer["model"]["vocab"]["CMake"] = 300
        (source / "tokenizer.json").write_text(json.dumps(tokenizer))
        (tmp_path / "cmake.txt").write_text("CMake " * 100)
        refused(
            "text: got token 300 .* ids below vocab_size",
            source,
            tmp_path / "out",
            text=tmp_path / "cmake.txt",
            context=32,
        )
        for path in source.glob("tokenizer*"):
            path.unlink()
        refused("text: got a source without tokenizer", source, tmp_path / "out", text=text, context=32)

    @pytest.mark.parametrize(
        "message, fields",
        [
            ("q_aug_dim: got 96, want None: Llama has no place for it", {"q_aug_dim": 96}),
            ("k_compression: got 'expand', want None", {"k_compression": "expand"}),
            ("k_compression: got 'absorbed', want None", {"k_compression": "absorbed"}),
            ("selective_v_top_k: got 5, want None", {"selective_v_top_k": 5}),
            ("selective_v_top_k: got .0, 5., want None", {"selective_v_top_k": [0, 5]}),
            ("hidden_size: got 60, want a multiple of num_attention_heads", {"hidden_size": 60}),
        ],
        ids=str,
    )
    def test_sigmas_that_are_no_llama(self, tmp_path, message, fields):
        SigmaForCausalLM(tiny_config(**{"q_aug_dim": None, **fields})).save_pretrained(tmp_path / "sigma")
        with pytest.raises(ValueError, match=message):
            to_llama(tmp_path / "sigma", tmp_path / "llama")
        assert [path.name for path in tmp_path.iterdir()] == ["sigma"]

    def test_a_llama_is_no_sigma(self, tmp_path, llama):
        with pytest.raises(ValueError, match="model_type: got 'llama', want 'sigma_diffqkv'"):
            to_llama(llama, tmp_path / "out")


class TestCommand:
    def test_converts_and_prints(self, tmp_path, llama, text, capsys):
        sigma, back = str(tmp_path / "sigma"), str(tmp_path / "back")
        options = [
            "--key-heads",
            "2",
            "--value-heads",
            "2",
            "--k-map",
            "fit",
            "--q-aug-dim",
            "80",
            "--dtype",
            "bfloat16",
        ]
        options += ["--text", str(text), "--text-tokens", "512", "--context", "32", "--max-shard-size", "1MB"]
        assert main(["convert", str(llama), sigma, *options]) == 0
        printed = capsys.readouterr().out
        for line in ("heads q/K/V +8/4/4 +8/2/2", "cache_bytes_per_token +512 +128", "perplexity +[0-9.]+ +[0-9.]+"):
            assert re.search(line, printed)
        assert "score_error_of_mean_pooling" in printed and "q_error" in printed and "mean KL divergence" in printed
        assert AutoModelForCausalLM.from_pretrained(sigma).config.q_aug_dim == 80

        assert main(["convert", str(llama), sigma, "--key-heads", "4", "--overwrite"]) == 0
        assert main(["convert", sigma, back, "--to", "llama"]) == 0
        torch.testing.assert_close(logits(tmp_path / "back"), logits(llama), atol=2e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        "message, options",
        [
            ("num_key_heads: got 5, want a divisor", ["--key-heads", "5"]),
            ("--key-heads: got none", []),
            ("num_key_heads: got 2 with --to llama", ["--to", "llama", "--key-heads", "2"]),
        ],
        ids=str,
    )
    def test_says_what_is_wrong(self, tmp_path, llama, capsys, message, options):
        assert main(["convert", str(llama), str(tmp_path / "out"), *options]) == 2
        assert re.match(f"convert: {message}", capsys.readouterr().err)
        assert not list(tmp_path.iterdir())


def test_recovery(tmp_path):
    sys.path.append(str(ROOT / "examples" / "python"))
    import recover_conversion

    (tmp_path / "text.txt").write_text("\n\n".join(PAGES.values()))
    losses = recover_conversion.main(
        f"--text {tmp_path}/text.txt --out {tmp_path} --source-steps 80 --steps 25 --batch-size 8 --context 64 "
        "--key-heads 1 --value-heads 2 --k-map mean".split()
    )
    assert losses["source"] < losses["converted"]
    # All of it and more where the source had not learnt all that its text has to teach.
    got_back = (losses["converted"] - losses["recovered"]) / (losses["converted"] - losses["source"])
    assert got_back > 0.3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "recovered").config.num_key_heads == 1
