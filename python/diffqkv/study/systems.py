"""What a study compares: models of one shape, the attention and the cache that they run with, the form of weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .. import SigmaConfig
from ..benchmarks.cpu.models import INTEGERS, with_fields
from ..models.sigma.configuration_sigma import PRESETS

PLAIN = "plain"
FORMS = ("packed", "int8", "int4")
TOP_K = 100  # the paper's (Table 3)
GROUP = 32  # weights that share a scale


class System(NamedTuple):
    """One of the models that take turns.

    Attributes:
        name: as the command line and the files have it.
        label: what it is, for tables and figures.
        baseline: the name of the system that it is compared with, or None.
        changes: fields of the study's configuration that differ.
        is_stock: it runs on SDPA and a DynamicCache, as in transformers without this package.
        weights: "plain", or a form of `fuse_for_inference`.
        counts_augmented_q: False for the standard model, whose augmented Q is attached to compare the machine's state
            and is not part of it (section 3.3.1).
    """

    name: str
    label: str
    baseline: str | None
    changes: dict[str, Any]
    is_stock: bool = False
    weights: str = PLAIN
    counts_augmented_q: bool = True

    def config(self, base: SigmaConfig, layers: int) -> SigmaConfig:
        """The configuration of the study, cut to some layers, as this system has it."""
        changes = {**self.changes, "num_hidden_layers": layers}
        if isinstance(base.selective_v_top_k, list):
            changes.setdefault("selective_v_top_k", base.selective_v_top_k[:layers])
        return with_fields(base, **changes)


def systems_of(base: SigmaConfig) -> dict[str, System]:
    """All systems of a shape, by name."""
    equal_heads = {"num_key_heads": base.num_value_heads, "k_head_dim": None, "k_compression": None}
    std = {"counts_augmented_q": False, "changes": {**equal_heads, "selective_v_top_k": None}}
    shape = f"{base.num_attention_heads}/{base.num_key_heads}/{base.num_value_heads}"
    gqa = f"GQA-{base.num_value_heads}"
    found = [
        System("sigma", f"DiffQKV {shape}", "std", {}),
        System("std", f"STD ({gqa})", None, **std),
        System("std-stock", f"STD ({gqa}), SDPA and DynamicCache", None, is_stock=True, **std),
        System("group-sharing", f"DiffQKV {shape}, K repeated, SDPA and DynamicCache", "std-stock", {}, is_stock=True),
    ]
    if base.k_compression is None and base.head_dim % 16 == 0:
        half = {"k_head_dim": base.head_dim // 2}
        found += [
            System(f"half-k-{how}", f"DiffQKV {shape}, half K, {how}", "std", {**half, "k_compression": how})
            for how in ("absorbed", "expand")
        ]
    found.append(System("selective-v", f"DiffQKV {shape}, best {TOP_K} V rows", "std", {"selective_v_top_k": TOP_K}))
    for form in FORMS:
        if form in INTEGERS and not _has_whole_groups(base):
            continue
        found += [
            System(f"sigma-{form}", f"DiffQKV {shape}, {form} weights", f"std-{form}", {}, weights=form),
            System(f"std-{form}", f"STD ({gqa}), {form} weights", None, weights=form, **std),
        ]
    return {system.name: system for system in found}


def _has_whole_groups(base: SigmaConfig) -> bool:
    """Whether groups of integer weights divide the input features of all linear layers."""
    sizes = [base.hidden_size, base.intermediate_size, base.num_attention_heads * base.head_dim, base.q_aug_dim or 0]
    if base.k_compression is not None:
        sizes.append(base.head_dim if base.k_compression == "absorbed" else base.k_head_dim)
    return not any(size % GROUP for size in sizes)


MAIN = (
    *("sigma", "std", "std-stock", "group-sharing", "selective-v"),
    *("sigma-packed", "std-packed", "sigma-int8", "std-int8"),
)


def chosen(names: Iterable[str] | None, base: SigmaConfig) -> list[System]:
    """The systems of these names, and those that they are compared with; the main ones by default.

    Raises:
        ValueError: this shape has no such system.
    """
    known = systems_of(base)
    if names is None:
        names = [name for name in MAIN if name in known]
    found: dict[str, System] = {}
    for name in names:
        if name not in known:
            raise ValueError(f"--systems: got {name!r}, want some of {', '.join(known)}")
        found[name] = known[name]
        baseline = known[name].baseline
        if baseline is not None:
            found[baseline] = known[baseline]
    return list(found.values())


def configuration(source: str, heads: str | None = None, dims: str | None = None) -> SigmaConfig:
    """The configuration of a preset or of a folder with config.json, with other heads "n_q/n_k/n_v" and "d_k/d_v".

    A d_k below d_v is absorbed by Q. The hidden size stays as it is.

    Raises:
        ValueError, OSError: there is no such preset or folder; the numbers are no numbers, or make no shape.
    """
    if source in PRESETS:
        config = SigmaConfig.from_preset(source)
    elif Path(source).is_dir():
        config = SigmaConfig.from_pretrained(source)
    else:
        raise ValueError(f"--config: got {source!r}, want a folder with config.json, or one of {', '.join(PRESETS)}")
    changes: dict[str, Any] = {}
    if heads is not None:
        n_q, n_k, n_v = _numbers("--heads", heads, "n_q/n_k/n_v")
        changes |= {"num_attention_heads": n_q, "num_key_heads": n_k, "num_value_heads": n_v}
    if dims is not None:
        d_k, d_v = _numbers("--dims", dims, "d_k/d_v")
        if d_k > d_v:
            raise ValueError(f"--dims: got {dims}, want d_k at most d_v")
        changes |= {"head_dim": d_v, "k_head_dim": d_k, "k_compression": "absorbed" if d_k < d_v else None}
    return with_fields(config, **changes)


def _numbers(option: str, text: str, form: str) -> list[int]:
    parts = text.split("/")
    if len(parts) != form.count("/") + 1 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option}: got {text!r}, want positive integers {form}")
    return [int(part) for part in parts]
