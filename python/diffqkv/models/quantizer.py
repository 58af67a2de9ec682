"""Checkpoints of weights in panels, and plain ones read straight into panels, as transformers has its quantisations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import memory
from . import packed_linear

METHOD = "diffqkv"


@register_quantization_config(METHOD)
@dataclass(init=False, repr=False)
class WeightsConfig(QuantizationConfigMixin):
    """What `from_pretrained(..., quantization_config=)` makes of a Sigma model's linear layers.

    The model is the one that `from_pretrained(...).fuse_for_inference(weights, group_size=group_size)` gives, to the
    bit, but each layer is folded and packed as soon as it is read. Models of "int8" and "int4" can be saved, and are
    loaded from then on by `from_pretrained` alone.

    Args:
        weights: "packed", "int8" or "int4", as in `fuse_for_inference`.
        group_size: as in `fuse_for_inference`.
        tied_embedding: of a saved model, whether it holds the embedding packed, because a head shares it.

    Raises:
        ValueError: another form or group size.
    """

    weights: str
    group_size: int
    tied_embedding: bool

    def __init__(
        self,
        weights: str = "int4",
        group_size: int = 32,
        *,
        tied_embedding: bool = False,
        quant_method: str = METHOD,
    ) -> None:
        packed_linear.check_form(weights, group_size)
        self.quant_method = quant_method
        self.weights, self.group_size, self.tied_embedding = weights, group_size, tied_embedding


@register_quantizer(METHOD)
class WeightsQuantizer(HfQuantizer):
    """Reads both kinds of checkpoints; `pre_quantized` tells which. The model's own methods know what is packed."""

    quantization_config: WeightsConfig
    is_trainable = False

    def __init__(self, quantization_config: WeightsConfig, **kwargs) -> None:
        super().__init__(quantization_config, **kwargs)
        self._to_pack: set[str] = set()
        self._places: dict[str, Tensor] = {}

    @property
    def form(self) -> tuple[str, int]:
        return self.quantization_config.weights, self.quantization_config.group_size

    def validate_environment(self, device_map: Any = None, **kwargs) -> None:
        weights, _ = self.form
        devices = list(device_map.values()) if isinstance(device_map, dict) else []
        _check_one_device(devices)
        if self.pre_quantized:
            if not self.is_serializable():
                raise ValueError(f"weights: got {weights!r} in a configuration that was saved, want 'int8' or 'int4'")
        elif not isinstance(device_map, str):
            packed_linear.check_device("device_map", torch.device(devices[0] if devices else "cpu"), weights)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        if not hasattr(model, "_take_form"):
            raise ValueError(f"quantization_config: got one for a {type(model).__name__}, want a Sigma model")
        self._to_pack = model._check_form(*self.form)
        if self.pre_quantized:
            model._take_form(*self.form, self.quantization_config.tied_embedding)
        self._places = {
            name: place for name, place in model.state_dict().items() if not self.param_needs_quantization(model, name)
        }
        model._mismatched_weights = set()

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs) -> bool:
        return not self.pre_quantized and param_name.rpartition(".")[0] in self._to_pack

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        bits = packed_linear.BITS[self.form[0]]
        if bits is not None and self.param_needs_quantization(model, param_name):
            return bits / 8 + 2 / self.form[1]
        return super().param_element_size(model, param_name, param)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        _check_one_device(list(getattr(model, "hf_device_map", {}).values()))
        self._check_places(model)
        if self.pre_quantized:
            model.requires_grad_(False)
        else:
            model._take_form(*self.form)
        _leave_files(model, packed_too=self.pre_quantized)
        if not self.is_serializable():
            self.remove_quantization_config(model)

    def _check_places(self, model: PreTrainedModel) -> None:
        """What transformers before 5.24 leaves out: shapes, and dtypes in a model of other names than the file's."""
        values = model.state_dict(keep_vars=True)
        for name, place in self._places.items():
            value = values[name]
            if value.shape != place.shape:
                model._mismatched_weights.add((name, value.shape, place.shape))
            if value.dtype != place.dtype:
                value.data = value.data.to(place.dtype)
        self._places = {}

    def is_serializable(self) -> bool:
        return packed_linear.BITS[self.form[0]] is not None


class _Pack(ConversionOps):
    """Puts a weight in its place, and packs the layer that it completes."""

    def __init__(self, quantizer: WeightsQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str],
        **kwargs,
    ) -> dict[str, Tensor]:
        [[value]] = input_dict.values()
        layer, _, kind = full_layer_name.rpartition(".")
        module = model.get_submodule(layer)
        place = getattr(module, kind)
        if value.shape != place.shape:
            model._mismatched_weights.add((full_layer_name, value.shape, place.shape))
            value = value.new_zeros(place.shape)
        _place(module, kind, value)
        missing_keys.discard(full_layer_name)
        packed = model._form_loaded(layer, *self.quantizer.form)
        if packed is not None:
            for name, parameter in list(packed.named_parameters()):
                _place(packed, name, parameter.data)
        return {}


def _place(module: nn.Module, name: str, value: Tensor) -> None:
    parameter = nn.Parameter(value, requires_grad=False)
    parameter._is_hf_initialized = True  # or transformers would make it up
    setattr(module, name, parameter)


def _leave_files(model: PreTrainedModel, packed_too: bool) -> None:
    """Copies weights that are views of mapped files: one of them keeps its whole file mapped, and in small pages."""
    for module in model.modules():
        if packed_too or not isinstance(module, packed_linear.Packed):
            for parameter in module.parameters(recurse=False):
                if parameter.device.type == "cpu":
                    parameter.data = memory.contiguous(parameter.data)


def _check_one_device(devices: list[Any]) -> None:
    if len(set(devices)) > 1 or "disk" in devices:
        raise ValueError(
            f"device_map: got {sorted(set(map(str, devices)))}, want one device that holds all packed weights"
        )


def mark(model: PreTrainedModel, weights: str, group_size: int, tied_embedding: bool) -> None:
    """Tells transformers of a model whose weights are integers that it is quantised, and how it is saved."""
    config = WeightsConfig(weights, group_size, tied_embedding=tied_embedding)
    model.is_quantized, model.quantization_method = True, METHOD
    model.config.quantization_config, model.hf_quantizer = config, WeightsQuantizer(config, pre_quantized=True)
