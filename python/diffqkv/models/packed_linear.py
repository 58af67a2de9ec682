"""Layers whose weights lie in panels, as `diffqkv.packed_linear` reads them: the inference form of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import quantization
from ..ops import library, packed_linear
from ..ops.autocast import autocast_dtype

BITS = {"packed": None, "int8": 8, "int4": 4}


def check_form(weights: str, group_size: int) -> None:
    """Raises ValueError unless there are weights of this form."""
    if weights not in BITS:
        raise ValueError(f"weights: got {weights!r}, want None or one of {', '.join(map(repr, BITS))}")
    if group_size not in quantization.GROUP_SIZES:
        raise ValueError(f"group_size: got {group_size!r}, want a multiple of 32 up to 256")


def check_model(model: nn.Module, weights: str, group_size: int, keep: tuple[str, ...], is_loaded: bool = True) -> None:
    """Raises ValueError, naming the layer, unless `pack_linears` can take all linear layers of the model.

    Without is_loaded, the weights are still to be read, and lie on the meta device until then.
    """
    check_form(weights, group_size)
    for name, module in linears(model, keep):
        _check_linear(name, module, weights, group_size, is_loaded)


def pack_linears(module: nn.Module, weights: str, group_size: int, keep: tuple[str, ...]) -> None:
    """Gives the linear layers in module the form `weights`, one after the other, and frees their own weights."""
    for name, _ in list(linears(module, keep)):
        pack_linear(module, name, weights, group_size)


def pack_linear(module: nn.Module, name: str, weights: str, group_size: int) -> None:
    """Gives one linear layer in module the form `weights`, unless it has it or is better left as it is."""
    linear = module.get_submodule(name)
    # There torch's own products read plain weights at the speed of memory.
    if type(linear) is nn.Linear and (linear.weight.device.type != "cuda" or BITS[weights] is not None):
        packed = PackedLinear.of(linear.weight, linear.bias, weights, group_size)
        module.set_submodule(name, packed.eval())


def embedding_of(head: nn.Module, embedding: nn.Embedding) -> nn.Module:
    """What becomes of an embedding that shared its table with a head, which `pack_linears` may have packed."""
    if isinstance(head, PackedLinear):
        return PackedEmbedding(head, embedding.padding_idx, embedding.weight.dtype).eval()
    return embedding


def linears(model: nn.Module, keep: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a model, of any kind, and their names, but those that are called as one of keep."""
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and name.rpartition(".")[2] not in keep:
            yield name, module


def _check_linear(name: str, linear: nn.Module, weights: str, group_size: int, is_loaded: bool) -> None:
    if (kind := type(linear)) is not nn.Linear:
        raise ValueError(f"{name}: got a {kind.__module__}.{kind.__name__}, want a torch.nn.Linear")
    weight = linear.weight
    is_whole = type(weight.data) is Tensor and weight.is_meta != is_loaded
    if not is_whole or weight.dtype not in quantization.FLOATS:
        raise ValueError(
            f"{name}: got a weight of type {type(weight.data).__name__}, {weight.dtype}, on {weight.device}, want a "
            f"whole tensor of float32, bfloat16 or float16 in this process"
        )
    if is_loaded:
        check_device(name, weight.device, weights)
    if BITS[weights] is not None:
        if linear.in_features % group_size:
            raise ValueError(f"{name}: got {linear.in_features} input features, want a multiple of {group_size}")
        if is_loaded and not weight.isfinite().all():
            raise ValueError(f"{name}: got weights that are not finite, want finite ones to make integers of")
    elif weight.dtype == torch.bfloat16 and linear.in_features % 2:
        raise ValueError(f"{name}: got {linear.in_features} input features, want an even number for bfloat16")


def check_device(name: str, device: torch.device, weights: str) -> None:
    """Raises ValueError unless weights can be given this form on device."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: got a weight on {device.type}, want cpu or cuda for weights={weights!r}")
    if device.type == "cpu" and not library.loaded:
        raise ValueError(f"weights: got {weights!r}, want None: the compiled library of diffqkv is not there")


class Packed(nn.Module):
    """Weights `[n, k]` in panels, and the scales of integers."""

    weight: Tensor
    scales: Tensor | None

    def __init__(self, weight: Tensor, scales: Tensor | None, rows: int, columns: int) -> None:
        super().__init__()
        self._rows, self._columns = rows, columns
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("scales", None if scales is None else nn.Parameter(scales, requires_grad=False))

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        scales = None if self.scales is None else self.scales.data
        super()._apply(fn, recurse)
        if scales is not None and self.scales.dtype != scales.dtype:
            # A dtype is what the layer computes in: with rounded scales its weights would be others.
            self.scales.data = scales.to(self.scales.device)
        # Converted to or from bfloat16, the weights have another form.
        is_paired = self.weight.dim() == 4
        if self.weight.is_floating_point() and is_paired != (self.weight.dtype == torch.bfloat16):
            dense = quantization.unpack(self.weight, self._rows)
            self.weight = nn.Parameter(quantization.pack(dense), requires_grad=False)
        return self

    def _form(self) -> str:
        bits = {torch.int8: "int8", torch.uint8: "int4"}.get(self.weight.dtype)
        return "packed" if bits is None else f"{bits} by groups of {self._columns // self.scales.shape[1]}"


class PackedLinear(Packed):
    """`torch.nn.Linear` for inference, whose weights are packed or quantised.

    Attributes:
        weight, scales: as in `diffqkv.packed_linear`; scales is None unless weight holds integers.
        bias: `[out_features]`, or None.
    """

    bias: Tensor | None

    def __init__(self, weight: Tensor, scales: Tensor | None, bias: Tensor | None, out_features: int) -> None:
        columns = quantization.in_features(weight)
        super().__init__(weight, scales, out_features, columns)
        self.in_features, self.out_features = columns, out_features
        # A view of a file that the bias was read from would hold all of it.
        own_bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        self.register_parameter("bias", own_bias)

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, bias: Tensor | None, weights: str, group_size: int = 32) -> PackedLinear:
        """A layer with these weights `[n, k]` in the form "packed", in their own dtype, "int8" or "int4"."""
        if (bits := BITS[weights]) is None:
            return cls(quantization.pack(weight), None, bias, len(weight))
        return cls(*quantization.quantize_to_panels(weight, bits, group_size), bias, len(weight))

    def dense(self) -> nn.Linear:
        """A `torch.nn.Linear` of the weights that these stand for; of integers, in float32."""
        if self.scales is None:
            weight = quantization.unpack(self.weight, self.out_features)
        else:
            weight = quantization.dequantize(self.weight, self.out_features, self.scales, None, torch.float32)
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(weight.dtype), requires_grad=False)
        return linear.eval()

    def forward(self, x: Tensor) -> Tensor:
        weight, scales, bias = self.weight, self.scales, self.bias
        # Autocast decides what comes out, as of every linear layer, but the weights keep their dtype.
        dtype = autocast_dtype(x.device.type) or x.dtype
        wanted = weight.dtype if scales is None else dtype
        if x.dtype != wanted:
            x = x.to(wanted)
        if bias is not None and bias.dtype != wanted:
            bias = bias.to(wanted)
        out = packed_linear(x, weight, self.out_features, scales=scales, bias=bias)
        return out if dtype == wanted else out.to(dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self._form()}"


class PackedEmbedding(Packed):
    """`torch.nn.Embedding` that shares its table with a `PackedLinear`, as tied models do."""

    def __init__(self, head: PackedLinear, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__(head.weight, head.scales, head.out_features, head.in_features)
        self.weight, self.scales = head.weight, head.scales  # the same parameters
        self.num_embeddings, self.embedding_dim, self.padding_idx = head.out_features, head.in_features, padding_idx
        self.dtype = dtype

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def forward(self, ids: Tensor) -> Tensor:
        at = ids.flatten()
        panel, lane = at // quantization.PANEL, at % quantization.PANEL
        weight = self.weight[panel, :, lane].unsqueeze(2)  # each row as a panel of one
        if self.scales is None:
            rows = quantization.unpack(weight, len(at))
        else:
            scales = self.scales[panel, :, lane].unsqueeze(2)
            rows = quantization.dequantize(weight, len(at), scales, None, self.dtype)
        return rows.view(*ids.shape, -1)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._form()}, shared"
