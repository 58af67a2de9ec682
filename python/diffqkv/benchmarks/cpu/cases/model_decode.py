"""Model decode: one step of a whole Sigma-1.5B beside a Llama of equal size, both with random weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, wraps
from statistics import median

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import diffqkv
from diffqkv.cache import CacheLayer

from ...common import timing
from ...common.accuracy import distance
from ...common.line import Contenders
from ...common.targets import LLAMA, OURS
from .. import limits
from ..layer import Size

TITLE = (
    "one token through Sigma-1.5B with its `diffqkv.Cache`, and through a Llama of equal size (GQA-16, sdpa) with its "
    "`DynamicCache`; fused: after `fuse_for_inference`, also beside the model as it was; tokens/s, and the parts of a "
    "step in ms: ours (the Llama's); limit: reading weights and cache"
)
SIZES = (Size(1024), Size(4096), Size(4096, fused=True), Size(16384))
UNFUSED = "not fused"
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # a distance of the logits
_CHECKED_TOKENS = 1024  # at most: the check takes a second cache
_SPLIT_STEPS = 3


def sigma_config() -> diffqkv.SigmaConfig:
    return diffqkv.SigmaConfig.from_preset("sigma-1.5b")


def _on_meta(model_class: type, config) -> nn.Module:
    with torch.device("meta"):
        return model_class(config)


def llama_of_equal_size(sigma: diffqkv.SigmaConfig) -> LlamaConfig:
    """The paper's baseline: 16 K and 16 V heads, no augmented Q; the FFN takes the parameters that are left."""
    config = LlamaConfig(
        vocab_size=sigma.vocab_size,
        hidden_size=sigma.hidden_size,
        intermediate_size=sigma.intermediate_size,
        num_hidden_layers=sigma.num_hidden_layers,
        num_attention_heads=sigma.num_attention_heads,
        num_key_value_heads=sigma.num_value_heads,
        head_dim=sigma.head_dim,
        max_position_embeddings=sigma.max_position_embeddings,
        tie_word_embeddings=sigma.tie_word_embeddings,
        attn_implementation="sdpa",
    )
    ours, theirs = _on_meta(diffqkv.SigmaForCausalLM, sigma), _on_meta(LlamaForCausalLM, config)
    left = ours.num_parameters() - theirs.num_parameters()
    config.intermediate_size += round(left / (3 * config.hidden_size * config.num_hidden_layers))
    return config


def _give_weights(model: nn.Module, pool: Tensor) -> nn.Module:
    """Makes the weights of a model on the meta device views of one pool of numbers.

    Two models then need the memory of one; neither finds its weights in the L3, for each goes through all of them.
    """
    begin = 0
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            end = begin + weight.numel()
            values = pool[begin:end].view(weight.shape) if weight.dim() > 1 else pool.new_ones(weight.shape)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
            begin = end
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # has buffers, computed when it is made
    return model.eval()


@lru_cache(maxsize=1)  # models of one dtype at a time
def _models(dtype: torch.dtype) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Sigma, the Llama, and the same Sigma fused: it has only the fused weights for itself."""
    config = sigma_config()
    models = _on_meta(diffqkv.SigmaForCausalLM, config), _on_meta(LlamaForCausalLM, llama_of_equal_size(config))
    size = max(model.num_parameters() for model in models)
    numbers = (torch.randn(min(size, 1 << 24)) * config.initializer_range).to(dtype)
    pool = numbers.repeat(-(-size // len(numbers)))
    sigma, llama = (_give_weights(model, pool) for model in models)
    fused = _give_weights(_on_meta(diffqkv.SigmaForCausalLM, config), pool).fuse_for_inference()
    return sigma, llama, fused


def _filled(model: nn.Module, tokens: int, dtype: torch.dtype):
    """A cache with random K and V: running the prompt would take minutes and change no step."""
    config = model.config
    if isinstance(config, diffqkv.SigmaConfig):
        cache = diffqkv.Cache(config, max_length=tokens + 1)
        for i, shape in enumerate(cache.shapes):
            k = torch.randn(1, shape.n_k, tokens, shape.d_k).to(dtype)
            cache.append(k, torch.randn(1, shape.n_v, tokens, shape.d_v).to(dtype), i)
        return cache
    cache = DynamicCache(config=config)
    for i in range(config.num_hidden_layers):
        k, v = torch.randn(2, 1, config.num_key_value_heads, tokens, config.head_dim).to(dtype)
        cache.update(k, v, i)
    return cache


def _step(model: nn.Module, cache) -> Tensor:
    """Logits of one more token; the cache is left as it was."""
    logits = model(torch.tensor([[1]]), cache=cache, use_cache=True).logits
    cache.crop(-1)
    return logits


def _error(model: nn.Module, unfused: nn.Module, tokens: int, dtype: torch.dtype) -> float:
    """The distance of the logits from those of torch's attention over a stock cache in the model as it was."""
    cache = _filled(model, tokens, dtype)
    stock = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        stock.update(layer.keys, layer.values, i)
    got = _step(model, cache)
    implementation = unfused.config._attn_implementation
    unfused.set_attn_implementation("sdpa")
    try:
        want = _step(unfused, stock)
    finally:
        unfused.set_attn_implementation(implementation)
    return distance(got, want)


def _timed(function: Callable, seconds: list[float]) -> Callable:
    @wraps(function)  # models look at what an attention function says of itself
    def call(*args, **kwargs):
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[-1] += time.perf_counter() - begin
        return result

    return call


@contextmanager
def _patched(owner: type, name: str, seconds: list[float]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, _timed(original, seconds))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _patched_attention(name: str, seconds: list[float]) -> Iterator[None]:
    original = ALL_ATTENTION_FUNCTIONS[name]
    AttentionInterface.register(name, _timed(original, seconds))
    try:
        yield
    finally:
        AttentionInterface.register(name, original)


def split(model: nn.Module, cache) -> dict[str, float]:
    """Milliseconds of a step by part, medians over some steps."""
    parts: dict[str, list[float]] = {"attention": [], "projections": [], "cache": [], "other": []}
    with ExitStack() as patches:
        patches.enter_context(_patched_attention(model.config._attn_implementation, parts["attention"]))
        patches.enter_context(_patched(nn.Linear, "forward", parts["projections"]))
        patches.enter_context(_patched(CacheLayer, "append", parts["cache"]))
        patches.enter_context(_patched(DynamicLayer, "update", parts["cache"]))
        for _ in range(_SPLIT_STEPS):
            for part in parts.values():
                part.append(0.0)
            begin = time.perf_counter()
            _step(model, cache)
            parts["other"][-1] = time.perf_counter() - begin - sum(part[-1] for part in parts.values())
    return {name: median(part) * 1e3 for name, part in parts.items()}


def contenders(size: Size, dtype: torch.dtype) -> Contenders:
    unfused, llama, fused = _models(dtype)
    sigma = fused if size.fused else unfused
    error = _error(sigma, unfused, min(size.tokens, _CHECKED_TOKENS), dtype)
    ours, theirs = _filled(sigma, size.tokens, dtype), _filled(llama, size.tokens, dtype)
    peers = {LLAMA: [lambda: _step(llama, theirs)]}
    if size.fused:
        peers[UNFUSED] = [lambda: _step(unfused, ours)]
    weights = sum(p.nbytes for p in sigma.parameters()) - sigma.get_input_embeddings().weight.nbytes

    def figures(record: dict) -> dict[str, dict[str, float]]:
        own, other = split(sigma, ours), split(llama, theirs)
        rates = {"tokens/s": {who: 1e3 / record["ms"][who] for who in (OURS, LLAMA)}}
        return rates | {part: {OURS: own[part], LLAMA: other[part]} for part in own}

    return Contenders(
        error=error,
        tolerance=_TOLERANCE[dtype],
        ours=[lambda: _step(sigma, ours)],
        peers=peers,
        limit=limits.read(timing.POOL_BYTES),
        work=weights + sum(layer.keys.nbytes + layer.values.nbytes for layer in ours.layers),
        figures=figures,
    )
