"""`make demo`: train, measure, plot, save, generate, time."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import DataLoader, Subset
from transformers import pipeline
from transformers.utils import logging as transformers_logging

import diffqkv
from diffqkv.benchmarks.cpu.cases import model_training
from diffqkv.data import PackedDataset, byte_tokenizer, write_tokens

from .corpus import Corpus, CorpusError, build_corpus, python_documentation, read_files
from .plot import plot_losses
from .reporting import report
from .speed import decode_table, forms_table, training_table
from .training import CheckpointError, Recipe, Trainer, bits_per_byte, fast_dtype, unigram_entropy

# Two to five minutes of training on two cores.
STEPS = 1200
CONTEXT = 256
HELD_OUT_WINDOWS = 256
COMPARED_WINDOWS = 64  # by each inference form
SAMPLES = 3
PROMPT_BYTES = 48
NEW_BYTES = 200
NEEDED_BYTES = 200 << 20

TOKENIZER = byte_tokenizer(max_length=2 * CONTEXT)
MODEL = {
    **model_training.SMALL,
    "vocab_size": len(TOKENIZER),
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description="Train a small Sigma on text, then use it.")
    parser.add_argument("text", nargs="*", type=Path, help="files of UTF-8 text (default: Python's own documentation)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything written")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    parser.add_argument("--restart", action="store_true", help="forget an earlier run in the same folder")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps: got {args.steps}, want a positive number")
    return args


def load_corpus(files: list[Path], console: Console) -> Corpus:
    corpus = build_corpus(read_files(files) if files else python_documentation())
    train, held_out = corpus.sizes
    source = f"{len(files)} files" if files else "documentation and docstrings of this Python"
    console.print(f"text: {source}, {train:,} bytes to train on, {held_out:,} held out, SHA-256 {corpus.sha256}")
    return corpus


def train(corpus: Corpus, recipe: Recipe, out: Path, console: Console) -> diffqkv.SigmaForCausalLM | None:
    """The trained model, or None after Ctrl-C. Writes tokens, checkpoint and plot into the folder `out`."""
    packing = {"context": recipe.context, "end_of_text": TOKENIZER.eos_token_id}
    for name, texts in (("train", corpus.train), ("held_out", corpus.held_out)):
        write_tokens(out / f"{name}.npy", texts, TOKENIZER)
    samples = recipe.steps * recipe.batch_size
    windows = PackedDataset(out / "train.npy", **packing, seed=recipe.seed, samples=samples)
    held_out = evaluation_batches(PackedDataset(out / "held_out.npy", **packing), HELD_OUT_WINDOWS)
    entropy = unigram_entropy(held_out)

    torch.manual_seed(recipe.seed)
    model = diffqkv.SigmaForCausalLM(diffqkv.SigmaConfig(**MODEL))
    console.print(
        f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {recipe.dtype}; heads "
        f"{MODEL['num_attention_heads']}/{MODEL['num_key_heads']}/{MODEL['num_value_heads']}, augmented Q"
    )
    trainer = Trainer(
        model,
        windows,
        recipe,
        evaluate=lambda: bits_per_byte(model, held_out, recipe.dtype),
        checkpoint=out / "checkpoint.pt",
        identity={"corpus": corpus.sha256, "model": MODEL},
    )
    if trainer.step:
        console.print(f"continuing {trainer.checkpoint} at step {trainer.step}")
    report(trainer.run(), trainer.step, recipe.steps, recipe.batch_size * recipe.context, console)
    if trainer.interrupted:
        console.print(f"interrupted after step {trainer.step}; the same command continues there")
        return None
    (_, before), *_, (_, after) = trainer.history.held_out
    plot_losses(trainer.history, entropy, out / "loss.png")
    console.print(
        f"held-out bits per byte: {before:.3f} before, {after:.3f} after; byte-unigram entropy of the same text: "
        f"{entropy:.3f}"
    )
    return model


def evaluation_batches(windows: PackedDataset, limit: int) -> list[dict[str, torch.Tensor]]:
    """At most `limit` windows, spread evenly."""
    chosen = np.linspace(0, len(windows) - 1, min(len(windows), limit)).round().astype(int).tolist()
    return list(DataLoader(Subset(windows, chosen), batch_size=16))


def show_samples(folder: Path, corpus: Corpus, console: Console) -> None:
    """Loads model and tokenizer again, as any user would, and continues the beginnings of held-out texts."""
    generator = pipeline("text-generation", model=str(folder))
    torch.manual_seed(0)
    longest = sorted(corpus.held_out, key=len)[-SAMPLES:]
    for text in longest:
        prompt = text.encode()[:PROMPT_BYTES].decode(errors="ignore")
        [result] = generator(prompt, max_new_tokens=NEW_BYTES, do_sample=True, temperature=0.7, return_full_text=False)
        console.rule("sample")
        console.print(prompt, style="bold", end="", markup=False, highlight=False)
        console.print(result["generated_text"], markup=False, highlight=False)
    console.rule()


def main() -> int:
    args = arguments()
    console = Console(soft_wrap=True)
    begin = time.perf_counter()
    # Its bars and its advice about devices would only interrupt the demo's own lines.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.restart:
            (args.out / "checkpoint.pt").unlink(missing_ok=True)
        free = shutil.disk_usage(args.out).free
        if free < NEEDED_BYTES:
            raise OSError(f"{args.out}: {free >> 20} MB free, want {NEEDED_BYTES >> 20}; use another --out")
        diffqkv.show_config()
        corpus = load_corpus(args.text, console)
        recipe = Recipe(steps=args.steps, context=CONTEXT, dtype=fast_dtype())
        model = train(corpus, recipe, args.out, console)
        if model is None:
            return 130
        model.save_pretrained(args.out / "model")
        TOKENIZER.save_pretrained(args.out / "model")
        show_samples(args.out / "model", corpus, console)
        held_out = PackedDataset(args.out / "held_out.npy", CONTEXT, end_of_text=TOKENIZER.eos_token_id)
        console.print(forms_table(args.out / "model", evaluation_batches(held_out, COMPARED_WINDOWS)))
        console.print(training_table(getattr(torch, recipe.dtype), recipe.batch_size))
        console.print(decode_table())
    except (CorpusError, CheckpointError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    console.print(
        f"written: {args.out / 'model'}, {args.out / 'loss.png'}, {args.out / 'checkpoint.pt'}; "
        f"{time.perf_counter() - begin:.0f} s in all on {torch.get_num_threads()} threads"
    )
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
