"""Dropout: a mask that is a function of seed, offset and position alone, and what the ops do with it."""

import pytest
import torch
from helpers import DTYPES, TRAINING_DTYPES, int32, qkv
from torch.utils.checkpoint import checkpoint

import diffqkv
from diffqkv import reference

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 " * 4, "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_answers(counter, key, words):
    """Those of Random123 for philox4x32-10."""
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert [int(word) for word in reference.philox([torch.tensor(c) for c in counter], key)] == words


def test_mask_by_its_definition():
    b, n_q, s_q, s_k, seed, offset = 2, 3, 2, 19, -(2**40) - 5, 2**32 - 1
    mask = reference.dropout_mask(b, n_q, s_q, s_k, 0.37, seed, offset)
    assert mask.shape == (b, n_q, s_q, s_k)
    key = (seed % 2**32, seed // 2**32 % 2**32)
    for entry, head, i, j in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape)).tolist():
        counter = [torch.tensor(c) for c in (j // 8, i, entry * n_q + head, offset)]
        word = int(reference.philox(counter, key)[j % 8 // 2])
        number = word % 65536 if j % 2 == 0 else word // 65536
        assert mask[entry, head, i, j] == (number >= 24248), (entry, head, i, j)


@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_mask_drops_the_share_that_it_should(dropout_p):
    """Within 5 standard deviations, in all, in each row and each column; also of neighbours and across seeds."""
    masks = torch.stack([reference.dropout_mask(2, 4, 100, 125, dropout_p, seed) for seed in (1, 2)]).double()
    p = reference.dropout_threshold(dropout_p) / 65536
    assert abs(p - dropout_p) <= 2**-17

    def check(kept, share):
        bound = 5 * (share * (1 - share) / kept[0].numel()) ** 0.5
        assert ((kept.flatten(1).mean(1) - share).abs() <= bound).all()

    for dims in ((0, 1, 2, 3, 4), (3, 0, 1, 2, 4), (4, 0, 1, 2, 3), (2, 0, 1, 3, 4)):
        check(masks.permute(dims), 1 - p)
    both = (1 - p) ** 2
    check(masks[..., 1:] * masks[..., :-1], both)
    check(masks[..., 1:, :] * masks[..., :-1, :], both)
    check((masks[0] * masks[1])[None], both)


def test_seed_and_offset_make_other_masks():
    masks = [reference.dropout_mask(1, 2, 8, 40, 0.5, seed) for seed in SEEDS]
    masks += [reference.dropout_mask(1, 2, 8, 40, 0.5, 0, offset) for offset in (1, 2**32 - 1)]
    for i, a in enumerate(masks):
        assert not any(torch.equal(a, b) for b in masks[:i])


# ---- what the ops do -------------------------------------------------------------------------------------------------


def readable_weights(s_q, s_k, dtype):
    """q, k, v of 4 heads with equal weights 1 / s_k, which V, a unit matrix, hands out as they are."""
    d_v = -(-s_k // 8) * 8
    q, k = torch.zeros(3, 4, s_q, 8, dtype=dtype), torch.zeros(3, 2, s_k, 8, dtype=dtype)
    return q, k, torch.eye(s_k, d_v, dtype=dtype).expand(3, 4, s_k, d_v)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("s_k", [1, 7, 13, 37, 100, 250])
@pytest.mark.parametrize("s_q", [1, 3, 35, 130])
def test_ops_apply_this_mask(ops, s_q, s_k, seed):
    """Forward and backward, bit for bit."""
    q, k, v = readable_weights(s_q, s_k, torch.float32)
    v = v.clone().requires_grad_()
    out, lse = ops.flash_attention(q, k, v, dropout_p=0.4, seed=seed, offset=9)
    mask = reference.dropout_mask(3, 4, s_q, s_k, 0.4, seed, 9)
    assert torch.equal(out[..., :s_k] != 0, mask)
    kept = 65536 / (65536 - 26214) / s_k
    torch.testing.assert_close(out[..., :s_k], mask * torch.tensor(kept, dtype=torch.float32))
    torch.testing.assert_close(lse, torch.full_like(lse, s_k).log())
    (dv,) = torch.autograd.grad(out[..., 0].sum(), v)
    torch.testing.assert_close(dv[..., 0], mask.sum(2) * torch.tensor(kept, dtype=torch.float32))
    for i in {0, s_q - 1}:
        row = ops.flash_attention(q, k, v, dropout_p=0.4, seed=seed, offset=9)[0][:, :, i]
        (dv,) = torch.autograd.grad(row.sum(), v)
        assert torch.equal(dv[..., 0] != 0, mask[:, :, i])


@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
def test_mask_is_that_of_every_dtype_and_of_long_rows(ops, dtype):
    """600 keys, read in three windows of V."""
    mask = reference.dropout_mask(1, 2, 9, 600, 0.25, 42)
    q, k = torch.zeros(1, 2, 9, 8, dtype=dtype), torch.zeros(1, 1, 600, 8, dtype=dtype)
    for start in (0, 200, 400):
        v = torch.zeros(600, 200, dtype=dtype)
        v[start : start + 200] = torch.eye(200, dtype=dtype)
        out, _ = ops.flash_attention(q, k, v.expand(1, 2, 600, 200), dropout_p=0.25, seed=42)
        assert torch.equal(out != 0, mask[..., start : start + 200])


def test_mask_of_packed_sequences(ops):
    """That of a padded batch: entry, query and key count inside the entry."""
    lengths = (5, 0, 37, 16)
    mask = reference.dropout_mask(4, 4, 37, 37, 0.5, -3, 1)
    q, k, v = torch.zeros(58, 4, 8), torch.zeros(58, 2, 8), torch.zeros(58, 2, 40)
    starts = [sum(lengths[:i]) for i in range(5)]
    for first, n in zip(starts, lengths, strict=False):
        v[first : first + n, :, :n] = torch.eye(n)[:, None]
    cu = int32(*starts)
    out, _ = ops.flash_attention_varlen(q, k, v, cu, cu, 37, 37, dropout_p=0.5, seed=-3, offset=1)
    for entry, (first, n) in enumerate(zip(starts, lengths, strict=False)):
        assert torch.equal(out[first : first + n, :, :n] != 0, mask[entry, :, :n, :n].transpose(0, 1))


def test_mask_does_not_move_with_masks_of_keys(ops):
    """Causal masks, windows and padding hide elements; what they leave is kept or dropped as before."""
    q, k, v = readable_weights(30, 45, torch.float32)
    whole = reference.dropout_mask(3, 4, 30, 45, 0.5, 7)
    start, end = int32(0, 10, 44), int32(45, 40, 45)
    options = {"causal": True, "kv_start": start, "kv_end": end}
    visible = reference.visible_keys(30, 45, 45, causal=True, window=(20, -1), start=start, end=end)
    out, _ = ops.flash_attention(q, k, v, window_left=20, dropout_p=0.5, seed=7, **options)
    assert torch.equal(out[..., :45] != 0, whole & visible)


def test_smallest_and_largest_probability(ops):
    q, k, v = readable_weights(4, 100, torch.float32)
    none, _ = ops.flash_attention(q, k, v, dropout_p=2**-18, seed=1)
    torch.testing.assert_close(none, ops.flash_attention(q, k, v)[0])
    almost_all, _ = ops.flash_attention(q, k, v, dropout_p=1 - 2**-20, seed=1)
    assert torch.equal(almost_all[..., :100] != 0, reference.dropout_mask(3, 4, 4, 100, 1 - 2**-20, 1))


def test_dropout_does_not_depend_on_threads(library, threads):
    leaves = [x.requires_grad_() for x in qkv(3, (8, 2, 4), 130, 300, (16, 24))]
    one = None
    for n in (1, 2, 3):
        threads(n)
        out, lse = library.flash_attention(*leaves, dropout_p=0.2, seed=5)
        results = (out, lse, *torch.autograd.grad(out.sin().sum(), leaves))
        one = one or results
        assert all(torch.equal(a, b) for a, b in zip(one, results, strict=True))


# ---- the seed --------------------------------------------------------------------------------------------------------


def test_seed_comes_from_torchs_generator(api):
    q, k, v = qkv(2, (4, 2, 4), 9, 30, (8, 16))

    def draw(seed):
        torch.manual_seed(seed)
        return [api.flash_attention(q, k, v, dropout_p=0.5) for _ in range(2)]

    first, second = draw(1)
    assert not torch.equal(first, second)
    again, other = draw(1), draw(2)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1]) and not torch.equal(first, other[0])
    torch.manual_seed(1)
    cu = int32(0, 9)
    packed = [x[0].transpose(0, 1) for x in (q, k[:, :, :9], v[:, :, :9])]
    varlen = [api.flash_attention_varlen(*packed, cu, cu, 9, 9, dropout_p=0.5) for _ in range(2)]
    assert not torch.equal(*varlen)


def test_generator_is_left_alone_where_nothing_is_drawn(api):
    q, k, v = qkv(1, (4, 2, 4), 3, 5, (8, 8))
    before = torch.get_rng_state()
    api.flash_attention(q, k, v)
    api.flash_attention(q, k, v, dropout_p=0.5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    given = api.flash_attention(q, k, v, dropout_p=0.0, seed=3)
    assert torch.equal(given, api.flash_attention(q, k, v))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_checkpointing_repeats_the_mask(api, dtype, use_reentrant):
    leaves = [x.requires_grad_() for x in qkv(2, (4, 2, 4), 9, 30, (8, 16), dtype)]

    def layer(q, k, v):
        return api.flash_attention(q, k, v, causal=True, dropout_p=0.3)

    torch.manual_seed(4)
    expected = torch.autograd.grad(layer(*leaves).float().square().sum(), leaves)
    torch.manual_seed(4)
    checkpoint(layer, *leaves, use_reentrant=use_reentrant).float().square().sum().backward()
    for leaf, want in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, want)


def test_compile_asks_for_the_seed():
    q, k, v = qkv(1, (4, 2, 4), 3, 5, (8, 8))

    def layer(seed):
        return diffqkv.flash_attention(q, k, v, dropout_p=0.5, seed=seed)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(3), layer(3)) and torch.equal(compiled(4), layer(4))
    with pytest.raises(Exception, match="seed: got None"):
        compiled(None)
