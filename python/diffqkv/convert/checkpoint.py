"""Checkpoints of safetensors files, read a tensor at a time and written a file at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Checkpoint:
    """The tensors in safetensors files of a folder. Reading one maps its file; nothing is kept.

    Attributes:
        tensors: all of them, without their data.

    Raises:
        ValueError: a file is absent or damaged, or has a tensor that is not of floating point.
    """

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self._files: dict[str, str] = {}
        self._open: tuple[str, safe_open] | None = None
        for file in files:
            if not (folder / file).exists():
                raise ValueError(f"source: got no {file} in {folder}, want the model's safetensors files")
            try:
                self._list(file)
            except SafetensorError as error:
                raise ValueError(f"source: got a damaged {file} in {folder} ({error}), want it whole") from error

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        if self._open is None or self._open[0] != file:
            self._open = file, safe_open(self.folder / file, "pt")
        return self._open[1].get_tensor(name)

    def _list(self, file: str) -> None:
        with safe_open(self.folder / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                part = tensors.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise ValueError(f"{name}: got dtype {part.get_dtype()}, want one of {', '.join(_DTYPES)}")
                self._files[name] = file
                self.tensors[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")


def open_model(source: str | Path, model_types: tuple[str, ...]) -> tuple[Checkpoint, PreTrainedConfig]:
    """A checkpoint with exactly the tensors that its config asks for; of tied embeddings, the input's.

    Raises:
        FileNotFoundError, ValueError: saying what is wrong.
    """
    try:
        folder = Path(cached_file(str(source), CONFIG_NAME, local_files_only=True)).parent
    except (OSError, ValueError):
        raise FileNotFoundError(
            f"source: got {str(source)!r}, want a folder with {CONFIG_NAME} or the id of a model in the local hub cache"
        ) from None
    fields, _ = PreTrainedConfig.get_config_dict(folder)
    model_type = fields.get("model_type")
    if model_type not in model_types:
        why = ", whose q_norm and k_norm Sigma has no place for" if model_type == "qwen3" else ""
        raise ValueError(f"model_type: got {model_type!r}{why}, want {' or '.join(map(repr, model_types))}")
    if fields.get("quantization_config"):
        raise ValueError("quantization_config: got a quantised model, want its original weights")
    try:
        config = AutoConfig.from_pretrained(folder)
    except StrictDataclassError as error:
        raise ValueError(f"{CONFIG_NAME}: {error}") from error
    checkpoint = Checkpoint(folder, _weight_files(folder))
    _check_tensors(checkpoint, config)
    return checkpoint, config


def _weight_files(folder: Path) -> list[str]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.exists():
        return [SAFE_WEIGHTS_NAME]
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"source: got a damaged {index.name} in {folder} ({error!r}), want it whole") from error


def _check_tensors(checkpoint: Checkpoint, config: PreTrainedConfig) -> None:
    have, want = checkpoint.tensors, empty_model(config).state_dict()
    # Old checkpoints of Llama carry RoPE's frequencies, which follow from the config.
    for name in [name for name in have if name.endswith("rotary_emb.inv_freq")]:
        del have[name]
    if config.tie_word_embeddings:
        del want[HEAD]
        if {EMBEDDING, HEAD} <= have.keys():
            if not torch.equal(checkpoint[HEAD], checkpoint[EMBEDDING]):
                raise ValueError(f"tie_word_embeddings: got true and a {HEAD} of its own, want false")
            del have[HEAD]
    kind = f"the tensors of a {config.model_type} model with this config.json"
    if missing := [name for name in want if name not in have]:
        raise ValueError(f"source: got no {_some(missing)}, want all of {kind}")
    if extra := [name for name in have if name not in want]:
        raise ValueError(f"source: got {_some(extra)}, want {kind} alone")
    for name, x in have.items():
        if x.shape != want[name].shape:
            raise ValueError(f"{name}: got shape {list(x.shape)}, want {list(want[name].shape)} by config.json")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


def check_dtype(dtype: torch.dtype) -> None:
    """Raises ValueError unless a result may have it."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}, want {', '.join(map(str, DTYPES))}")


def plan_files(tensors: Mapping[str, Tensor], max_shard_size: int | str) -> StateDictSplit:
    """Which file each tensor goes into."""
    try:
        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern=SAFE_WEIGHTS_NAME.replace(".", "{suffix}."),
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ValueError(f"max_shard_size: got {max_shard_size!r}, want bytes, or a size like '5GB'") from error
    return split


def write_files(folder: Path, split: StateDictSplit, make: Callable[[str], Tensor]) -> None:
    """Writes `make(name)` for every tensor of the plan, and an index where there are several files."""
    for file, names in tqdm(split.filename_to_tensors.items(), "writing", unit="file", disable=None):
        save_file({name: make(name).contiguous() for name in names}, folder / file, metadata={"format": "pt"})
        sync(folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without its weights, in float32."""
    with torch.device("meta"):
        # The model writes its dtype into its config.
        return AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.float32)


def streamed_model(checkpoint: Checkpoint, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a checkpoint in float32, for forward passes: a module has its weights only while it runs."""
    model = empty_model(config)
    # The frequencies of RoPE are in no checkpoint.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for name, module in model.named_modules():
        if module._parameters:
            module.register_forward_pre_hook(partial(_load, checkpoint, name))
            module.register_forward_hook(_unload)
    return model.eval()


def _load(checkpoint: Checkpoint, prefix: str, module: nn.Module, args: tuple) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            key = f"{prefix}.{name}"
            tensor = checkpoint[key if key in checkpoint.tensors else EMBEDDING]
            module._parameters[name] = nn.Parameter(tensor.float(), requires_grad=False)


def _unload(module: nn.Module, args: tuple, output: object) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
