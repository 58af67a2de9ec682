"""A few training steps under accelerate with FSDP2, on two CPU processes of `torch.distributed.run`.

Writes the losses of the global batches and the whole weights to the file that its argument names.
"""

import os
import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from tiny_sigma import checkpoint_activations, packed, tiny_model
from torch.distributed.tensor import DTensor

LENGTHS = [5, 3, 9, 1, 6, 10]  # two rows of 17, of which each process takes one
STEPS = 3
LEARNING_RATE = 1e-2
LARGEST_NORM = 1.0


def batch():
    """A packed batch, with as many labels in each row."""
    ids, positions = packed(LENGTHS, rows=2)
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def fsdp2_accelerator() -> Accelerator:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["SigmaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # accelerate takes up a plugin on accelerators only: on CPUs it would, without a word, train by DDP.
    assert accelerator.distributed_type is DistributedType.MULTI_CPU and accelerator.num_processes == 2
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    return accelerator


def train(accelerator: Accelerator, model):
    """Some steps of a whole model: the sharded model, and the losses of the global batches."""
    checkpoint_activations(model.train())
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    rank = accelerator.process_index
    mine = {name: x[rank : rank + 1] for name, x in batch().items()}
    losses = []
    for _ in range(STEPS):
        loss = model(**mine).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean"))
    return model, losses


def main(path: str) -> None:
    accelerator = fsdp2_accelerator()
    model, losses = train(accelerator, tiny_model())
    weights = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    if accelerator.is_main_process:
        torch.save({"losses": losses, "weights": weights}, path)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)  # torch may abort on the way out, where a thread of gloo outlives its process group
