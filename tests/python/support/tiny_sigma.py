"""Small random SIGMA models that the tests share, their inputs, and a record of what runs."""

from collections import Counter
from inspect import signature

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerFast
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput

from diffqkv import SigmaConfig, SigmaForCausalLM

ATTENTIONS = ["diffqkv", "sdpa", "eager"]
COMPRESSIONS = [None, "expand", "absorbed"]
HEADS = [(8, 2, 4), (8, 4, 2), (12, 4, 6)]
# What `save_pretrained` puts beside the weights.
MODEL_FILES = {"configuration_sigma.py", "fusing_sigma.py", "generation_sigma.py", "modeling_sigma.py"}
VOCAB = 97
NEW_TOKENS = 8
# What the installed transformers calls a cache, where its own models and functions are given one.
CACHE = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"


def checkpoint_activations(model, **how) -> None:
    """In transformers before 5.24 this is called gradient checkpointing."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(how or None)


def cache_in(output: ModelOutput):
    return output.get(CACHE)


def tiny_config(heads=(8, 2, 4), **changes) -> SigmaConfig:
    n_q, n_k, n_v = heads
    fields = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": n_q,
        "num_key_heads": n_k,
        "num_value_heads": n_v,
        "head_dim": 16,
        "q_aug_dim": 96,
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        # Wide enough that tokens differ and attention is not flat.
        "initializer_range": 0.15,
    }
    return SigmaConfig(**{**fields, **changes})


def tiny_model(heads=(8, 2, 4), seed=0, model_class=SigmaForCausalLM, **changes):
    torch.manual_seed(seed)
    return model_class(tiny_config(heads, **changes)).eval()


def tokens(batch, length, seed=0) -> torch.Tensor:
    """Random token ids without the padding token, int64 `[batch, length]`."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths, side, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the given lengths, padded on one side: ids and attention mask `[len(lengths), max(lengths)]`."""
    ids = tokens(len(lengths), max(lengths), seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        absent = slice(0, max(lengths) - length) if side == "left" else slice(length, None)
        ids[row, absent] = 0
        mask[row, absent] = 0
    return ids, mask


@torch.no_grad()
def logits(model, ids, **options) -> torch.Tensor:
    return model(ids, **options).logits


def generate(model, ids, mask=None, **options):
    """Greedy, unless options say otherwise."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options)


def packed(lengths, rows=1, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of the given lengths one behind another, cut into rows: ids and position_ids `[rows, tokens]`."""
    ids = tokens(1, sum(lengths), seed).view(rows, -1)
    return ids, torch.cat([torch.arange(length) for length in lengths]).view_as(ids)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character: whatever a model generates is text. With a chat template."""
    characters = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(characters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=template + "{% if add_generation_prompt %}assistant: {% endif %}",
    )


def save_with_tokenizer(folder, seed=0, **changes):
    """Saves a tiny model of `character_tokenizer`'s tokens beside it, and returns both."""
    tokenizer = character_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(seed=seed, vocab_size=len(tokenizer), **ids, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


class Recorder(TorchDispatchMode):
    """Records which of our ops run, and every tensor as large as a dense mask of so many tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.ops: Counter[str] = Counter()
        self.dense: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op.namespace == "diffqkv":
            self.ops[op._schema.name.removeprefix("diffqkv::")] += 1
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.shape[-2:] == (self.tokens, self.tokens):
                self.dense.append(f"{op}: {list(x.shape)}")
        return result
