"""Loads a built libdiffqkv.so into the torch of this interpreter and runs every op on the CPU: `smoke.py LIBRARY`.

Needs torch only, so that one library file can be tried in every release of it.
"""

import sys

import torch


def expanded(x, heads):
    return x.repeat_interleave(heads // x.shape[1], 1)


def attention(q, k, v):
    scores = q @ expanded(k, q.shape[1]).transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ expanded(v, q.shape[1]), scores.logsumexp(-1)


def main(library: str) -> None:
    torch.ops.load_library(library)
    ops = torch.ops.diffqkv
    torch.manual_seed(0)
    b, n_q, n_k, n_v, s, d = 2, 8, 2, 4, 70, 64
    groups = 2
    q, k, v = torch.randn(b, n_q, 1, d), torch.randn(b, n_k, s, d), torch.randn(b, n_v, s, d)
    want, want_lse = attention(q, k, v)

    out, lse = ops.flash_attention(q, k, v)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)

    k_cache = torch.full((b, n_k, 3, d, 32), float("nan"))
    v_cache = torch.full((b, groups, 96, n_v // groups, d), float("nan"))
    positions = torch.arange(s).expand(b, s)
    ops.kv_cache_update(k_cache, v_cache, k, v, positions, k_layout=1)
    lengths = torch.full((b,), s, dtype=torch.int32)
    out, _ = ops.decode_attention(q, k_cache, v_cache, lengths, k_layout=1)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)

    selected = ops.selective_v_attention(q, k_cache, v_cache, lengths, 10, tail=1, k_layout=1, return_indices=True)
    assert selected[3].shape == (b, n_q, 1, 10) and (selected[4] == 10).all() and (selected[2] < 1).all()

    gate, up = torch.randn(3, 77), torch.randn(3, 77)
    torch.testing.assert_close(ops.swiglu(gate, up), torch.nn.functional.silu(gate) * up)
    assert [x.shape for x in ops.swiglu_backward(gate, gate, up)] == [gate.shape] * 2

    x, bias, weight = torch.randn(3, 64), torch.randn(64), torch.randn(64, 64)
    panels = weight.view(2, 32, 64).transpose(1, 2).contiguous()
    torch.testing.assert_close(ops.packed_linear(x, panels, None, None, bias, 64), x @ weight.T + bias)
    integers = torch.randint(-128, 128, (64, 64), dtype=torch.int8)
    panels = integers.view(2, 32, 32, 2).transpose(1, 2).contiguous()
    out = ops.packed_linear(x, panels, torch.full((2, 2, 32), 0.01), None, None, 64)
    torch.testing.assert_close(out, 0.01 * x @ integers.T.float(), atol=0.01, rtol=0)

    try:
        ops.flash_attention(q, k[:, :1].expand(b, 3, s, d), v)
    except RuntimeError as error:
        assert "k: got 3 heads, want a divisor of q's 8 heads" in str(error), error
    else:
        raise AssertionError("3 K heads beside 8 q heads were accepted")
    print(f"torch {torch.__version__}: every op ran")


if __name__ == "__main__":
    main(sys.argv[1])
