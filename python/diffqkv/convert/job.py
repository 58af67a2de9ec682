"""A conversion from beginning to end: what is read, made of it, written and reported."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from copy import deepcopy
from math import lcm
from pathlib import Path

import torch
from torch import Tensor

try:
    from transformers import LlamaConfig, PreTrainedConfig
    from transformers.dynamic_module_utils import custom_object_save

    from ..cache import cache_shapes
    from ..models.sigma import SigmaConfig
    from .checkpoint import (
        EMBEDDING,
        HEAD,
        Checkpoint,
        check_dtype,
        empty_model,
        open_model,
        plan_files,
        streamed_model,
        write_files,
    )
    from .files import check_output, copy_companions, new_folder, sample_windows, write_report
    from .fit import AttentionFit
    from .head_maps import pool_heads
except ImportError as error:
    raise ImportError(f"diffqkv.convert: {error}; pip install 'diffqkv[hf]'", name=error.name) from error

KEY_MAPS = ("mean", "fit")
REPORT = "conversion.json"

# What the configs have under one name, with one meaning.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)


def to_sigma(
    source: str | Path,
    output: str | Path,
    *,
    num_key_heads: int,
    num_value_heads: int | None = None,
    key_map: str = "mean",
    q_aug_dim: int | None = None,
    text: str | Path | Sequence[str | Path] = (),
    text_tokens: int = 16384,
    context: int = 512,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> dict[str, object]:
    """Makes a Sigma checkpoint of one of Llama, Mistral or Qwen2, and returns the report that is written beside it.

    With as many K and V heads as the source has, or a multiple, the logits stay equal within rounding.

    Args:
        source: folder of the checkpoint, or the id of a model in the hub's local cache.
        output: a new or empty folder.
        num_key_heads, num_value_heads: n_k and n_v, which divide the number of query heads. Default for n_v: the
            source's. Fewer V heads are mean-pooled.
        key_map: how K heads become fewer. "mean": mean pooling. "fit": those that change the scores least on sample
            text, for which `text` is needed; `diffqkv.convert.head_maps.fit_key_map` has the criterion.
        q_aug_dim: None: no augmented Q. A number: its intermediate dimension. It is fitted to hand q on unchanged on
            sample text, which it can do only nearly, without bias and residual (Appendix E).
        text: a file, folder or glob, or several, as `diffqkv.data.read_texts` takes them. With it, the report has the
            difference of the logits and both perplexities. A fit takes every second window, and the report the others.
        text_tokens, context: how much of it is read, and in windows of how many tokens.
        dtype: of the result: float32, bfloat16 or float16. Default: the source's.
        max_shard_size: of a file, in bytes or like "5GB".
        overwrite: whether a model in `output` is replaced.

    Raises:
        FileNotFoundError: there is no model at `source`, or no text. ValueError: something about an argument or the
            source is wrong, or has no place in a Sigma; the message names it. Nothing has been written then.
    """
    checkpoint, old = open_model(source, ("llama", "mistral", "qwen2"))
    _refuse_windows(old)
    n_kv = old.num_key_value_heads
    if key_map not in KEY_MAPS:
        raise ValueError(f"key_map: got {key_map!r}, want {' or '.join(map(repr, KEY_MAPS))}")
    if q_aug_dim is not None and old.hidden_act != "silu":
        raise ValueError(f"hidden_act: got {old.hidden_act!r} with q_aug_dim, want 'silu', which augmented Q takes too")
    new = SigmaConfig(
        **_shared_fields(checkpoint, old, dtype),
        num_key_heads=num_key_heads,
        num_value_heads=n_kv if num_value_heads is None else num_value_heads,
        q_aug_dim=q_aug_dim,
        attention_bias=old.model_type == "qwen2" or getattr(old, "attention_bias", False),
    )
    # Repeated heads are exact: no fit could be nearer.
    fits = {"key_map": key_map == "fit" and num_key_heads % n_kv != 0, "q_aug_dim": q_aug_dim is not None}
    if any(fits.values()) and not text:
        what = " and ".join(name for name, fit in fits.items() if fit)
        raise ValueError(f"text: got none, want files of sample text, to which {what} is fitted")
    job = _Job(checkpoint, old, new, output, dtype, max_shard_size, overwrite)
    windows = sample_windows(text, checkpoint, old, context, text_tokens, least=2 if any(fits.values()) else 1)
    report = {"key_map": key_map, "q_aug_dim": q_aug_dim, "fit": None}
    with new_folder(job.output) as folder:
        if not any(fits.values()):
            return job.finish(folder, windows, report)
        fit = AttentionFit(checkpoint, old, new, windows[1::2], folder / "fit", fits["key_map"])
        report["fit"] = {"tokens": windows[1::2].numel(), "layers": fit.layers}
        return job.finish(folder, windows[::2], report, fit.tensors)


def to_llama(
    source: str | Path,
    output: str | Path,
    *,
    text: str | Path | Sequence[str | Path] = (),
    text_tokens: int = 16384,
    context: int = 512,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> dict[str, object]:
    """Makes a Llama checkpoint of a Sigma without augmented Q, exactly; arguments and report are those of `to_sigma`.

    K and V heads are repeated to the least number that both of theirs divide; it divides that of the query heads.

    Raises:
        ValueError: also for what Llama has no place for: augmented Q, compressed K, selective V.
    """
    checkpoint, old = open_model(source, (SigmaConfig.model_type,))
    for name in ("q_aug_dim", "k_compression"):
        if getattr(old, name) is not None:
            raise ValueError(f"{name}: got {getattr(old, name)!r}, want None: Llama has no place for it")
    if any(old.selective_v()):
        raise ValueError(f"selective_v_top_k: got {old.selective_v_top_k}, want None: Llama reads all rows of V")
    if old.hidden_size % old.num_attention_heads:
        raise ValueError(
            f"hidden_size: got {old.hidden_size}, want a multiple of num_attention_heads ({old.num_attention_heads}), "
            "without which transformers takes no Llama"
        )
    new = LlamaConfig(
        **_shared_fields(checkpoint, old, dtype),
        num_key_value_heads=lcm(old.num_key_heads, old.num_value_heads),
        attention_bias=old.attention_bias,
    )
    job = _Job(checkpoint, old, new, output, dtype, max_shard_size, overwrite)
    windows = sample_windows(text, checkpoint, old, context, text_tokens, least=1)
    with new_folder(job.output) as folder:
        return job.finish(folder, windows, {})


def _refuse_windows(config: PreTrainedConfig) -> None:
    """Sigma attends to all tokens."""
    window, longest = getattr(config, "sliding_window", None), config.max_position_embeddings
    if window is not None and window < longest:
        raise ValueError(f"sliding_window: got {window}, want None or at least max_position_embeddings ({longest})")
    kinds = set(getattr(config, "layer_types", None) or ())
    if window is None and kinds - {"full_attention"}:
        raise ValueError(f"layer_types: got {sorted(kinds)}, want full_attention only")


def _shared_fields(checkpoint: Checkpoint, old: PreTrainedConfig, dtype: torch.dtype | None) -> dict[str, object]:
    if dtype is not None:
        check_dtype(dtype)
    return {
        **{name: getattr(old, name) for name in _SHARED},
        "head_dim": cache_shapes(old)[0].d_v,
        "attention_dropout": old.attention_dropout or 0.0,
        "mlp_bias": getattr(old, "mlp_bias", False),
        "rope_parameters": deepcopy(old.rope_parameters),
        "dtype": dtype or checkpoint.tensors[EMBEDDING].dtype,
    }


class _Job:
    """Takes the model in a checkpoint to that of a new config. Nothing is written before `finish`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        old: PreTrainedConfig,
        new: PreTrainedConfig,
        output: str | Path,
        dtype: torch.dtype | None,
        max_shard_size: int | str,
        overwrite: bool,
    ) -> None:
        self.checkpoint, self.old, self.new = checkpoint, old, new
        self.output = Path(output).resolve()
        self.model = empty_model(new)
        self.tensors = {}
        for name, x in self.model.state_dict().items():
            if not (new.tie_word_embeddings and name == HEAD):
                like = checkpoint.tensors.get(name, checkpoint.tensors[EMBEDDING])
                self.tensors[name] = torch.empty(x.shape, dtype=dtype or like.dtype, device="meta")
        self.files = plan_files(self.tensors, max_shard_size)
        check_output(self.output, checkpoint.folder, overwrite)

    def finish(
        self,
        folder: Path,
        windows: Tensor | None,
        report: dict[str, object],
        fitted: Checkpoint | None = None,
    ) -> dict[str, object]:
        """Writes the model, what belongs to it, and the report, for which windows of text are measured."""
        write_files(folder, self.files, lambda name: self._make(name, fitted))
        if fitted is not None:
            shutil.rmtree(fitted.folder)
        self.new.architectures = [type(self.model).__name__]
        if self.model._auto_class is not None:
            custom_object_save(self.model, folder, config=self.new)
        self.new.save_pretrained(folder)
        copy_companions(self.checkpoint.folder, folder)
        report = {**self._costs(), **report, "text": None}
        if windows is not None:
            from .measure import compare

            result = Checkpoint(folder, self.files.filename_to_tensors)
            models = streamed_model(self.checkpoint, self.old), streamed_model(result, self.new)
            report["text"] = compare(*models, windows)
        write_report(folder / REPORT, report)
        return report

    def _make(self, name: str, fitted: Checkpoint | None) -> Tensor:
        want = self.tensors[name]
        if fitted is not None and name in fitted.tensors:
            return fitted[name].to(want.dtype)
        if name not in self.checkpoint.tensors:
            # The only one: o_proj.bias, which Qwen2 has not.
            return torch.zeros(want.shape, dtype=want.dtype)
        x = self.checkpoint[name]
        old, new = cache_shapes(self.old)[0], cache_shapes(self.new)[0]
        for projection, heads, target in ((".k_proj.", old.n_k, new.n_k), (".v_proj.", old.n_v, new.n_v)):
            if projection in name:
                x = pool_heads(x, heads, target, self.old.num_attention_heads)
        return x.to(want.dtype)

    def _costs(self) -> dict[str, object]:
        """What both models are and take."""
        sides = {}
        for side, config, tensors in (("before", self.old, self.checkpoint.tensors), ("after", self.new, self.tensors)):
            shape = cache_shapes(config)[0]
            numbers = config.num_hidden_layers * (shape.n_k * shape.d_k + shape.n_v * shape.d_v)
            sides[side] = {
                "model_type": config.model_type,
                "heads": [config.num_attention_heads, shape.n_k, shape.n_v],
                "dtype": str(tensors[EMBEDDING].dtype).removeprefix("torch."),
                "parameters": sum(x.numel() for x in tensors.values()),
                "cache_bytes_per_token": numbers * tensors[EMBEDDING].dtype.itemsize,
            }
        return sides
