"""A conversation that streams its answers. One cache holds all turns, so each costs no more than its own tokens.

python examples/python/chat.py [CHECKPOINT]     # one line per turn, an empty line ends it
"""

import torch
from checkpoint import load
from transformers import TextStreamer

import diffqkv

model, tokenizer = load()
cache = diffqkv.Cache(model.config)
streamer = TextStreamer(tokenizer, skip_prompt=True)

conversation = torch.empty(1, 0, dtype=torch.long)
while line := input("> "):
    turn = tokenizer(line + "\n", return_tensors="pt").input_ids
    conversation = torch.cat([conversation, turn], dim=1)
    # generate feeds what the cache does not hold yet.
    conversation = model.generate(
        conversation,
        attention_mask=torch.ones_like(conversation),
        cache=cache,
        streamer=streamer,
        max_new_tokens=40,
        do_sample=True,
        temperature=0.8,
    )
print(f"{cache.get_seq_length()} tokens are cached, in {len(cache)} layers of {cache.shapes[0]}")
