"""A model on two CPU processes of `torch.distributed.run`: tensor parallel, as a pipeline, and under FSDP2.

Its argument is a folder with checkpoints: "whole", "other", and "one-group", which cannot be shared. They go round:
tensor parallel training of "whole" saves "tensor-parallel", from which FSDP2 goes on, and what that saves is loaded
tensor parallel. "results.pt" is compared with the results of one process in test_model_parallel.py.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from fsdp2_steps import fsdp2_accelerator, train
from tiny_sigma import cache_in, padded, tokens
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from diffqkv import SigmaForCausalLM

LEARNING_RATE = 0.1
CACHES = [{}, {"cache_implementation": "dynamic"}, {"cache_implementation": "static"}, {"use_cache": False}]
HAS_PIPELINES = "pp_size" in DistributedConfig.__dataclass_fields__  # transformers 5.16; before, tp_plan says all


def load(path: Path, **sizes):
    """The checkpoint, distributed as the sizes say."""
    options = {"distributed_config": DistributedConfig(**sizes)} if HAS_PIPELINES else {"tp_plan": "auto"}
    return SigmaForCausalLM.from_pretrained(path, **options)


@torch.no_grad()
def inference(model, caches) -> dict:
    """Logits of padded rows, of cached steps, and greedy tokens with several caches."""
    ids, mask = padded([9, 6], "left")
    cache, steps = None, []
    for begin, end in ((0, 6), (6, 7), (7, 9)):
        out = model(ids[:, begin:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
        cache, steps = cache_in(out), [*steps, out.logits]
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    return {
        "logits": model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()],
        "steps": torch.cat(steps, 1)[mask.bool()],
        "tokens": [model.generate(ids, **options, **cache) for cache in caches],
    }


def training_step(model) -> dict:
    """Loss and gradients, and the step that they make."""
    ids = tokens(2, 11)
    loss = model.train()(ids, labels=ids, use_cache=False).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LEARNING_RATE * parameter.grad
    whole = {
        name: x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad for name, x in model.named_parameters()
    }
    return {"loss": loss.detach(), "gradients": whole}


def main(folder: Path) -> None:
    results = {}
    model = SigmaForCausalLM.from_pretrained(folder / "whole", tp_plan="auto")
    key = model.model.layers[0].self_attn.k_proj.weight
    assert (key.to_local() if isinstance(key, DTensor) else key).shape[0] == model.config.num_key_heads // 2 * 16
    assert model.model._cache_shapes()[0][::2] == (model.config.num_key_heads // 2, model.config.num_value_heads // 2)
    with pytest.raises(ValueError, match="fuse_for_inference: got tp_size = 2, want a model that is not sharded"):
        model.fuse_for_inference()
    results["tensor parallel"] = inference(model, CACHES) | training_step(model)
    model.save_pretrained(folder / "tensor-parallel")
    results["other"] = inference(load(folder / "other", tp_size=2), CACHES)
    with pytest.raises(ValueError, match=r"tp_size: got 2, want a divisor of 1, the greatest common divisor of num_k"):
        load(folder / "one-group", tp_size=2)

    if HAS_PIPELINES:
        stage = load(folder / "whole", pp_size=2)
        assert [isinstance(layer, torch.nn.Identity) for layer in stage.model.layers].count(True) == 1
        results["pipeline"] = inference(stage, [CACHES[i] for i in (0, 1, 3)])

    accelerator = fsdp2_accelerator()
    sharded, losses = train(accelerator, SigmaForCausalLM.from_pretrained(folder / "tensor-parallel"))
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    options = {"state_dict": state, "is_main_process": accelerator.is_main_process}
    accelerator.unwrap_model(sharded).save_pretrained(folder / "fsdp2", **options)
    accelerator.wait_for_everyone()
    results["fsdp2"] = {"losses": losses}
    results["tensor parallel again"] = inference(load(folder / "fsdp2", tp_size=2), CACHES[:1])
    if accelerator.is_main_process:
        torch.save(results, folder / "results.pt")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # torch may abort on the way out, where a thread of gloo outlives its process group
