"""The functions of FlashAttention 2.x and FlexHeadFA: their signatures, and their results against the reference."""

import inspect

import numpy as np
import pytest
import torch
from helpers import DTYPES, NAN, POISON_BLOCK, assert_accurate, assert_lse, assert_refusal, int32, qkv

import diffqkv
from diffqkv import flash_attn_interface as fa
from diffqkv import reference

D = torch.float64

# ---- signatures, as flash_attn 2.6.3 to 2.8.4 and flex_head_fa 0.1.2 have them ---------------------------------------

OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
SIGNATURES = {
    "flash_attn_func": (["q", "k", "v"], OPTIONS),
    "flash_attn_kvpacked_func": (["q", "kv"], OPTIONS),
    "flash_attn_qkvpacked_func": (["qkv"], OPTIONS),
    "flash_attn_varlen_func": (["q", "k", "v", *LENGTHS], OPTIONS | {"block_table": None}),
    "flash_attn_varlen_kvpacked_func": (["q", "kv", *LENGTHS], OPTIONS),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], OPTIONS),
    "flash_attn_with_kvcache": (
        ["q", "k_cache", "v_cache"],
        {
            "k": None,
            "v": None,
            "rotary_cos": None,
            "rotary_sin": None,
            "cache_seqlens": None,
            "cache_batch_idx": None,
            "cache_leftpad": None,
            "block_table": None,
            "softmax_scale": None,
            "causal": False,
            "window_size": (-1, -1),
            "softcap": 0.0,
            "rotary_interleaved": True,
            "alibi_slopes": None,
            "num_splits": 0,
            "return_softmax_lse": False,
        },
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    tensors, options = SIGNATURES[name]
    parameters = inspect.signature(getattr(fa, name)).parameters.values()
    assert [p.name for p in parameters] == [*tensors, *options]
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    assert defaults == options


def test_every_function_of_the_family_is_there():
    assert {name for name in dir(fa) if name.startswith("flash_attn_")} == set(SIGNATURES)
    assert diffqkv.flash_attn_interface is fa


# ---- batches of equal lengths ----------------------------------------------------------------------------------------


def tokens_first(x):
    """`[b, heads, s, d]`, as the reference has it, -> `[b, s, heads, d]`; its own inverse."""
    return x.transpose(1, 2).contiguous()


def inputs(heads=(8, 2, 4), dims=(32, 48), s_q=17, s_k=29, dtype=torch.float32, b=2):
    return [tokens_first(x) for x in qkv(b, heads, s_q, s_k, dims, dtype)]


def expected(q, k, v, dtype, **options):
    """out `[b, s, h, d]` and lse of the reference, computed in dtype."""
    options["window"] = options.pop("window_size", (-1, -1))
    out, lse = reference.attention(*map(tokens_first, (q, k, v)), return_lse=True, dtype=dtype, **options)
    return tokens_first(out), lse


def check(result, q, k, v, **options):
    out, lse, s_dmask = result
    exact, exact_lse = expected(q, k, v, D, **options)
    low, _ = expected(q, k, v, q.dtype, **options)
    assert out.dtype == q.dtype and out.is_contiguous()
    assert_accurate(out, exact, low)
    assert_lse(lse, exact_lse)
    assert s_dmask.numel() == 0 and s_dmask.dtype == q.dtype


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    "heads, dims", [((32, 4, 16), (64, 64)), ((12, 4, 6), (40, 56)), ((12, 6, 4), (64, 128)), ((8, 8, 8), (32, 32))]
)
def test_func(heads, dims, dtype):
    q, k, v = inputs(heads, dims, dtype=dtype)
    result = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    if dtype == torch.float64:
        exact, exact_lse = expected(q, k, v, D, causal=True)
        torch.testing.assert_close(result[0], exact)
        torch.testing.assert_close(result[1].double(), exact_lse, atol=2e-5, rtol=2e-5)
    else:
        check(result, q, k, v, causal=True)
    assert torch.equal(fa.flash_attn_func(q, k, v, causal=True), result[0])


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"softmax_scale": 0.3},
        {"window_size": (5, 0)},
        {"window_size": [3, 4]},
        {"window_size": (6, -1), "causal": True},
        {"window_size": (-1, 1)},
        {"softcap": 2.0, "causal": True},
    ],
    ids=str,
)
def test_func_options(options):
    q, k, v = inputs()
    check(fa.flash_attn_func(q, k, v, return_attn_probs=True, **options), q, k, v, **options)


def test_func_options_by_position():
    q, k, v = inputs()
    result = fa.flash_attn_func(q, k, v, 0.0, 0.3, True, (7, -1), 5.0, None, True, True)
    check(result, q, k, v, softmax_scale=0.3, causal=True, window_size=(7, -1), softcap=5.0)


def test_negative_limits_are_no_limits():
    """FlashAttention takes any negative number for an unlimited window or for no softcap."""
    q, k, v = inputs()
    out = fa.flash_attn_func(q, k, v, window_size=(-7, -2), softcap=-1.0)
    assert torch.equal(out, fa.flash_attn_func(q, k, v))


@pytest.mark.parametrize("name", "qkv")
def test_func_copies_what_has_no_unit_stride(name):
    tensors = dict(zip("qkv", inputs(), strict=True))
    out = fa.flash_attn_func(**tensors)
    tensors[name] = torch.stack([tensors[name], tensors[name]], -1).flatten(-2)[..., ::2]
    assert tensors[name].stride(-1) == 2
    assert torch.equal(fa.flash_attn_func(**tensors), out)


@pytest.mark.parametrize("d_v", [48, 47])
def test_heads_merge_by_view(d_v):
    q, k, v = inputs(heads=(8, 2, 4), dims=(32, d_v))
    assert fa.flash_attn_func(q, k, v).view(2, 17, 8 * d_v).shape == (2, 17, 8 * d_v)


ANY_DIMS = [(59, 59), (111, 64), (40, 33), (1, 3), (255, 250)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", ANY_DIMS, ids=str)
def test_any_head_dimension(dims, dtype):
    """The default of softmax_scale is that of the dimension given, not of the padded one."""
    for options in ({"causal": True}, {"softmax_scale": 0.3, "softcap": 2.0}):
        q, k, v = inputs(dims=dims, dtype=dtype)
        check(fa.flash_attn_func(q, k, v, return_attn_probs=True, **options), q, k, v, **options)


@pytest.mark.parametrize("dims", ANY_DIMS, ids=str)
def test_any_head_dimension_gradients(dims):
    check_gradients(
        lambda q, k, v: fa.flash_attn_func(q, k, v, causal=True),
        lambda q, k, v, dtype: expected(q, k, v, dtype, causal=True)[0],
        inputs(dims=dims),
    )


@pytest.mark.parametrize("causal", [np.True_, 1])
def test_causal_of_numpy(causal):
    q, k, v = inputs()
    assert torch.equal(fa.flash_attn_func(q, k, v, causal=causal), fa.flash_attn_func(q, k, v, causal=True))
    got = fa.flash_attn_with_kvcache(q, k, v, causal=causal)
    assert torch.equal(got, fa.flash_attn_with_kvcache(q, k, v, causal=True))


@pytest.mark.parametrize(
    "option", [{"causal": "no"}, {"causal": None}, {"softmax_scale": "1"}, {"softcap": "1"}], ids=repr
)
def test_options_of_a_wrong_type(option):
    q, k, v = inputs()
    for function in (fa.flash_attn_func, fa.flash_attn_with_kvcache):
        with pytest.raises(TypeError) as error:
            function(q, k, v, **option)
        assert_refusal(error.value, TypeError, *option)


@pytest.mark.parametrize("window", [torch.tensor([5, 2]), np.array([5, 2]), [np.int8(5), torch.tensor(2)]], ids=repr)
def test_windows_of_numpy_and_torch(window):
    q, k, v = inputs()
    out = fa.flash_attn_func(q, k, v, window_size=window)
    assert torch.equal(out, fa.flash_attn_func(q, k, v, window_size=(5, 2)))


def test_compiles():
    q, k, v = inputs()
    compiled = torch.compile(fa.flash_attn_func, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, causal=True), fa.flash_attn_func(q, k, v, causal=True))


def gradients(function, tensors):
    """The result of function, and the gradients of its sum weighted with fixed numbers."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*tensors)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=D).to(out.dtype)
    return torch.autograd.grad((out * weights).sum(), tensors)


def check_gradients(function, reference_function, tensors):
    """The gradients of function against those of reference_function(*tensors, dtype)."""
    exact = gradients(lambda *x: reference_function(*x, D), [x.double() for x in tensors])
    low = gradients(lambda *x: reference_function(*x, tensors[0].dtype), tensors)
    for actual, exact_one, low_one in zip(gradients(function, tensors), exact, low, strict=True):
        assert actual.dtype == tensors[0].dtype
        assert_accurate(actual, exact_one, low_one, factor=3.0)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_func_gradients(dtype, deterministic):
    check_gradients(
        lambda q, k, v: fa.flash_attn_func(q, k, v, causal=True, deterministic=deterministic),
        lambda q, k, v, dtype: expected(q, k, v, dtype, causal=True)[0],
        inputs(dtype=dtype),
    )


def test_kvpacked():
    q, k, v = inputs(heads=(8, 2, 2), dims=(32, 32))
    options = {"softmax_scale": 0.2, "causal": True}
    result = fa.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), return_attn_probs=True, **options)
    check(result, q, k, v, **options)
    result = fa.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), 0.0, 0.2, True, (4, -1), 3.0, None, True, True)
    check(result, q, k, v, window_size=(4, -1), softcap=3.0, **options)


def test_qkvpacked():
    q, k, v = inputs(heads=(4, 4, 4), dims=(32, 32), s_q=23, s_k=23)
    options = {"softmax_scale": 0.2, "causal": True}
    result = fa.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), return_attn_probs=True, **options)
    check(result, q, k, v, **options)
    result = fa.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), 0.0, 0.2, True, (4, -1), 3.0, None, True, True)
    check(result, q, k, v, window_size=(4, -1), softcap=3.0, **options)


def test_packed_gradients():
    q, k, v = inputs(heads=(4, 4, 4), dims=(32, 32), s_q=23, s_k=23)
    check_gradients(
        lambda qkv: fa.flash_attn_qkvpacked_func(qkv, causal=True),
        lambda qkv, dtype: expected(*qkv.unbind(2), dtype, causal=True)[0],
        [torch.stack([q, k, v], 2)],
    )
    check_gradients(
        lambda q, kv: fa.flash_attn_kvpacked_func(q, kv),
        lambda q, kv, dtype: expected(q, *kv.unbind(2), dtype)[0],
        [q, torch.stack([k, v], 2)],
    )


@pytest.mark.parametrize("dims", [(32, 48), (27, 50)])
def test_dropout(dims):
    """S_dmask holds the softmax, negative where it is dropped: out is the rest of it, scaled up, times V."""
    p, (q, k, v) = 0.25, inputs(dims=dims, s_q=40, s_k=50)
    out, lse, s_dmask = fa.flash_attn_func(q, k, v, dropout_p=p, causal=True, return_attn_probs=True)
    assert s_dmask.shape == (2, 8, 40, 50) and s_dmask.dtype == q.dtype
    assert_lse(lse, expected(q, k, v, D, causal=True)[1])
    torch.testing.assert_close(s_dmask.abs().sum(-1), torch.ones(2, 8, 40))
    weights = torch.where(s_dmask >= 0, s_dmask, 0) / (1 - p)
    torch.testing.assert_close(out, tokens_first(weights @ tokens_first(v).repeat_interleave(2, 1)))
    seen = s_dmask != 0
    assert abs((s_dmask < 0).sum() / seen.sum() - p) < 0.02


def test_dropout_draws_from_the_generator_of_torch():
    q, k, v = inputs()
    torch.manual_seed(3)
    first, second = (fa.flash_attn_func(q, k, v, 0.5) for _ in range(2))
    torch.manual_seed(3)
    again, _, _ = fa.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
    torch.testing.assert_close(first, again)
    assert not torch.equal(first, second)


def test_dropout_gradient():
    """out is linear in V: its derivative in the direction of V is out itself, with the same weights dropped."""
    q, k, v = inputs(dtype=torch.float64)
    v.requires_grad_()
    out, _, _ = fa.flash_attn_func(q, k, v, dropout_p=0.4, return_attn_probs=True)
    weights = torch.randn_like(out)
    (dv,) = torch.autograd.grad((out * weights).sum(), v)
    torch.testing.assert_close((dv * v).sum(), (out * weights).sum())


# ---- packed sequences ------------------------------------------------------------------------------------------------

Q_LENGTHS, K_LENGTHS = (5, 1, 17, 0), (9, 30, 17, 4)


def packed(lengths, heads, dim, dtype=torch.float32):
    return torch.randn(sum(lengths), heads, dim).to(dtype)


def offsets(lengths):
    return int32(0, *torch.tensor(lengths).cumsum(0).tolist())


def expected_varlen(q, k, v, dtype, q_lengths=Q_LENGTHS, k_lengths=K_LENGTHS, **options):
    parts = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    results = [expected(q[None], k[None], v[None], dtype, **options) for q, k, v in parts]
    return torch.cat([out[0] for out, _ in results]), torch.cat([lse[0] for _, lse in results], dim=1)


def check_varlen(result, q, k, v, q_lengths=Q_LENGTHS, k_lengths=K_LENGTHS, **options):
    out, lse, s_dmask = result
    exact, exact_lse = expected_varlen(q, k, v, D, q_lengths, k_lengths, **options)
    assert out.dtype == q.dtype and out.is_contiguous()
    assert_accurate(out, exact, expected_varlen(q, k, v, q.dtype, q_lengths, k_lengths, **options)[0])
    assert_lse(lse, exact_lse)
    assert s_dmask.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (4, 2), "softcap": 3.0}], ids=str)
def test_varlen(options, dtype):
    (n_q, n_k, n_v), (d_k, d_v) = (12, 4, 6), (40, 56)
    q = packed(Q_LENGTHS, n_q, d_k, dtype)
    k, v = packed(K_LENGTHS, n_k, d_k, dtype), packed(K_LENGTHS, n_v, d_v, dtype)
    lengths = (offsets(Q_LENGTHS), offsets(K_LENGTHS), max(Q_LENGTHS), max(K_LENGTHS))
    result = fa.flash_attn_varlen_func(q, k, v, *lengths, return_attn_probs=True, **options)
    check_varlen(result, q, k, v, **options)
    assert torch.equal(fa.flash_attn_varlen_func(q, k, v, *lengths, **options), result[0])


def test_varlen_packed():
    q, kv = packed(Q_LENGTHS, 8, 32), packed(K_LENGTHS, 2 * 2, 32).unflatten(1, (2, 2))
    lengths = (offsets(Q_LENGTHS), offsets(K_LENGTHS), max(Q_LENGTHS), max(K_LENGTHS))
    result = fa.flash_attn_varlen_kvpacked_func(q, kv, *lengths, 0.0, 0.2, True, (5, -1), 3.0, None, True, True)
    options = {"softmax_scale": 0.2, "causal": True, "window_size": (5, -1), "softcap": 3.0}
    check_varlen(result, q, *kv.unbind(1), **options)

    qkv = packed(Q_LENGTHS, 3 * 4, 32).unflatten(1, (3, 4))
    result = fa.flash_attn_varlen_qkvpacked_func(
        qkv, offsets(Q_LENGTHS), max(Q_LENGTHS), 0.0, 0.2, True, (5, -1), 3.0, None, True, True
    )
    check_varlen(result, *qkv.unbind(1), Q_LENGTHS, Q_LENGTHS, **options)


def test_varlen_gradients():
    lengths = (offsets(Q_LENGTHS), offsets(K_LENGTHS), max(Q_LENGTHS), max(K_LENGTHS))
    check_gradients(
        lambda q, k, v: fa.flash_attn_varlen_func(q, k, v, *lengths, causal=True),
        lambda q, k, v, dtype: expected_varlen(q, k, v, dtype, causal=True)[0],
        [packed(Q_LENGTHS, 8, 32), packed(K_LENGTHS, 2, 32), packed(K_LENGTHS, 4, 48)],
    )
    check_gradients(
        lambda qkv: fa.flash_attn_varlen_qkvpacked_func(qkv, offsets(Q_LENGTHS), max(Q_LENGTHS)),
        lambda qkv, dtype: expected_varlen(*qkv.unbind(1), dtype, k_lengths=Q_LENGTHS)[0],
        [packed(Q_LENGTHS, 3 * 4, 32).unflatten(1, (3, 4))],
    )


def test_varlen_dropout():
    """As in test_dropout, for each sequence; S_dmask is zero behind their ends."""
    p, q, k, v = 0.25, packed(Q_LENGTHS, 8, 32), packed(K_LENGTHS, 2, 32), packed(K_LENGTHS, 4, 48)
    lengths = (offsets(Q_LENGTHS), offsets(K_LENGTHS), 20, 30)
    torch.manual_seed(3)
    out, lse, s_dmask = fa.flash_attn_varlen_func(q, k, v, *lengths, dropout_p=p, return_attn_probs=True)
    assert_lse(lse, expected_varlen(q, k, v, D)[1])
    assert s_dmask.shape == (4, 8, 20, 30) and s_dmask.dtype == q.dtype
    parts = zip(s_dmask, Q_LENGTHS, K_LENGTHS, out.split(Q_LENGTHS), v.split(K_LENGTHS), strict=True)
    for s_part, s_q, s_k, out_part, v_part in parts:
        assert not s_part[:, s_q:].any() and not s_part[:, :, s_k:].any()
        s_part = s_part[:, :s_q, :s_k]
        torch.testing.assert_close(s_part.abs().sum(-1), torch.ones(8, s_q))
        weights = torch.where(s_part >= 0, s_part, 0) / (1 - p)
        dropped = weights @ v_part.transpose(0, 1).repeat_interleave(2, 0)
        torch.testing.assert_close(out_part, dropped.transpose(0, 1))
    torch.manual_seed(3)
    torch.testing.assert_close(fa.flash_attn_varlen_func(q, k, v, *lengths, dropout_p=p), out)


def test_varlen_lengths_of_numpy_and_torch():
    q, k, v = packed(Q_LENGTHS, 8, 32), packed(K_LENGTHS, 2, 32), packed(K_LENGTHS, 4, 48)
    offsets_q, offsets_k = offsets(Q_LENGTHS), offsets(K_LENGTHS)
    want = fa.flash_attn_varlen_func(q, k, v, offsets_q, offsets_k, 17, 30)
    for longest in (offsets_q.diff().max(), offsets_k.diff().max()), (np.int64(17), np.int64(30)):
        assert torch.equal(fa.flash_attn_varlen_func(q, k, v, offsets_q, offsets_k, *longest), want)
    torch.manual_seed(3)
    longest = offsets_q.diff().max(), offsets_k.diff().max()
    _, _, s_dmask = fa.flash_attn_varlen_func(q, k, v, offsets_q, offsets_k, *longest, 0.5, return_attn_probs=True)
    assert s_dmask.shape == (4, 8, 17, 30)


@pytest.mark.parametrize("dims", [(59, 33), (64, 111)], ids=str)
def test_varlen_of_any_head_dimension(dims):
    lengths = (offsets(Q_LENGTHS), offsets(K_LENGTHS), max(Q_LENGTHS), max(K_LENGTHS))
    tensors = [packed(Q_LENGTHS, 8, dims[0]), packed(K_LENGTHS, 2, dims[0]), packed(K_LENGTHS, 4, dims[1])]
    check_varlen(
        fa.flash_attn_varlen_func(*tensors, *lengths, causal=True, return_attn_probs=True), *tensors, causal=True
    )
    check_gradients(
        lambda q, k, v: fa.flash_attn_varlen_func(q, k, v, *lengths),
        lambda q, k, v, dtype: expected_varlen(q, k, v, dtype)[0],
        tensors,
    )


def in_pages(x, lengths, block_size):
    """Packed rows x in the blocks of a pool, in any order, with NaN in every slot that holds none; and the table."""
    most = -(-max(lengths) // block_size)
    table = torch.randperm(2 * len(lengths) * most)[: len(lengths) * most].view(-1, most)
    pages = x.new_full((2 * len(lengths) * most, block_size, *x.shape[1:]), NAN)
    for row, rows in zip(table, x.split(lengths), strict=True):
        for first in range(0, len(rows), block_size):
            part = rows[first : first + block_size]
            pages[row[first // block_size], : len(part)] = part
    unused = torch.arange(most) * block_size >= torch.tensor(lengths)[:, None]
    return pages, torch.where(unused, POISON_BLOCK, table).int()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (4, 2), "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("dims", [(40, 56), (59, 33)], ids=str)
@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_varlen_of_pages(block_size, dims, options):
    q, k = packed(Q_LENGTHS, 12, dims[0]), packed(K_LENGTHS, 4, dims[0])
    v = packed(K_LENGTHS, 6, dims[1])
    lengths = (offsets(Q_LENGTHS), offsets(K_LENGTHS), max(Q_LENGTHS), max(K_LENGTHS))
    torch.manual_seed(3)
    k_pages, table = in_pages(k, K_LENGTHS, block_size)
    torch.manual_seed(3)
    v_pages, _ = in_pages(v, K_LENGTHS, block_size)
    options = options | {"block_table": table}
    result = fa.flash_attn_varlen_func(q, k_pages, v_pages, *lengths, return_attn_probs=True, **options)
    del options["block_table"]
    check_varlen(result, q, k, v, **options)


def test_varlen_of_pages_gradients():
    """They reach the slots that hold a row, and no other."""
    lengths = (offsets(Q_LENGTHS), offsets(K_LENGTHS), max(Q_LENGTHS), max(K_LENGTHS))
    q, k = packed(Q_LENGTHS, 8, 32), packed(K_LENGTHS, 2, 32)
    pages, table = in_pages(k, K_LENGTHS, 16)

    def attend(q, pages):
        return fa.flash_attn_varlen_func(q, pages, pages, *lengths, causal=True, block_table=table)

    dq, dpages = gradients(attend, [q, pages])
    want_dq, want_dk = gradients(lambda q, k: fa.flash_attn_varlen_func(q, k, k, *lengths, causal=True), [q, k])
    torch.testing.assert_close(dq, want_dq)
    used = ~pages.isnan()
    assert torch.equal(dpages[~used], torch.zeros_like(dpages[~used]))
    torch.testing.assert_close(dpages[used].sort().values, want_dk.flatten().sort().values)


# ---- the cache -------------------------------------------------------------------------------------------------------

HEADS, DIMS, CAPACITY = (12, 4, 6), (32, 48), 64


class Cache:
    """A FlashAttention cache with NaN in every slot that holds no token, and its tokens as dense K and V.

    Entries of the batch lie in the entries batch_idx of a larger cache, or in shuffled blocks of a larger pool.
    """

    def __init__(self, lengths, s_new=0, dtype=torch.float32, leftpad=None, batch_idx=None, block_size=None, dims=DIMS):
        (_, n_k, n_v), (d_k, d_v), b = HEADS, dims, len(lengths)
        slot = torch.arange(CAPACITY)
        first = torch.zeros(b, dtype=torch.int32) if leftpad is None else leftpad
        self.lengths, self.s_new, self.leftpad, self.batch_idx = lengths, s_new, leftpad, batch_idx
        empty = ((slot < first[:, None]) | (slot >= lengths[:, None]))[..., None, None]
        self.dense = [
            torch.randn(b, CAPACITY, n, d).to(dtype).masked_fill(empty, NAN) for n, d in ((n_k, d_k), (n_v, d_v))
        ]
        self.block_table = None
        if block_size is not None:
            blocks = CAPACITY // block_size
            table = torch.randperm(2 * b * blocks)[: b * blocks].view(b, blocks)
            self.where = (table.repeat_interleave(block_size, 1), slot % block_size)
            unused = torch.arange(blocks) * block_size >= (lengths + s_new)[:, None]
            self.block_table = torch.where(unused, POISON_BLOCK, table).int()
            shape = (2 * b * blocks, block_size)
        else:
            entry = torch.arange(b) if batch_idx is None else batch_idx.long()
            self.where = (entry[:, None], slot)
            shape = (int(entry.max()) + 3, CAPACITY)
        self.stored = [x.new_full((*shape, *x.shape[2:]), NAN) for x in self.dense]
        for pages, x in zip(self.stored, self.dense, strict=True):
            pages[self.where] = x

    def options(self):
        return {
            "cache_seqlens": self.lengths,
            "cache_leftpad": self.leftpad,
            "cache_batch_idx": self.batch_idx,
            "block_table": self.block_table,
        }

    def append(self, k, v):
        """Writes new tokens into the dense K and V."""
        for entry, length in enumerate(self.lengths.tolist()):
            for x, new in zip(self.dense, (k, v), strict=True):
                x[entry, length : length + self.s_new] = new[entry]

    def assert_stored(self):
        """The cache holds the dense K and V, and NaN everywhere else."""
        for pages, x in zip(self.stored, self.dense, strict=True):
            want = torch.full_like(pages, NAN)
            want[self.where] = x
            torch.testing.assert_close(pages, want, equal_nan=True)


def expected_with_cache(q, cache, dtype, causal=False, window_size=(-1, -1), **options):
    """out `[b, s_q, n_q, d_v]` and lse: each entry by itself, on the keys that it has."""
    results = []
    for entry, (q_entry, k, v) in enumerate(zip(q, *cache.dense, strict=True)):
        end = int(cache.lengths[entry]) + cache.s_new
        first = 0 if cache.leftpad is None else int(cache.leftpad[entry])
        keys = slice(first, max(first, end))
        options_of_entry = {"causal": causal, "window_size": window_size, **options}
        results.append(expected(q_entry[None], k[None, keys], v[None, keys], dtype, **options_of_entry))
    return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])


def check_with_cache(q, cache, k=None, v=None, rotated=None, **options):
    """rotated: what q and k are after the rotation, which is then among the options."""
    q_rotated, k_rotated = (q, k) if rotated is None else rotated
    if k is not None:
        cache.append(k_rotated, v)
    arguments = {"k": k, "v": v, **cache.options(), **options}
    out, lse = fa.flash_attn_with_kvcache(q, *cache.stored, return_softmax_lse=True, **arguments)
    for name in ("rotary_cos", "rotary_sin", "rotary_interleaved", "num_splits"):
        options.pop(name, None)
    exact, exact_lse = expected_with_cache(q_rotated, cache, D, **options)
    assert out.dtype == q.dtype and out.is_contiguous() and lse.is_contiguous()
    assert_accurate(out, exact, expected_with_cache(q_rotated, cache, q.dtype, **options)[0])
    assert_lse(lse, exact_lse)
    cache.assert_stored()
    assert torch.equal(fa.flash_attn_with_kvcache(q, *cache.stored, **arguments), out)


def new_tokens(b, s_q, s_new, dtype=torch.float32, dims=DIMS):
    (n_q, n_k, n_v), (d_k, d_v) = HEADS, dims
    return [torch.randn(b, s, n, d).to(dtype) for s, n, d in ((s_q, n_q, d_k), (s_new, n_k, d_k), (s_new, n_v, d_v))]


KINDS = {
    "plain": {},
    "leftpad": {"leftpad": int32(7, 0, 1)},
    "batch_idx": {"batch_idx": int32(4, 0, 3)},
    "leftpad, batch_idx": {"leftpad": int32(7, 0, 1), "batch_idx": int32(4, 0, 3)},
    "paged": {"block_size": 16},
}
MASKS = [
    {"causal": False},
    {"causal": True},
    {"causal": True, "window_size": (6, -1)},
    {"causal": True, "window_size": (6, 3)},
    {"window_size": (6, 0)},
    {"window_size": (6, 2)},
    {"window_size": (-1, 1)},
    {"window_size": (3, -1)},
]


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("s_q", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_with_kvcache(kind, s_q, options):
    """Full, nearly empty and partly filled entries; with s_q = 5 some queries see nothing."""
    q, _, _ = new_tokens(3, s_q, 0)
    check_with_cache(q, Cache(int32(CAPACITY, 2, 41), **KINDS[kind]), **options)


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("kind", [{}, {"leftpad": int32(7)}, {"block_size": 16}], ids=["plain", "leftpad", "paged"])
def test_with_kvcache_of_one_entry(kind, options):
    check_with_cache(new_tokens(1, 5, 0)[0], Cache(int32(41), **kind), **options)


@pytest.mark.parametrize("wide", [2**31 - 42, 2**31 - 1, 2**31, 2**63 - 1])
def test_with_kvcache_windows_that_hold_everything(wide):
    q, cache = new_tokens(2, 5, 0)[0], Cache(int32(41, 3))
    for window in ((wide, wide), (-1, wide), (wide, -1), (2, wide), (wide, 1)):
        limits = tuple(-1 if n == wide else n for n in window)
        results = (
            fa.flash_attn_with_kvcache(q, *cache.stored, **cache.options(), window_size=w, return_softmax_lse=True)
            for w in (window, limits)
        )
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("s_q, s_new", [(1, 1), (5, 5), (5, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_with_kvcache_append(kind, s_q, s_new, options):
    q, k, v = new_tokens(3, s_q, s_new)
    check_with_cache(q, Cache(int32(20, 2, CAPACITY - s_new), s_new, **KINDS[kind]), k, v, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_with_kvcache_dtypes(dtype, causal):
    q, k, v = new_tokens(3, 4, 4, dtype)
    cache = Cache(int32(20, 0, 60), 4, dtype, block_size=8)
    check_with_cache(q, cache, k, v, causal=causal, softmax_scale=0.3, softcap=2.0, num_splits=5)


def rotate(x, cos, sin, positions, interleaved):
    """x `[b, s, heads, d]` with each pair of dimensions turned, as complex numbers; positions `[b, s]`."""
    pairs = cos.shape[1]
    turned, rest = x[..., : 2 * pairs].float(), x[..., 2 * pairs :]
    order = (pairs, 2) if interleaved else (2, pairs)
    halves = turned.unflatten(-1, order)
    real, imaginary = halves.unbind(-1 if interleaved else -2)
    angle = torch.complex(cos.float(), sin.float())[positions][:, :, None]
    result = torch.view_as_real(torch.complex(real, imaginary) * angle)
    result = result if interleaved else result.transpose(-1, -2)
    return torch.cat([result.flatten(-2).to(x.dtype), rest], -1)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (9, 4)}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_with_kvcache_rotary(kind, options, interleaved):
    """Without causality and window all queries stand at cache_seqlens, otherwise one after the other."""
    q, k, v = new_tokens(3, 5, 3)
    cache = Cache(int32(20, 2, 55), 3, **KINDS[kind])
    angle = torch.rand(CAPACITY, 8) * 6
    cos, sin = angle.cos(), angle.sin()
    first = cache.lengths[:, None].long()
    q_positions = first + torch.arange(5) if options else first.expand(3, 5)
    rotated = rotate(q, cos, sin, q_positions, interleaved), rotate(k, cos, sin, first + torch.arange(3), interleaved)
    rotary = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    check_with_cache(q, cache, k, v, rotated, **rotary, **options)


@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float32])
def test_with_kvcache_rotary_in_low_precision(table_dtype):
    """The rotation is computed in float32 and rounded once; it is interleaved by default; d_rot may be all of d_k."""
    q, k, v = new_tokens(2, 1, 1, torch.bfloat16)
    cache = Cache(int32(20, 0), 1, torch.bfloat16)
    angle = torch.rand(CAPACITY, DIMS[0] // 2) * 6
    cos, sin = angle.cos().to(table_dtype), angle.sin().to(table_dtype)
    positions = cache.lengths[:, None].long()
    rotated = rotate(q, cos, sin, positions, True), rotate(k, cos, sin, positions, True)
    check_with_cache(q, cache, k, v, rotated, rotary_cos=cos, rotary_sin=sin)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (6, 2)}], ids=str)
@pytest.mark.parametrize("dims", [(59, 64), (16, 33), (1, 111)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_with_kvcache_of_any_head_dimension(kind, dims, options):
    """The cache is padded on the way; nothing but the new rows is written."""
    q, k, v = new_tokens(3, 5, 2, dims=dims)
    check_with_cache(q, Cache(int32(20, 2, CAPACITY - 2), 2, dims=dims, **KINDS[kind]), k, v, **options)
    check_with_cache(q, Cache(int32(20, 2, CAPACITY), dims=dims, **KINDS[kind]), **options)


def test_with_kvcache_of_any_head_dimension_rotary():
    """The rotated dimensions are some of those that are there."""
    q, k, v = new_tokens(3, 1, 1, dims=(12, 20))
    cache = Cache(int32(20, 2, 55), 1, dims=(12, 20))
    angle = torch.rand(CAPACITY, 6) * 6
    positions = cache.lengths[:, None].long()
    rotated = [rotate(x, angle.cos(), angle.sin(), positions, True) for x in (q, k)]
    check_with_cache(q, cache, k, v, rotated, rotary_cos=angle.cos(), rotary_sin=angle.sin())


def test_an_append_beyond_the_pages_is_an_error_of_both_kinds():
    """FlashAttention's RuntimeError names the block table."""
    q, k, v = new_tokens(2, 1, 1)
    cache = Cache(int32(CAPACITY, 2), block_size=16)
    before = [x.clone() for x in cache.stored]
    for kind in (RuntimeError, ValueError):
        with pytest.raises(kind, match=f"^cache_seqlens: got {CAPACITY}, want 0 to {CAPACITY - 1}, .* block_table"):
            fa.flash_attn_with_kvcache(q, *cache.stored, k, v, **cache.options())
    torch.testing.assert_close(cache.stored, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("length", [30, np.int32(30), torch.tensor(30), int32(30)[0]], ids=repr)
def test_with_kvcache_lengths(length):
    """One length for all entries may be an integer; without one the whole cache counts."""
    q, k, v = new_tokens(2, 2, 2)
    cache = Cache(int32(30, 30), 2)
    cache.append(k, v)
    out = fa.flash_attn_with_kvcache(q, *cache.stored, k, v, cache_seqlens=length, causal=True)
    exact, low = (expected_with_cache(q, cache, dtype, causal=True)[0] for dtype in (D, torch.float32))
    assert_accurate(out, exact, low)
    cache.assert_stored()
    for block_size in (None, 32):
        full = Cache(int32(CAPACITY, CAPACITY), block_size=block_size)
        out = fa.flash_attn_with_kvcache(q, *full.stored, block_table=full.block_table)
        assert torch.equal(out, fa.flash_attn_with_kvcache(q, *full.stored, **full.options()))


def test_with_kvcache_leaves_its_arguments():
    """Nothing but the cache is written."""
    q, k, v = new_tokens(2, 2, 2)
    cache = Cache(int32(30, 3), 2)
    arguments = [q, k, v, cache.lengths]
    before = [x.clone() for x in arguments]
    cos = torch.ones(CAPACITY, 8)
    fa.flash_attn_with_kvcache(q, *cache.stored, k, v, cos, cos, cache.lengths)
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


def test_with_kvcache_long_queries():
    """A prompt whose queries become heads of one: more rows than any kernel block."""
    q, k, v = new_tokens(1, 50, 50)
    check_with_cache(q, Cache(int32(3), 50), k, v)


@pytest.mark.parametrize("causal", [False, True])
def test_with_kvcache_compiles(causal):
    q, k, v = new_tokens(2, 3, 3)
    cache, cos = Cache(int32(30, 3), 3), torch.ones(CAPACITY, 8)
    arguments = (k, v, cos, cos, cache.lengths)
    compiled = torch.compile(fa.flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    out = compiled(q, *(x.clone() for x in cache.stored), *arguments, causal=causal)
    torch.testing.assert_close(out, fa.flash_attn_with_kvcache(q, *cache.stored, *arguments, causal=causal))


def test_with_kvcache_no_queries():
    q, _, _ = new_tokens(2, 0, 0)
    for options in MASKS:
        out, lse = fa.flash_attn_with_kvcache(
            q, *Cache(int32(30, 3)).stored, cache_seqlens=int32(30, 3), return_softmax_lse=True, **options
        )
        assert out.shape == (2, 0, 12, 48) and lse.shape == (2, 12, 0)


# ---- what is refused -------------------------------------------------------------------------------------------------


def arguments_of(name):
    """Right arguments of a function, by name."""
    q, k, v = inputs(heads=(4, 4, 4), dims=(16, 16), s_q=6, s_k=6)
    cu_seqlens = int32(0, 6, 12)
    lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": 6, "max_seqlen_k": 6}
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    if name == "flash_attn_with_kvcache":
        return {
            "q": q[:, :2], "k_cache": k, "v_cache": v, "k": k[:, :2].clone(), "v": v[:, :2].clone(),
            "rotary_cos": torch.ones(6, 4), "rotary_sin": torch.ones(6, 4), "cache_seqlens": int32(4, 0),
            "cache_batch_idx": int32(1, 0), "cache_leftpad": int32(0, 0),
        }  # fmt: skip
    return {
        "flash_attn_func": {"q": q, "k": k, "v": v},
        "flash_attn_kvpacked_func": {"q": q, "kv": torch.stack([k, v], 2)},
        "flash_attn_qkvpacked_func": {"qkv": torch.stack([q, k, v], 2)},
        "flash_attn_varlen_func": dict(zip("qkv", flat, strict=True)) | lengths,
        "flash_attn_varlen_kvpacked_func": {"q": flat[0], "kv": torch.stack(flat[1:], 1)} | lengths,
        "flash_attn_varlen_qkvpacked_func": {"qkv": torch.stack(flat, 1), "cu_seqlens": cu_seqlens, "max_seqlen": 6},
    }[name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_arguments_below_are_right_without_the_change(name):
    getattr(fa, name)(**arguments_of(name))


@pytest.mark.parametrize("name", SIGNATURES)
def test_alibi_is_not_built(name):
    with pytest.raises(NotImplementedError, match="^alibi_slopes: got .+, want "):
        getattr(fa, name)(**arguments_of(name), alibi_slopes=torch.ones(4))


PAGES = int32(0, 1, 2, 3, 4, 5).view(2, 3)
WRONG = [
    ("flash_attn_func", {"q": lambda x: x[0]}, ValueError, "q"),
    ("flash_attn_func", {"q": None}, TypeError, "q"),
    ("flash_attn_func", {"k": lambda x: x[:1]}, ValueError, "k"),
    ("flash_attn_func", {"k": lambda x: x[..., :8]}, ValueError, "k"),
    ("flash_attn_func", {"v": lambda x: x[:, :5]}, ValueError, "v"),
    ("flash_attn_func", {"k": lambda x: x[:, :, :3]}, ValueError, "k"),
    ("flash_attn_func", {"v": lambda x: x.transpose(1, 2)}, ValueError, "v"),
    ("flash_attn_func", {"v": lambda x: x.bfloat16()}, TypeError, "v"),
    ("flash_attn_func", {"q": lambda x: x[..., :0], "k": lambda x: x[..., :0]}, ValueError, "q"),
    ("flash_attn_func", {"v": lambda x: x.repeat(1, 1, 1, 17)[..., :257]}, ValueError, "v"),
    ("flash_attn_func", {"window_size": (1, 2, 3)}, ValueError, "window_size"),
    ("flash_attn_func", {"window_size": 3}, TypeError, "window_size"),
    ("flash_attn_func", {"window_size": (1.0, 0)}, TypeError, "window_size"),
    ("flash_attn_func", {"window_size": (True, 0)}, TypeError, "window_size"),
    ("flash_attn_func", {"window_size": torch.rand(2)}, TypeError, "window_size"),
    ("flash_attn_func", {"softcap": NAN}, ValueError, "softcap"),
    ("flash_attn_kvpacked_func", {"kv": lambda x: x[:, :, :1]}, ValueError, "kv"),
    ("flash_attn_kvpacked_func", {"kv": lambda x: x[0]}, ValueError, "kv"),
    ("flash_attn_kvpacked_func", {"kv": 3}, TypeError, "kv"),
    ("flash_attn_qkvpacked_func", {"qkv": lambda x: x[:, :, :2]}, ValueError, "qkv"),
    ("flash_attn_qkvpacked_func", {"qkv": lambda x: x.transpose(2, 3)}, ValueError, "qkv"),
    ("flash_attn_varlen_func", {"q": lambda x: x[None]}, ValueError, "q"),
    ("flash_attn_varlen_func", {"v": lambda x: x[:5]}, ValueError, "v"),
    ("flash_attn_varlen_func", {"k": lambda x: x[..., :8]}, ValueError, "k"),
    ("flash_attn_varlen_func", {"max_seqlen_q": torch.tensor(6.0)}, TypeError, "max_seqlen_q"),
    ("flash_attn_varlen_func", {"max_seqlen_k": torch.tensor(5)}, ValueError, "max_seqlen_k"),
    ("flash_attn_varlen_func", {"block_table": int32(0, 1)[:, None]}, ValueError, "k"),
    *(
        ("flash_attn_varlen_func", {"k": pages, "v": pages, "block_table": PAGES.clone(), **change}, error, name)
        for pages in (lambda x: x.unflatten(0, (6, 2)),)
        for change, error, name in [
            ({"v": lambda x: x.unflatten(0, (4, 3))}, ValueError, "v"),
            ({"block_table": PAGES.long()}, TypeError, "block_table"),
            ({"block_table": PAGES[:1]}, ValueError, "block_table"),
            ({"block_table": PAGES[0]}, ValueError, "block_table"),
            ({"block_table": PAGES[:, :2]}, ValueError, "cu_seqlens_k"),
            ({"cu_seqlens_k": lambda x: x[:0]}, ValueError, "cu_seqlens_k"),
            ({"block_table": PAGES + 1}, ValueError, "block_table"),
            ({"block_table": PAGES - 1}, ValueError, "block_table"),
            ({"block_table": [[0]]}, TypeError, "block_table"),
            ({"cu_seqlens_k": int32(0, 7, 6)}, ValueError, "cu_seqlens_k"),
            ({"cu_seqlens_k": int32(1, 6, 12)}, ValueError, "cu_seqlens_k"),
            ({"cu_seqlens_k": torch.tensor([0, 6, 12])}, TypeError, "cu_seqlens_k"),
            ({"max_seqlen_k": 5}, ValueError, "max_seqlen_k"),
        ]
    ),
    ("flash_attn_varlen_kvpacked_func", {"kv": lambda x: x[:, :1]}, ValueError, "kv"),
    ("flash_attn_varlen_qkvpacked_func", {"qkv": lambda x: x[:, :2]}, ValueError, "qkv"),
    ("flash_attn_with_kvcache", {"q": lambda x: x[0]}, ValueError, "q"),
    ("flash_attn_with_kvcache", {"q": lambda x: x.half()}, TypeError, "q"),
    ("flash_attn_with_kvcache", {"q": lambda x: x[:, :, :3]}, ValueError, "k_cache"),
    ("flash_attn_with_kvcache", {"q": lambda x: x.requires_grad_()}, ValueError, "q"),
    ("flash_attn_with_kvcache", {"k_cache": lambda x: x[..., :8]}, ValueError, "k_cache"),
    ("flash_attn_with_kvcache", {"v_cache": lambda x: x[:, :3]}, ValueError, "v_cache"),
    ("flash_attn_with_kvcache", {"v_cache": lambda x: x[:, :, :3]}, ValueError, "v_cache"),
    ("flash_attn_with_kvcache", {"k": None}, ValueError, "k"),
    ("flash_attn_with_kvcache", {"v": None}, ValueError, "v"),
    ("flash_attn_with_kvcache", {"k": lambda x: x[:, :, :2]}, ValueError, "k"),
    ("flash_attn_with_kvcache", {"v": lambda x: x[:, :1]}, ValueError, "v"),
    ("flash_attn_with_kvcache", {"v": lambda x: x.half()}, TypeError, "v"),
    ("flash_attn_with_kvcache", {"k": None, "v": None}, ValueError, "k"),
    ("flash_attn_with_kvcache", {"rotary_sin": None}, TypeError, "rotary_sin"),
    ("flash_attn_with_kvcache", {"rotary_cos": None}, TypeError, "rotary_cos"),
    ("flash_attn_with_kvcache", {"rotary_sin": lambda x: x[:, :2]}, ValueError, "rotary_sin"),
    ("flash_attn_with_kvcache", {"rotary_cos": lambda x: x[:5]}, ValueError, "rotary_cos"),
    ("flash_attn_with_kvcache", {"rotary_cos": lambda x: x.half()}, TypeError, "rotary_cos"),
    (
        "flash_attn_with_kvcache",
        {"rotary_cos": torch.ones(6, 9), "rotary_sin": torch.ones(6, 9)},
        ValueError,
        "rotary_cos",
    ),
    ("flash_attn_with_kvcache", {"q": lambda x: x.repeat(1, 2, 1, 1), "causal": True}, ValueError, "rotary_cos"),
    ("flash_attn_with_kvcache", {"cache_seqlens": None}, ValueError, "cache_seqlens"),
    ("flash_attn_with_kvcache", {"cache_seqlens": 5}, ValueError, "cache_seqlens"),
    ("flash_attn_with_kvcache", {"cache_seqlens": -1}, ValueError, "cache_seqlens"),
    ("flash_attn_with_kvcache", {"cache_seqlens": lambda x: x.long()}, TypeError, "cache_seqlens"),
    ("flash_attn_with_kvcache", {"cache_seqlens": int32(1)}, ValueError, "cache_seqlens"),
    ("flash_attn_with_kvcache", {"cache_seqlens": 2.5}, TypeError, "cache_seqlens"),
    ("flash_attn_with_kvcache", {"cache_seqlens": True}, TypeError, "cache_seqlens"),
    ("flash_attn_with_kvcache", {"cache_seqlens": torch.tensor(5)}, ValueError, "cache_seqlens"),
    ("flash_attn_with_kvcache", {"softcap": float("inf")}, ValueError, "softcap"),
    ("flash_attn_with_kvcache", {"softcap": "2"}, TypeError, "softcap"),
    ("flash_attn_with_kvcache", {"window_size": (2.0, 0)}, TypeError, "window_size"),
    ("flash_attn_with_kvcache", {"q": lambda x: x[..., :9], "k_cache": lambda x: x[..., :9]}, ValueError, "k"),
    *(
        (
            "flash_attn_with_kvcache",
            {"q": rows, "k": rows, "k_cache": lambda x, d=d: x[:1, ..., :d].expand(2, -1, -1, -1), "rotary_cos": None}
            | {"rotary_sin": None},
            ValueError,
            "k_cache",
        )
        for d, rows in ((16, lambda x: x[..., :16]), (9, lambda x: x[..., :9]))
    ),
    ("flash_attn_with_kvcache", {"cache_leftpad": int32(0, -1)}, ValueError, "cache_leftpad"),
    ("flash_attn_with_kvcache", {"cache_leftpad": lambda x: x.long()}, TypeError, "cache_leftpad"),
    ("flash_attn_with_kvcache", {"cache_batch_idx": int32(0, 2)}, ValueError, "cache_batch_idx"),
    ("flash_attn_with_kvcache", {"cache_batch_idx": int32(0)}, ValueError, "cache_batch_idx"),
    ("flash_attn_with_kvcache", {"block_table": torch.zeros(2, 1).int()}, ValueError, "cache_batch_idx"),
    (
        "flash_attn_with_kvcache",
        {"cache_batch_idx": None, "block_table": torch.zeros(1, 1).int()},
        ValueError,
        "block_table",
    ),
    (
        "flash_attn_with_kvcache",
        {"cache_batch_idx": None, "block_table": torch.full((2, 1), 2).int()},
        ValueError,
        "block_table",
    ),
    (
        "flash_attn_with_kvcache",
        {"cache_batch_idx": None, "k_cache": lambda x: x[:1], "v_cache": lambda x: x[:1]},
        ValueError,
        "k_cache",
    ),
]


@pytest.mark.parametrize("name, changes, error, argument", WRONG)
def test_wrong_arguments(name, changes, error, argument):
    """An exception of the right type that names the argument, and nothing written."""
    arguments = arguments_of(name)
    for key, change in changes.items():
        arguments[key] = change(arguments[key]) if callable(change) else change
    tensors = {key: x for key, x in arguments.items() if isinstance(x, torch.Tensor)}
    before = {key: x.detach().clone() for key, x in tensors.items()}
    with pytest.raises(error) as caught:
        getattr(fa, name)(**arguments)
    assert_refusal(caught.value, error, argument)
    for key, x in tensors.items():
        assert torch.equal(x.detach(), before[key]), f"{key} was written"


def test_messages_speak_of_this_layout():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"^k: got shape \[2, 28, 2, 16\], want \[b = 2, s_k, n_k, d_k = 32\]$"):
        fa.flash_attn_func(q, k[:, 1:, :, :16], v)
