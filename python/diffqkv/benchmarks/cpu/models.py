"""Whole models with random weights: Sigma-1.5B, and others of equal size."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

import diffqkv
from diffqkv import memory
from diffqkv.models.packed_linear import PackedLinear

from ..common.accuracy import distance

PLAIN = ""  # the form of a model as it is loaded
INTEGERS = ("int8", "int4")
_CHECKED_LAYERS, _CHECKED_VOCABULARY, _CHECKED_TOKENS = 2, 4096, 40
_RANDOM = 1 << 24  # numbers that are drawn; they repeat
_CACHED = 1024  # tokens


def tolerance(form: str, dtype: torch.dtype) -> float:
    """The largest distance of logits that is right; beside integer weights, x is rounded to 16 bits."""
    return 5e-2 if dtype == torch.bfloat16 else 1e-3 if form in INTEGERS else 1e-4


def sigma_config() -> diffqkv.SigmaConfig:
    return diffqkv.SigmaConfig.from_preset("sigma-1.5b")


def equal_in_size(config: diffqkv.SigmaConfig, **changes) -> diffqkv.SigmaConfig:
    """The configuration with these changes; the FFN takes the parameters that are left, or gives them."""
    changed = with_fields(config, **changes)
    return _with_ffn(changed, _parameters(config) - _parameters(changed))


def llama_of_equal_size(config: diffqkv.SigmaConfig) -> LlamaConfig:
    """The paper's baseline as stock transformers: as many K heads as V heads, no augmented Q."""
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        attn_implementation="sdpa",
    )
    return _with_ffn(llama, _parameters(config) - _parameters(llama))


def most_parameters(config: diffqkv.SigmaConfig) -> int:
    """The parameters of the largest of the models: their FFNs come in steps."""
    step = 3 * 32 * config.hidden_size * config.num_hidden_layers
    return _parameters(config) + step


def with_fields(config: diffqkv.SigmaConfig, **changes) -> diffqkv.SigmaConfig:
    """A copy of the configuration with these fields, checked as a new one is."""
    fields = {name: x for name, x in config.to_dict().items() if name not in ("transformers_version", "model_type")}
    return diffqkv.SigmaConfig(**{**fields, **changes})


def _parameters(config: PreTrainedConfig) -> int:
    return _on_meta(config, torch.float32).num_parameters()


def _with_ffn(config: PreTrainedConfig, parameters: int) -> PreTrainedConfig:
    # Multiples of a group of integer weights.
    per_group = 3 * 32 * config.hidden_size * config.num_hidden_layers
    config.intermediate_size += 32 * round(parameters / per_group)
    return config


def _on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    model_class = diffqkv.SigmaForCausalLM if isinstance(config, diffqkv.SigmaConfig) else LlamaForCausalLM
    with torch.device("meta"):
        return model_class(config).to(dtype)


class Pool:
    """Random numbers of one dtype, and bytes, of which models are made.

    All models are views of them, and need the memory of one; none finds its weights in the L3, for each goes through
    all of them. They lie in huge pages, as packed weights do.
    """

    def __init__(self, dtype: torch.dtype, parameters: int) -> None:
        self.dtype = dtype
        self.numbers = _repeated((torch.randn(min(parameters, _RANDOM)) * 0.02).to(dtype), parameters)
        self.bytes = self.numbers.view(torch.uint8)
        self.scales = _repeated(torch.rand(min(parameters, _RANDOM)).to(torch.bfloat16) / 64, parameters // 32)

    def model(self, config: PreTrainedConfig, form: str = PLAIN) -> nn.Module:
        """A model whose linear layers have a form of `fuse_for_inference`, or are as they are loaded."""
        model = _on_meta(config, self.dtype).eval()
        if form != PLAIN:
            model._take_form(form, 32)
        taken = {"numbers": 0, "bytes": 0, "scales": 0}
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                values = self._take(taken, weight) if weight.dim() > 1 else torch.ones(weight.shape, dtype=weight.dtype)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # has buffers, computed when it is made
        return model

    def _take(self, taken: dict[str, int], weight: Tensor) -> Tensor:
        kind = (
            "scales" if weight.dim() == 3 and weight.shape[-1] == 32 and weight.dtype == torch.bfloat16 else "numbers"
        )
        kind = kind if weight.is_floating_point() else "bytes"
        pool: Tensor = getattr(self, kind)
        if not weight.is_floating_point():
            pool = pool.view(weight.dtype)
        begin, size = taken[kind], prod(weight.shape)
        if begin + size > len(pool):
            begin = 0
        taken[kind] = begin + size
        return pool[begin : begin + size].view(weight.shape)


def _repeated(numbers: Tensor, size: int) -> Tensor:
    pool = memory.empty((size,), numbers.dtype)
    for part in pool.split(len(numbers)):
        part.copy_(numbers[: len(part)])
    return pool


def filled_cache(model: nn.Module, tokens: int, dtype: torch.dtype, batch: int = 1):
    """A cache with random K and V: running the prompt would take minutes and change no step."""
    config = model.config
    if isinstance(config, diffqkv.SigmaConfig):
        cache = diffqkv.Cache(config, max_length=tokens + 1)
        for i, shape in enumerate(cache.shapes):
            heads = (shape.n_k, shape.d_k), (shape.n_v, shape.d_v)
            cache.append(*(random_heads(batch, n, tokens, d, dtype) for n, d in heads), i)
        return cache
    cache = DynamicCache(config=config)
    for i in range(config.num_hidden_layers):
        n, d = config.num_key_value_heads, config.head_dim
        cache.update(*(random_heads(batch, n, tokens, d, dtype) for _ in range(2)), i)
    return cache


def random_heads(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Random `[batch, heads, tokens, dim]`; they repeat, for drawing them takes longer than all that is measured."""
    some = torch.randn(batch, heads, min(tokens, _CACHED), dim).to(dtype)
    return some.repeat(1, 1, -(-tokens // _CACHED), 1)[:, :, :tokens]


def step(model: nn.Module, cache, batch: int = 1) -> Tensor:
    """Logits of one more token of each sequence; the cache is left as it was."""
    logits = model(torch.ones(batch, 1, dtype=torch.long), cache=cache, use_cache=True).logits
    cache.crop(-1)
    return logits


def prompt(model: nn.Module, tokens: int) -> Tensor:
    """The logits of the last token of a prompt, which is cached."""
    return model(torch.ones(1, tokens, dtype=torch.long), use_cache=True, logits_to_keep=1).logits


def weight_bytes(model: nn.Module) -> int:
    """The bytes of weights that a step reads: the embedding is looked up."""
    return sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes


def multiplied_weights(model: nn.Module) -> int:
    """The weights by which a token is multiplied."""
    return sum(x.in_features * x.out_features for x in model.modules() if hasattr(x, "in_features"))


@torch.no_grad()
def error(form: str, dtype: torch.dtype) -> float:
    """The distance of the logits of a prompt and of steps behind it, of a Sigma of a few layers.

    It is compared with torch's products of the weights as they are, or as their integers say, and torch's attention
    over a stock cache.
    """
    config = sigma_config()
    config.num_hidden_layers = min(config.num_hidden_layers, _CHECKED_LAYERS)
    config.vocab_size = min(config.vocab_size, _CHECKED_VOCABULARY)
    model = diffqkv.SigmaForCausalLM(config).to(dtype).eval()
    ids = torch.randint(config.vocab_size, (2, _CHECKED_TOKENS))
    if form == PLAIN:
        return distance(_logits(model, ids), _logits(model, ids, stock=True))
    want = None if form in INTEGERS else _logits(model, ids, stock=True)
    model.fuse_for_inference(form)
    got = _logits(model, ids)
    if want is None:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, PackedLinear):
                model.set_submodule(name, layer.dense().to(dtype))
        want = _logits(model, ids, stock=True)
    return distance(got, want)


def _logits(model: nn.Module, ids: Tensor, stock: bool = False) -> Tensor:
    """Of the last two tokens: of a prompt, and of a step behind it."""
    if stock:
        model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config) if stock else diffqkv.Cache(model.config)
    logits = [model(part, cache=cache, use_cache=True).logits[:, -1] for part in (ids[:, :-1], ids[:, -1:])]
    if stock:
        model.set_attn_implementation("diffqkv")
    return torch.stack(logits)
