"""Prompts of several lengths in one batch, padded on the left: each gets the continuation that it gets alone.

python examples/python/batch.py [CHECKPOINT]
"""

import torch
from checkpoint import load

model, tokenizer = load()
prompts = ["The module", "A function that returns", "If the list is empty, an error is raised, because"]

batch = tokenizer(prompts, return_tensors="pt", padding=True)  # the tokenizer pads on the left
options = {"max_new_tokens": 40, "do_sample": False}
together = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
new = together[:, batch.input_ids.shape[1] :]

for prompt, continuation in zip(prompts, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
    print(f"{prompt}|{continuation}\n")

alone = tokenizer(prompts[0], return_tensors="pt").input_ids
expected = model.generate(alone, attention_mask=torch.ones_like(alone), **options)[0, alone.shape[1] :]
print("as alone:", torch.equal(new[0, : len(expected)], expected))
