"""Several tokens per step: a draft model or the prompt itself proposes them, and the model keeps those it agrees with.

python examples/python/speculative.py [CHECKPOINT]     # the draft: the checkpoint's own first layer
"""

import torch
from checkpoint import load

model, tokenizer = load()
prompt = "for name in names: print(name)\nfor value in values: print(value)\nfor name in"
ids = tokenizer(prompt, return_tensors="pt").input_ids

steps = 0


def count(*_) -> None:
    global steps
    steps += 1


model.model.norm.register_forward_hook(count)


def generate(**mode) -> tuple[torch.Tensor, int]:
    """The tokens of one mode, and the forward passes that it took."""
    global steps
    steps = 0
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False, **mode)
    return tokens[:, : ids.shape[1] + 48], steps  # older releases of transformers add what the last step accepted


tokens, passes = generate()
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
print(f"one by one: {passes} forward passes")
for name, mode in {
    "prompt lookup": {"prompt_lookup_num_tokens": 6},
    "early exit after one layer": {"assistant_early_exit": 1},  # its passes through one layer count as well
}.items():
    assisted, passes = generate(**mode)
    print(f"{name}: {passes} forward passes, the same tokens: {torch.equal(assisted, tokens)}")
