"""The ops alone, as a serving engine uses them: sequences of several lengths in one pool of pages.

python examples/python/paged_cache.py
"""

import torch

import diffqkv
from diffqkv import reference

n_q, n_k, n_v, d_k, d_v = 32, 4, 16, 64, 64
groups, page_size, pages = 4, 32, 64
k_pool = torch.empty(pages, groups, page_size, n_k // groups, d_k)
v_pool = torch.empty(pages, groups, page_size, n_v // groups, d_v)
free = torch.randperm(pages, dtype=torch.int32).tolist()

# Three prompts, packed one behind another: no padding is computed.
prompts = torch.tensor([70, 300, 33])
ends = torch.nn.functional.pad(prompts.cumsum(0), (1, 0)).int()
total, longest = int(ends[-1]), int(prompts.max())
q, k, v = torch.randn(total, n_q, d_k), torch.randn(total, n_k, d_k), torch.randn(total, n_v, d_v)
packed = diffqkv.flash_attention_varlen(q, k, v, ends, ends, longest, longest, causal=True)

# Their K and V go to pages: as many as each needs, with room for what is generated.
most = -(-(longest + 8) // page_size)
table = torch.full((3, most), -1, dtype=torch.int32)
for row, tokens in enumerate(prompts.tolist()):
    for page in range(-(-(tokens + 8) // page_size)):
        table[row, page] = free.pop()
for row, (begin, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
    new_k, new_v = (x[None, begin:end].transpose(1, 2) for x in (k, v))
    slots = torch.arange(end - begin)[None]
    diffqkv.kv_cache_update(k_pool, v_pool, new_k, new_v, slots, block_table=table[row : row + 1])

# A step of all three at once: write the new token, then attend, or fetch only the best 100 rows of V.
lengths = prompts.int()
for _ in range(4):
    q, k, v = torch.randn(3, n_q, 1, d_k), torch.randn(3, n_k, 1, d_k), torch.randn(3, n_v, 1, d_v)
    diffqkv.kv_cache_update(k_pool, v_pool, k, v, lengths[:, None], block_table=table)
    lengths += 1
    out = diffqkv.decode_attention(q, k_pool, v_pool, lengths, block_table=table)
    best, stats = diffqkv.selective_v_attention(
        q, k_pool, v_pool, lengths, top_k=100, tail="renorm", block_table=table, return_stats=True
    )

exact = reference.decode_attention(q, k_pool, v_pool, lengths, block_table=table)
print(f"{total} prompt tokens: {tuple(packed.shape)}; {lengths.tolist()} tokens in {pages - len(free)} pages")
print(f"largest error {(out - exact).abs().max():.1e}")
held = ", ".join(f"{mass:.0%}" for mass in stats.kept_mass.mean(dim=(1, 2)).tolist())
print(f"100 rows of V hold {held} of the softmax")
