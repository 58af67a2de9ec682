"""What a decode step costs, by length of the cache: a layer of Sigma-1.5B beside GQA-16, without augmented Q.

    python examples/python/profile_decode.py [TOKENS ...]

Step: by the clock. Attention: the time within our op, by torch.profiler, whose trace is written for chrome://tracing or
Perfetto.
"""

import sys
import time
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

import diffqkv
from diffqkv import SigmaConfig, SigmaModel

lengths = [int(x) for x in sys.argv[1:]] or [1024, 4096, 16384]
device = torch.accelerator.current_accelerator() or torch.device("cpu")
activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
repeats = 20
layer = {"num_hidden_layers": 1, "vocab_size": 256, "dtype": torch.bfloat16}
configs = {
    "Sigma": SigmaConfig.from_preset("sigma-1.5b", **layer),
    "GQA-16": SigmaConfig.from_preset("sigma-1.5b", **layer, num_key_heads=16, q_aug_dim=None),
}


def filled_cache(config: SigmaConfig, tokens: int) -> diffqkv.Cache:
    cache = diffqkv.Cache(config, max_length=tokens + 1)
    for i, shape in enumerate(cache.shapes):
        k, v = ((1, n, tokens, d) for n, d in ((shape.n_k, shape.d_k), (shape.n_v, shape.d_v)))
        cache.append(*(torch.randn(size, dtype=torch.bfloat16, device=device) for size in (k, v)), i)
    return cache


@torch.inference_mode()
def step(model: SigmaModel, cache: diffqkv.Cache) -> None:
    model(torch.zeros(1, 1, dtype=torch.long, device=device), cache=cache)
    cache.crop(-1)
    if device.type != "cpu":
        torch.accelerator.synchronize()


print("model    tokens  cache, MiB  step, ms  attention, ms")
for name, config in configs.items():
    model = SigmaModel(config).to(device, torch.bfloat16).eval()
    for tokens in lengths:
        cache = filled_cache(config, tokens)
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            step(model, cache)
            seconds.append(time.perf_counter() - begin)
        with profile(activities=activities) as profiled:
            for _ in range(repeats):
                step(model, cache)
        events = {event.key: event for event in profiled.key_averages()}
        attention = events["diffqkv::decode_attention"]
        spent = (attention.device_time_total if device.type == "cuda" else attention.cpu_time_total) / repeats / 1e3
        size = sum(x.n_k * x.d_k + x.n_v * x.d_v for x in cache.shapes) * tokens * 2 / 2**20
        print(f"{name:8} {tokens:6,} {size:11.1f} {median(seconds) * 1e3:9.2f} {spent:14.3f}", flush=True)
    profiled.export_chrome_trace(f"trace-{name}.json")
print("traces of the longest caches: trace-Sigma.json, trace-GQA-16.json\n")
print(diffqkv.explain(32, 4, 16, 64, 64, s_q=1, s_k=lengths[-1], batch=1, dtype=torch.bfloat16))
