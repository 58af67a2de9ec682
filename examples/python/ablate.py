"""Which heads can go? One small model per choice of K and V heads, trained on the same windows in the same order.

    python examples/python/ablate.py [STEPS]

At this size the differences between the choices drown in those between seeds; the paper's took 100 billion tokens.
"""

import sys
import tempfile
from math import log
from pathlib import Path
from pydoc_data.topics import topics

from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from diffqkv import SigmaConfig, SigmaForCausalLM
from diffqkv.cache import cache_shapes
from diffqkv.data import PackedDataset, byte_tokenizer, is_held_out, write_tokens

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
batch_size, context = 8, 256
tokenizer = byte_tokenizer(context)  # a token is a byte, so that the loss gives bits per byte
shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 8}

choices = {  # K heads, V heads, dimension of augmented Q
    "MHA": (8, 8, None),
    "GQA": (4, 4, None),
    "few K": (2, 8, None),
    "few V": (8, 2, None),
    "few K, augmented Q": (2, 8, 192),
}
print("model                q/K/V    parameters  cache bytes per token  bits per byte, held out")
with tempfile.TemporaryDirectory() as folder:
    data = {}
    for held_out in (False, True):
        file = Path(folder) / f"{held_out}.npy"
        write_tokens(file, (text for text in topics.values() if is_held_out(text, 0.1) == held_out), tokenizer)
        order = {} if held_out else {"seed": 0, "samples": steps * batch_size}
        data[held_out] = PackedDataset(file, context, end_of_text=tokenizer.eos_token_id, **order)
    options = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        train_sampling_strategy="sequential",  # the order is that of the dataset
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    for name, (n_k, n_v, q_aug_dim) in choices.items():
        set_seed(0)
        heads = {"num_key_heads": n_k, "num_value_heads": n_v, "q_aug_dim": q_aug_dim}
        model = SigmaForCausalLM(SigmaConfig(**shape, **heads, vocab_size=len(tokenizer)))
        trainer = Trainer(model, options, train_dataset=data[False], eval_dataset=data[True])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        bits = trainer.evaluate()["eval_loss"] / log(2)
        cached = sum(x.n_k * x.d_k + x.n_v * x.d_v for x in cache_shapes(model.config)) * model.dtype.itemsize
        count = model.num_parameters()
        print(f"{name:20} 8/{n_k}/{n_v} {count:13,} {cached:15,} {bits:24.3f}", flush=True)
