# SPDX-License-Identifier: BSD-3-Clause
"""`fuse_for_inference`: the projections of each attention's input folded into one matrix, and weights packed.

This file stands alone, as those beside it do: `save_pretrained` copies it beside a checkpoint, where it runs without
the diffqkv package.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig

try:
    from diffqkv.models import packed_linear, quantizer
except ImportError:
    packed_linear = quantizer = None

# Layers of one head of attention and heads of tasks, with few weights or features: they stay as they are.
_NOT_PACKED = ("q_absorb_proj", "k_expand_proj", "score", "qa_outputs")
_SAVED = ("int8", "int4")


def project_fused(attention: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All projections of hidden_states: gate and up of augmented Q, or else Q itself, then K and V."""
    if torch.is_grad_enabled() and (hidden_states.requires_grad or attention.fused_proj.weight.requires_grad):
        raise RuntimeError(
            "fuse_for_inference: got a forward pass that records gradients, want torch.no_grad(), or the model "
            "loaded again with from_pretrained"
        )
    return attention.fused_proj(hidden_states).split(attention.fused_sizes, -1)


def _fused_names(attention: nn.Module) -> list[str]:
    return ["q_proj", *(["q_gate_proj", "q_up_proj"] if attention.augments_q else []), "k_proj", "v_proj"]


def _check_fusable(attention: nn.Module) -> None:
    """Raises ValueError unless `_fused` can fold the projections as they are now."""
    for name in _fused_names(attention):
        projection = getattr(attention, name)
        if (kind := type(projection)) is not nn.Linear:
            raise ValueError(f"{name}: got a {kind.__module__}.{kind.__name__}, want a torch.nn.Linear to fuse")
        weight = projection.weight
        if type(weight.data) is not torch.Tensor or not weight.is_floating_point() or weight.is_meta:
            raise ValueError(
                f"{name}: got a weight of type {type(weight.data).__name__}, {weight.dtype}, on {weight.device}, "
                f"want a whole floating-point tensor of this process to fuse"
            )


@torch.no_grad()
def _fuse(attention: nn.Module) -> None:
    """Makes the projections of hidden_states one, and frees them: gate(q_proj(h)) and up(q_proj(h)) are linear."""
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    folds = [attention.q_gate_proj.weight, attention.q_up_proj.weight] if attention.augments_q else []

    def folded(x: torch.Tensor) -> list[torch.Tensor]:
        """What becomes of Q's weight or bias."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return [(fold.to(wide) @ x.to(wide)).to(x.dtype) for fold in folds] or [x]

    weights = [*folded(q.weight), k.weight, v.weight]
    attention.fused_sizes = [len(weight) for weight in weights]
    fused = nn.Linear(q.in_features, sum(attention.fused_sizes), bias=q.bias is not None, device="meta")
    fused.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    if q.bias is not None:
        fused.bias = nn.Parameter(torch.cat([*folded(q.bias), k.bias, v.bias]), requires_grad=False)
    for name in _fused_names(attention):
        delattr(attention, name)
    attention.fused_proj = fused.eval()


class SigmaFusingMixin:
    """`fuse_for_inference` of all SIGMA models, and what a model can do no more after it."""

    @property
    def is_fused(self) -> bool:
        """Whether `fuse_for_inference` has been called."""
        return any(attention.fused_proj is not None for attention in self._attentions())

    @property
    def packed_weights(self) -> str | None:
        """The form of the linear layers that `fuse_for_inference` has made: "packed", "int8", "int4", or None."""
        return self.__dict__.get("_packed_weights")

    def fuse_for_inference(self, weights: str | None = None, *, group_size: int = 32) -> "SigmaFusingMixin":
        """Makes the model one for inference, in place, and returns it.

        The projections of each attention's input are folded into one matrix: gate(q_proj(h)) and up(q_proj(h)) of
        augmented Q are linear in h, so that one product gives gate, up, K and V. For Sigma-1.5B, 7424 rows of weights
        are read instead of 9472. Besides, all linear layers can get a form that the CPU reads at the speed of memory.
        The original weights are freed layer by layer, and no parameter takes gradients any more: training is a
        RuntimeError, and so is saving unless weights are integers. `from_pretrained` is the way back.
        `from_pretrained(..., quantization_config=diffqkv.WeightsConfig(weights))` gives the same model without ever
        holding all of the original weights.

        Args:
            weights: None leaves the linear layers as they are. "packed" keeps every number, in the order in which
                `diffqkv.packed_linear` reads them; on a GPU it is as None, since torch reads at speed there. "int8" and
                "int4" round them to the nearest integers of so many bits, by `diffqkv.quantization.quantize`; on a GPU
                this saves memory, not time. Embeddings stay as they are, save those that are tied to the head, and so
                do the heads of tasks.
            group_size: the input features that share a scale of integers; a multiple of 32 up to 256.

        Raises:
            ValueError: the model is in training mode, or tensor parallel, or has projections that are not plain linear
                layers (LoRA, quantised) or not in memory, or of a size that the form cannot hold; or the compiled
                library is missing; before any weight is changed.
        """
        if weights is not None and packed_linear is None:
            raise ValueError(f"weights: got {weights!r}, want None: the package diffqkv is not importable")
        if self.is_fused and weights in (None, self.packed_weights):
            return self
        if self.training:
            raise ValueError("fuse_for_inference: got a model in training mode, want eval()")
        if self._tp_size not in (None, 1):
            raise ValueError(f"fuse_for_inference: got tp_size = {self._tp_size}, want a model that is not sharded")
        if self.packed_weights is not None:
            raise ValueError(
                f"weights: got {weights!r}, want {self.packed_weights!r}, which the model has already, or the model "
                f"loaded again with from_pretrained"
            )
        if weights is not None:
            packed_linear.check_model(self, weights, group_size, _NOT_PACKED)
        for attention in self._to_fuse():
            _check_fusable(attention)
        method = getattr(self, "quantization_method", None)
        if method not in (None, "diffqkv"):  # Some keep their integers in plain layers, and change how these compute.
            name = getattr(method, "value", method)
            raise ValueError(f"fuse_for_inference: got a model that {name} has quantised, want plain weights")
        return self._take_form(weights, group_size)

    def _take_form(self, weights: str | None, group_size: int, tied_embedding: bool = False) -> "SigmaFusingMixin":
        """Fuses and packs what is not yet; on the meta device, this makes the places that saved weights are read into.

        With tied_embedding, the embedding is packed, as where it was tied to a head, also in a model without this head.
        """
        for attention in self._to_fuse():
            _fuse(attention)
            if weights is not None:
                packed_linear.pack_linears(attention, weights, group_size, _NOT_PACKED)
        if weights is not None:
            self._pack_the_rest(weights, group_size, tied_embedding)
        return self.requires_grad_(False)

    def _pack_the_rest(self, weights: str, group_size: int, tied_embedding: bool) -> None:
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        # Nothing is tied yet where saved weights are to be read.
        is_tied = head is not None and (tied_embedding or head.weight is embedding.weight)
        packed_linear.pack_linears(self, weights, group_size, _NOT_PACKED)
        if is_tied:
            self.set_input_embeddings(packed_linear.embedding_of(self.get_output_embeddings(), embedding))
            if packed_linear.BITS[weights] is not None:
                # The scales are tied, too, and saved once.
                names = [
                    name.replace(".weight", ".scales") for names in self._tied_weights_keys.items() for name in names
                ]
                self._tied_weights_keys = self._tied_weights_keys | dict([names])
                self.all_tied_weights_keys.update([names])
        elif tied_embedding:
            table = packed_linear.PackedLinear.of(embedding.weight, None, weights, group_size)
            self.set_input_embeddings(packed_linear.embedding_of(table, embedding))
        for model in (self, self.base_model):
            model._packed_weights = weights
            if weights in _SAVED:
                quantizer.mark(model, weights, group_size, is_tied or tied_embedding)

    def _check_form(self, weights: str, group_size: int) -> set[str]:
        """The linear layers that `_take_form` takes, while none is loaded; raises ValueError if it cannot."""
        packed_linear.check_model(self, weights, group_size, _NOT_PACKED, is_loaded=False)
        return {name for name, _ in packed_linear.linears(self, _NOT_PACKED)}

    def _form_loaded(self, name: str, weights: str, group_size: int) -> nn.Module | None:
        """Fuses and packs, while weights are loaded, the layer called name, if all that it is made of is there.

        Returns:
            the new layer, or None.
        """
        parent, _, child = name.rpartition(".")
        attention = self.get_submodule(parent)
        if hasattr(attention, "fused_proj") and child in _fused_names(attention):
            parts = [getattr(attention, part) for part in _fused_names(attention)]
            child = "fused_proj"
        else:
            parts = [self.get_submodule(name)]
            # A tied head waits for its embedding.
            if self.config.tie_word_embeddings and parts[0] is self.get_output_embeddings():
                return None
        if any(parameter.is_meta for part in parts for parameter in part.parameters()):
            return None
        if child == "fused_proj":
            _fuse(attention)
        packed_linear.pack_linear(attention, child, weights, group_size)
        return getattr(attention, child)

    def _to_fuse(self) -> list[nn.Module]:
        return [attention for attention in self._attentions() if attention.fused_proj is None]

    def train(self, mode: bool = True) -> "SigmaFusingMixin":
        """As in `torch.nn.Module`; mode=True is refused after `fuse_for_inference`."""
        if mode:
            self._refuse_fused("train")
        return super().train(mode)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As in `PreTrainedModel`; refused after `fuse_for_inference(weights)`."""
        if self.packed_weights is not None:
            self._refuse_fused("resize_token_embeddings")
        return super().resize_token_embeddings(*args, **kwargs)

    def _attentions(self) -> list[nn.Module]:
        return [module for module in self.modules() if hasattr(module, "fused_proj")]

    @property
    def dtype(self) -> torch.dtype:
        """As in `PreTrainedModel`: what the model computes in, which the scales of integers do not tell."""
        embedding = getattr(self.base_model, "embed_tokens", None)
        return getattr(embedding, "dtype", None) or super().dtype

    def _refuse_saving(self) -> None:
        if self.packed_weights not in _SAVED:
            self._refuse_fused("save_pretrained")

    def _refuse_tensor_parallel(self, size: int | None) -> None:
        if size not in (None, 1) and getattr(self, "quantization_method", None) == "diffqkv":
            raise ValueError(
                f"tp_size: got {size}, want 1: a model of weights={self.packed_weights!r} lies in one process"
            )

    def _refuse_fused(self, name: str) -> None:
        if self.is_fused:
            raise RuntimeError(
                f"{name}: got a model after fuse_for_inference, whose projections are folded into one; want the model "
                f"loaded again with from_pretrained"
            )


def refuse_unreadable(config: PreTrainedConfig) -> None:
    """Raises ValueError for a checkpoint of packed weights, if the package that reads them is not there."""
    saved = getattr(config, "quantization_config", None)
    if quantizer is None and isinstance(saved, dict) and saved.get("quant_method") == "diffqkv":
        raise ValueError(
            "quantization_config: got quant_method 'diffqkv', want the package diffqkv, as new as the "
            "checkpoint: it alone reads such weights"
        )


__all__ = ["SigmaFusingMixin", "project_fused", "refuse_unreadable"]
