"""A Llama made into a Sigma with fewer K heads, and trained briefly to get back what that cost.

    python examples/python/recover_conversion.py                               # a small Llama, trained here first
    python examples/python/recover_conversion.py --source FOLDER --text a.txt b.txt --key-heads 4 --learning-rate 2e-5

Prints the loss on held-out text of the source, of the Sigma, and of the Sigma after --steps steps, in nats per token.
Models, tokenizer and tokens are in --out. Uptraining as in GQA (arXiv 2305.13245), which takes 5% of the steps of
pre-training; a few hundred show where it goes.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from demo.corpus import CorpusError, build_corpus, python_documentation, read_files
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import diffqkv  # noqa: F401 (registers Sigma with the Auto classes)
from diffqkv.convert import to_sigma
from diffqkv.data import PackedDataset, byte_tokenizer, write_tokens

SOURCE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
SOURCE_LEARNING_RATE = 4e-3
HELD_OUT_WINDOWS = 256


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert a Llama to Sigma, and train it briefly.")
    parser.add_argument(
        "--source", help="a Llama, Mistral or Qwen2 with its tokenizer (default: a small one is trained)"
    )
    parser.add_argument("--source-steps", type=int, default=500, help="training steps of that small one")
    parser.add_argument("--text", nargs="+", type=Path, help="files to train on (default: Python's documentation)")
    parser.add_argument("--out", type=Path, default=Path("runs/recover"), help="folder for everything written")
    parser.add_argument("--key-heads", type=int, default=2)
    parser.add_argument("--value-heads", type=int, help="default: as the source has")
    parser.add_argument("--k-map", choices=("mean", "fit"), default="fit")
    parser.add_argument("--q-aug-dim", type=int)
    parser.add_argument("--steps", type=int, default=200, help="steps of recovery")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return parser.parse_args(argv)


def options(args: argparse.Namespace, **training: object) -> TrainingArguments:
    return TrainingArguments(
        args.out / "trainer",
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        **training,
    )


def train(model: torch.nn.Module, args: argparse.Namespace, steps: int, learning_rate: float) -> None:
    samples = steps * args.batch_size
    windows = PackedDataset(args.out / "train.npy", args.context, end_of_text=None, seed=0, samples=samples)
    recipe = options(
        args,
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.1,
        logging_steps=50,
        save_strategy="no",
    )
    Trainer(model, recipe, train_dataset=windows).train()


def loss(folder: Path, args: argparse.Namespace) -> float:
    """On held-out text, in nats per token."""
    held_out = PackedDataset(args.out / "held_out.npy", args.context, end_of_text=None)
    few = torch.utils.data.Subset(held_out, range(min(len(held_out), HELD_OUT_WINDOWS)))
    model = AutoModelForCausalLM.from_pretrained(folder)
    return Trainer(model, options(args), eval_dataset=few).evaluate()["eval_loss"]


def train_source(tokenizer, args: argparse.Namespace) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **SOURCE,
            vocab_size=len(tokenizer),
            max_position_embeddings=2 * args.context,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    folder = args.out / "source"
    train(model, args, args.source_steps, SOURCE_LEARNING_RATE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus(read_files(args.text) if args.text else python_documentation())
    tokenizer = AutoTokenizer.from_pretrained(args.source) if args.source else byte_tokenizer(2 * args.context)
    for name, texts in (("train", corpus.train), ("held_out", corpus.held_out)):
        write_tokens(args.out / f"{name}.npy", texts, tokenizer)
    sample = args.out / "sample.txt"
    sample.write_text("\n\n".join(corpus.train), encoding="utf-8")

    source = Path(args.source) if args.source else train_source(tokenizer, args)
    to_sigma(
        source,
        args.out / "converted",
        num_key_heads=args.key_heads,
        num_value_heads=args.value_heads,
        key_map=args.k_map,
        q_aug_dim=args.q_aug_dim,
        text=[sample],
        context=args.context,
        overwrite=True,
    )
    model = AutoModelForCausalLM.from_pretrained(args.out / "converted", dtype=torch.float32)
    train(model, args, args.steps, args.learning_rate)
    model.save_pretrained(args.out / "recovered")
    AutoTokenizer.from_pretrained(source).save_pretrained(args.out / "recovered")

    folders = {"source": source, "converted": args.out / "converted", "recovered": args.out / "recovered"}
    losses = {name: loss(folder, args) for name, folder in folders.items()}
    for name, value in losses.items():
        print(f"{name:<10} {value:.4f} nats per token")
    cost = losses["converted"] - losses["source"]
    if cost > 0.001:
        print(f"{args.steps} steps got back {(losses['converted'] - losses['recovered']) / cost:.0%} of {cost:.4f}")
    return losses


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main()
    except (CorpusError, OSError, ValueError) as error:
        sys.exit(f"recover_conversion: {error}")
