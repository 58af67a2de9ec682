"""A long prefix is read once, and its cache serves many prompts: copied for one, repeated for a batch, saved for later.

python examples/python/prefix.py [CHECKPOINT]
"""

import copy
import tempfile
from pathlib import Path

import torch
from checkpoint import load

import diffqkv

model, tokenizer = load()
prefix = "The functions of this module take an iterable and return an iterator. "
questions = ["What do they take?", "What do they give?", "Where are they? Say"]
options = {"max_new_tokens": 24, "do_sample": False}


def ids_of(*texts: str) -> torch.Tensor:
    return tokenizer(list(texts), return_tensors="pt", padding=True).input_ids


def answer(ids: torch.Tensor, cache: diffqkv.Cache | None = None) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, **options)


known = diffqkv.Cache(model.config)
with torch.no_grad():
    model(ids_of(prefix), cache=known)

# One prompt after another: each goes on from a copy.
for question in questions:
    ids = ids_of(prefix + question)
    answered = answer(ids, copy.deepcopy(known))
    print(f"{question}|{tokenizer.decode(answered[0, ids.shape[1] :], skip_special_tokens=True)}")
    assert torch.equal(answered, answer(ids)), "as without the cache"

# Prompts of one length as a batch: a row of the cache for each.
batch = ids_of(prefix + "What is it?", prefix + "Who was it?", prefix + "How are you")
rows = copy.deepcopy(known)
rows.batch_repeat_interleave(len(batch))
assert torch.equal(answer(batch, rows), answer(batch))

# Another process reads it from a file.
with tempfile.TemporaryDirectory() as folder:
    torch.save(known, file := Path(folder) / "prefix.pt")
    again = torch.load(file, weights_only=False)
assert torch.equal(answer(ids, again), answer(ids))
print(f"the {known.get_seq_length()} tokens of the prefix were computed once")
