# SPDX-License-Identifier: BSD-3-Clause
"""Configuration of the SIGMA models with DiffQKV attention (SIGMA, arXiv 2501.13629).

This file stands alone: `save_pretrained` copies it beside a checkpoint, where it runs without the diffqkv package.
"""

from copy import deepcopy
from math import gcd
from typing import Any, ClassVar

import transformers
from packaging.version import Version

if Version(transformers.__version__).release < (5, 13):
    raise ImportError(f"transformers: got {transformers.__version__}, want 5.13 or newer", name="transformers")

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Fields of Microsoft's Sigma-MoE, another architecture that uses the name "sigma".
_SIGMA_MOE_FIELDS = (
    "n_routed_experts",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "routed_scaling_factor",
    "scoring_func",
    "qk_layernorm",
)

_HEAD_COUNTS = ("num_attention_heads", "num_key_heads", "num_value_heads")

# The arguments of `diffqkv.selective_v_attention` that the fields selective_v_* give.
_SELECTIVE_V = ("top_k", "tail", "max_error", "keep_first", "keep_last")

# Table 7. Sequence length, biases, tying and the epsilon of the norms are not published: the defaults are Llama's.
_SIGMA_1_5B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
    "num_key_heads": 4,
    "num_value_heads": 16,
    "q_aug_dim": 3072,
    "vocab_size": 128256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}
_SIGMA_10B = {
    **_SIGMA_1_5B,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "q_aug_dim": 6144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def _ablation(n_k: int, n_v: int, **changes) -> dict:
    """A model of section 2.2: 22 layers of width 2048, 32 query heads, about one billion parameters.

    The paper gives neither the vocabulary nor the RoPE theta of these models: 32000 keeps them near the stated size and
    10000 is the usual theta.
    """
    return {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_heads": n_k,
        "num_value_heads": n_v,
        "q_aug_dim": None,
        "vocab_size": 32000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **changes,
    }


def _wider_ffn(deltas: int) -> dict:
    """Table 5's AugF: the FFN dimension grows by a multiple of delta = 3072."""
    return {"intermediate_size": 5632 + deltas * 3072}


_HALF_K = {"k_compression": "expand"}
_TOP_100 = {"selective_v_top_k": 100}

# One entry per row of Tables 1 to 6, in the paper's order, and the two models of Table 7.
PRESETS = {
    "sigma-1.5b": _SIGMA_1_5B,
    "sigma-10b": _SIGMA_10B,
    "table1-mha": _ablation(32, 32),
    "table1-mha-half-v-heads": _ablation(32, 16),
    "table1-mha-half-k-heads": _ablation(16, 32),
    "table1-gqa16": _ablation(16, 16),
    "table1-gqa16-quarter-v-heads": _ablation(16, 4),
    "table1-gqa16-quarter-k-heads": _ablation(4, 16),
    "table1-gqa4": _ablation(4, 4),
    "table1-gqa4-quarter-v-heads": _ablation(4, 1),
    "table1-gqa4-quarter-k-heads": _ablation(1, 4),
    "table2-mha": _ablation(32, 32),
    "table2-mha-half-k-dim": _ablation(32, 32, **_HALF_K),
    "table2-gqa16": _ablation(16, 16),
    "table2-gqa16-half-k-dim": _ablation(16, 16, **_HALF_K),
    "table2-gqa4": _ablation(4, 4),
    "table2-gqa4-half-k-dim": _ablation(4, 4, **_HALF_K),
    "table3-mha": _ablation(32, 32),
    "table3-mha-top100": _ablation(32, 32, **_TOP_100),
    "table3-gqa16": _ablation(16, 16),
    "table3-gqa16-top100": _ablation(16, 16, **_TOP_100),
    "table3-gqa4": _ablation(4, 4),
    "table3-gqa4-top100": _ablation(4, 4, **_TOP_100),
    "table4-mha": _ablation(32, 32),
    "table4-mha-augq5632": _ablation(32, 32, q_aug_dim=5632),
    "table4-gqa16": _ablation(16, 16),
    "table4-gqa16-augq3072": _ablation(16, 16, q_aug_dim=3072),
    "table4-gqa16-augq4096": _ablation(16, 16, q_aug_dim=4096),
    "table4-gqa16-augq5632": _ablation(16, 16, q_aug_dim=5632),
    "table4-gqa4": _ablation(4, 4),
    "table4-gqa4-augq5632": _ablation(4, 4, q_aug_dim=5632),
    "table5-gqa16": _ablation(16, 16),
    "table5-augf1": _ablation(16, 16, **_wider_ffn(1)),
    "table5-augq": _ablation(16, 16, q_aug_dim=3072),
    "table5-augf2": _ablation(16, 16, **_wider_ffn(2)),
    "table5-augf1-augq": _ablation(16, 16, q_aug_dim=3072, **_wider_ffn(1)),
    "table5-augf3": _ablation(16, 16, **_wider_ffn(3)),
    "table5-augf2-augq": _ablation(16, 16, q_aug_dim=3072, **_wider_ffn(2)),
    "table5-augf5": _ablation(16, 16, **_wider_ffn(5)),
    "table5-augf3-augq": _ablation(16, 16, q_aug_dim=3072, **_wider_ffn(3)),
    "table6-gqa16": _ablation(16, 16),
    "table6-augq-k4": _ablation(4, 16, q_aug_dim=3072),
    "table6-augq-half-k-dim": _ablation(16, 16, q_aug_dim=3072, **_HALF_K),
    "table6-k4-half-k-dim": _ablation(4, 16, **_HALF_K),
    "table6-augq-k4-half-k-dim": _ablation(4, 16, q_aug_dim=3072, **_HALF_K),
}


@strict
class SigmaConfig(PreTrainedConfig):
    """Configuration of `SigmaModel` and its heads. Without arguments: Sigma-1.5B (Table 7).

    Args:
        num_attention_heads, num_key_heads, num_value_heads: n_q, n_k, n_v (section 2.1). n_k and n_v divide n_q. Give
            all three or none.
        head_dim: dimension of a V head, and of a Q head before any compression. Default: hidden_size / n_q.
        k_head_dim: dimension d_k of a *cached* K head. Default: head_dim, or half of it with `k_compression`.
        k_compression: how K heads smaller than V heads are used (Tables 2 and 6). None: they are not smaller.
            "expand", the paper's reading: the cached K is not rotated; at every step a trainable linear map takes all
            of it to head_dim, and RoPE follows in head_dim dimensions. "absorbed": the map sits on the query side and
            takes Q to k_head_dim; RoPE acts in k_head_dim dimensions and the cached K is used as it is. The two are
            different models: without RoPE, and up to the softmax scale (the inverse root of the dimension in which Q
            and K meet), their scores agree if one map is the other's transpose.
        q_aug_dim: intermediate dimension d_q of augmented Q (section 2.2, Tables 4 to 6; Appendix E). None: off.
        selective_v_top_k: at decode, the number of V rows a query reads (eq. 9, Table 3): one for all layers, or a
            list with one number per layer, 0 for a layer that reads all rows. None: all layers read all rows.
        selective_v_tail: what happens to the probability of the other rows: "drop" (the paper), "renorm", "mean".
        selective_v_max_error: the L2 distance to dense attention that a row of a layer's attention may have; more V
            rows are read until it is guaranteed. None: no guarantee.
        selective_v_keep_first, selective_v_keep_last: the oldest and newest rows, read besides the best.
        rope_parameters: as in Llama, e.g. `{"rope_type": "default", "rope_theta": 50000.0}`.

    Raises:
        ValueError: naming the field, what it got and what it wants.
    """

    model_type = "sigma_diffqkv"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
    base_model_pp_plan: ClassVar[dict] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    default_theta = 50000.0

    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 26
    num_attention_heads: int | None = None
    num_key_heads: int | None = None
    num_value_heads: int | None = None
    head_dim: int | None = None
    k_head_dim: int | None = None
    k_compression: str | None = None
    q_aug_dim: int | None = 3072
    selective_v_top_k: int | list[int] | None = None
    selective_v_tail: str = "drop"
    selective_v_max_error: int | float | None = None
    selective_v_keep_first: int = 0
    selective_v_keep_last: int = 0
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: int | float = 0.0
    mlp_bias: bool = False

    def __post_init__(self, **kwargs):
        # Errors raised here reach the user as the ValueError they are; those of a `validate_*` method do not.
        self._refuse_foreign_fields(kwargs)
        self._refuse_windows(kwargs)
        claimed_groups = kwargs.pop("num_key_value_heads", None)
        self.check_fields()
        if claimed_groups is not None:
            self.num_key_value_heads = claimed_groups
        self.base_model_tp_plan = self._tensor_parallel_plan()
        super().__post_init__(**kwargs)
        if (self.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"rope_parameters: got partial_rotary_factor={self.rope_parameters['partial_rotary_factor']}, want 1.0"
            )

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "SigmaConfig":
        """A published configuration: "sigma-1.5b", "sigma-10b" (Table 7) or a row of Tables 1 to 6 (`PRESETS`).

        The rows "... w/ Half K Dim." use `k_compression="expand"`, the paper's reading. Any field can be overridden.
        """
        if name not in PRESETS:
            raise ValueError(f"name: got {name!r}, want one of {', '.join(PRESETS)}")
        return cls(**{**deepcopy(PRESETS[name]), **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "SigmaConfig":
        """A saved configuration, which must name its head counts: unlike the constructor's, they have no default."""
        cls._refuse_foreign_fields(dict(config_dict))
        for name in _HEAD_COUNTS:
            if config_dict.get(name) is None:
                raise ValueError(f"{name}: got none in the saved configuration, want a positive integer")
        return super().from_dict(config_dict, **kwargs)

    def check_fields(self) -> None:
        """Raises ValueError unless the fields fit together; models ask it too, for fields that were assigned since."""
        self._settle_head_counts()
        self._settle_head_dims()
        self._check_sizes()
        self._refuse_windows(vars(self))

    @property
    def num_key_value_heads(self) -> int:
        """G = gcd(n_k, n_v): the KV groups, which are the heads of the grouped cache layout."""
        return gcd(self.num_key_heads, self.num_value_heads)

    @num_key_value_heads.setter
    def num_key_value_heads(self, groups: int) -> None:
        # Tools that copy or export configurations assign what they have read.
        if groups != self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: got {groups}, want {self.num_key_value_heads}, the greatest common divisor of "
                f"num_key_heads ({self.num_key_heads}) and num_value_heads ({self.num_value_heads})"
            )

    @property
    def attention_head_dim(self) -> int:
        """The dimension in which Q and K meet, and in which RoPE acts."""
        return self.k_head_dim if self.k_compression == "absorbed" else self.head_dim

    def selective_v(self, changes: dict[str, Any] | None = None) -> list[dict[str, Any] | None]:
        """What each layer's decode steps hand to `diffqkv.selective_v_attention`; None where all V rows are read.

        changes: what one call replaces, by the op's names: {"top_k": 50, "max_error": 0.1}; {"top_k": None} reads all.
        """
        options = {name: getattr(self, f"selective_v_{name}") for name in _SELECTIVE_V}
        if changes:
            unknown = changes.keys() - options.keys()
            if unknown:
                raise ValueError(f"selective_v: got {sorted(unknown)}, want some of {', '.join(_SELECTIVE_V)}")
            options |= changes
        self._check_selective_v(options)
        top_k = options.pop("top_k")
        per_layer = top_k if isinstance(top_k, list) else [top_k] * self.num_hidden_layers
        return [{"top_k": k, **options} if k else None for k in per_layer]

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """How transformers shards the base model: K and V by groups, so that each process holds whole ones.

        Only the last projection of Q may leave its heads where they were computed: augmented Q mixes all of them.
        """
        plan = {
            "layers.*.self_attn.k_proj": "colwise",
            "layers.*.self_attn.v_proj": "colwise",
            "layers.*.self_attn.o_proj": "rowwise",
            "layers.*.mlp.gate_proj": "colwise",
            "layers.*.mlp.up_proj": "colwise",
            "layers.*.mlp.down_proj": "rowwise",
        }
        q_projections = ["q_proj"] if self.q_aug_dim is None else ["q_proj", "q_gate_proj", "q_up_proj", "q_down_proj"]
        plan |= {f"layers.*.self_attn.{name}": "colwise_gather_output" for name in q_projections}
        plan[f"layers.*.self_attn.{q_projections[-1]}"] = "colwise"
        # One map for all heads, of which a process sees its own.
        if self.k_compression is not None:
            name = "k_expand_proj" if self.k_compression == "expand" else "q_absorb_proj"
            plan[f"layers.*.self_attn.{name}"] = "replicated_with_grad_allreduce"
        return plan

    @classmethod
    def _refuse_foreign_fields(cls, kwargs: dict) -> None:
        for field in _SIGMA_MOE_FIELDS:
            if field in kwargs:
                raise ValueError(f"{field}: got a field of Sigma-MoE, want a DiffQKV configuration without it")
        model_type = kwargs.pop("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"model_type: got {model_type!r}, want {cls.model_type!r}")

    @staticmethod
    def _refuse_windows(fields: dict) -> None:
        """Refuses fields of other models, on which caches and masks would act here too, and attention would not."""
        for name in ("sliding_window", "attention_chunk_size"):
            if fields.get(name) is not None:
                raise ValueError(f"{name}: got {fields[name]}, want None: all layers see all tokens before")
        for layer_type in fields.get("layer_types") or ():
            if layer_type != "full_attention":
                raise ValueError(f"layer_types: got {layer_type!r}, want 'full_attention' for every layer")

    def _settle_head_counts(self) -> None:
        if all(getattr(self, name) is None for name in _HEAD_COUNTS):
            for name in _HEAD_COUNTS:
                setattr(self, name, _SIGMA_1_5B[name])
        for name in _HEAD_COUNTS:
            count = getattr(self, name)
            if count is None or count < 1:
                raise ValueError(
                    f"{name}: got {count}, want a positive integer; {', '.join(_HEAD_COUNTS)} come together"
                )
        for name in _HEAD_COUNTS[1:]:
            if self.num_attention_heads % getattr(self, name):
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, want a divisor of num_attention_heads "
                    f"({self.num_attention_heads})"
                )

    def _settle_head_dims(self) -> None:
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size: got {self.hidden_size}, want a multiple of num_attention_heads "
                    f"({self.num_attention_heads}), or a head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.k_compression not in (None, "expand", "absorbed"):
            raise ValueError(f"k_compression: got {self.k_compression!r}, want None, 'expand' or 'absorbed'")
        if self.k_head_dim is None:
            self.k_head_dim = self.head_dim if self.k_compression is None else self.head_dim // 2
        for name in ("head_dim", "k_head_dim"):
            dim = getattr(self, name)
            if dim < 2 or dim % 2:
                raise ValueError(f"{name}: got {dim}, want a positive even number (RoPE rotates pairs)")
        if self.k_compression is None and self.k_head_dim != self.head_dim:
            raise ValueError(
                f"k_head_dim: got {self.k_head_dim} without k_compression, want head_dim ({self.head_dim}); "
                f"k_compression='expand' or 'absorbed' says how smaller K heads are used"
            )
        if self.k_head_dim > self.head_dim:
            raise ValueError(f"k_head_dim: got {self.k_head_dim}, want at most head_dim ({self.head_dim})")

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want a positive integer")
        if self.q_aug_dim is not None and self.q_aug_dim < 1:
            raise ValueError(f"q_aug_dim: got {self.q_aug_dim}, want a positive integer or None (off)")
        self._check_selective_v({name: getattr(self, f"selective_v_{name}") for name in _SELECTIVE_V})

    def _check_selective_v(self, options: dict[str, Any]) -> None:
        def refuse(name: str, want: str) -> None:
            raise ValueError(f"selective_v_{name}: got {options[name]!r}, want {want}")

        def is_integer(value: Any, least: int) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= least

        top_k, max_error = options["top_k"], options["max_error"]
        if isinstance(top_k, list):
            if len(top_k) != self.num_hidden_layers:
                refuse("top_k", f"a list of one number per layer ({self.num_hidden_layers})")
            if not all(is_integer(k, 0) for k in top_k):
                refuse("top_k", "integers >= 0 (0: all rows)")
        elif top_k is not None and not is_integer(top_k, 1):
            refuse("top_k", "an integer >= 1, one per layer, or None (all rows)")
        if options["tail"] not in ("drop", "renorm", "mean"):
            refuse("tail", "'drop', 'renorm' or 'mean'")
        is_number = isinstance(max_error, (int, float)) and not isinstance(max_error, bool)
        if max_error is not None and not (is_number and max_error >= 0):
            refuse("max_error", "a number >= 0 or None")
        for name in ("keep_first", "keep_last"):
            if not is_integer(options[name], 0):
                refuse(name, "an integer >= 0")


__all__ = ["PRESETS", "SigmaConfig"]
