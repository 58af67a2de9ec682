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
