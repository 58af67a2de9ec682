// Tensors of an attention call for the emulated GPU, and the same call in float64 on the CPU as its reference.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/device.cuh"
#include "params/layout.h"
#include "support/caller.h"
#include "support/catch.h"

namespace diffqkv {

struct AttentionCase {
  HeadGroups heads;
  int64_t batch = 1, s_q = 1, s_k = 1, d_k = 64, d_v = 64;  // s_k: capacity
  bool causal = false;
  int64_t window_left = -1, window_right = -1;
  double softcap = 0.0;
  bool sinks = false;
  double dropout_p = 0.0;
  bool padded = false;    // kv_start and kv_end differ from entry to entry; some entries have no key
  bool cached = false;    // a cache: length = kv_end, rows [pages, G, page size, heads of a group, dim]
  int64_t page_size = 0;  // of a cache with a block table, pages in a shuffled order
  bool packed = false;    // cu_seqlens; s_q and s_k are the longest
  int64_t gap = 0;        // NaN after every row; not a multiple of 8: rows are not aligned to 16 bytes
};

inline void capture_text(const AttentionCase& c, std::string& text) {
  const auto add = [&](const char* name, double value) {
    text += std::string(name) + " " + std::to_string(value) + ", ";
  };
  add("n_q", double(c.heads.n_q)), add("n_k", double(c.heads.n_k)), add("n_v", double(c.heads.n_v));
  add("batch", double(c.batch)), add("s_q", double(c.s_q)), add("s_k", double(c.s_k)), add("d_k", double(c.d_k));
  add("d_v", double(c.d_v)), add("causal", c.causal), add("left", double(c.window_left));
  add("right", double(c.window_right)), add("softcap", c.softcap), add("sinks", c.sinks), add("dropout", c.dropout_p);
  add("padded", c.padded), add("cached", c.cached), add("page", double(c.page_size)), add("packed", c.packed);
  add("gap", double(c.gap));
}

// E: an element type of device.cuh. Everything that must not be read or is not yet written holds NaN.
template <class E>
struct AttentionProblem {
  using T = typename E::T;
  // An array in E and the same numbers in float64.
  struct Array {
    std::vector<T> e;
    std::vector<double> wide;
    explicit Array(int64_t n = 0) { reset(n); }
    void reset(int64_t n) {
      e.assign(static_cast<size_t>(n), E::put(std::numeric_limits<float>::quiet_NaN()));
      wide.assign(static_cast<size_t>(n), std::numeric_limits<double>::quiet_NaN());
    }
    void set(int64_t i, float x) {
      e[static_cast<size_t>(i)] = E::put(x);
      wide[static_cast<size_t>(i)] = E::get(e[static_cast<size_t>(i)]);
    }
  };

  AttentionCase c;
  Array q, k, v, out, dout, dq, dk, dv;
  std::vector<float> lse, dlse, sinks, dsinks;
  std::vector<double> lse64, dlse64, sinks64, dsinks64;
  std::vector<int32_t> start, end, cu_q, cu_k, table;
  TokenView q_view, out_view, dk_view, dv_view;  // without data and dtype
  KvView k_view, v_view;
  Paging paging;
  int64_t total_q = 0;
  double softmax_scale = 1.0 / std::sqrt(double(c.d_k));
  std::mt19937 random{1234};

  explicit AttentionProblem(const AttentionCase& the_case) : c(the_case) {
    lengths();
    const HeadGroups& h = c.heads;
    total_q = c.packed ? cu_q.back() : c.batch * c.s_q;
    const int64_t keys = c.packed ? cu_k.back() : c.batch * c.s_k;
    q_view = rows_view(h.n_q, c.d_k), out_view = rows_view(h.n_q, c.d_v);
    q.reset(total_q * h.n_q * (c.d_k + c.gap)), dq.reset(total_q * h.n_q * c.d_k);
    out.reset(total_q * h.n_q * (c.d_v + c.gap)), dout.reset(total_q * h.n_q * (c.d_v + c.gap));
    lse.assign(static_cast<size_t>(total_q * h.n_q), std::numeric_limits<float>::quiet_NaN());
    lse64.assign(lse.size(), std::numeric_limits<double>::quiet_NaN());
    dk_view = key_rows_view(h.n_k, c.d_k, keys), dv_view = key_rows_view(h.n_v, c.d_v, keys);
    dk.reset(keys * h.n_k * c.d_k), dv.reset(keys * h.n_v * c.d_v);
    keys_and_values();
    std::normal_distribution<float> normal;
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t head = 0; head < h.n_q; ++head)
        for (int64_t i = 0; i < queries(b); ++i) {
          const int64_t token = (c.packed ? cu_q[static_cast<size_t>(b)] : 0) + i;
          const auto fill = [&](Array& x, const TokenView& view, int64_t d) {
            for (int64_t j = 0; j < d; ++j)
              x.set((c.packed ? 0 : b) * view.stride_batch + head * view.stride_head + token * view.stride_token + j,
                    normal(random));
          };
          fill(q, q_view, c.d_k), fill(dout, out_view, c.d_v);
        }
    for (int64_t head = 0; c.sinks && head < h.n_q; ++head) {
      sinks.push_back(normal(random));
      sinks64.push_back(sinks.back());
    }
    dsinks.assign(static_cast<size_t>(h.n_q), std::numeric_limits<float>::quiet_NaN());
    dsinks64.assign(static_cast<size_t>(h.n_q), std::numeric_limits<double>::quiet_NaN());
    for (size_t i = 0; i < lse.size(); ++i) {
      dlse.push_back(normal(random));
      dlse64.push_back(dlse.back());
    }
  }

  // Replaces q and K: the dot products are multiples of `size`, exact in every precision, and no two of a query are
  // alike, so that it has one weight if `size` is large. Up to 251 keys.
  void spread(float size) {
    REQUIRE(c.s_k <= 251);
    const auto make = [&](Array& x) {
      for (size_t i = 0; i < x.e.size(); ++i)
        if (!std::isnan(x.wide[i])) x.set(int64_t(i), 0.0f);
    };
    make(q), make(k);
    const HeadGroups& h = c.heads;
    for (int64_t b = 0; b < c.batch; ++b) {
      const size_t e = static_cast<size_t>(b);
      for (int64_t head = 0; head < h.n_q; ++head)
        for (int64_t i = 0; i < queries(b); ++i)
          q.set((c.packed ? 0 : b) * q_view.stride_batch + head * q_view.stride_head +
                    ((c.packed ? cu_q[e] : 0) + i) * q_view.stride_token,
                i % 2 == 0 ? 1.0f : -3.0f);
      const int64_t length = c.packed ? cu_k[e + 1] - cu_k[e] : c.s_k;
      for (int64_t token = 0; token < length; ++token)
        for (int64_t head = 0; head < h.n_k; ++head) {
          if (!c.packed && (token < start[e] || token >= end[e])) continue;
          const int64_t row = kv_row(k_view, head / h.k_per_group(), head % h.k_per_group(), kv_page(paging, b, token));
          k.set(row, size * float((token * 37 + 11) % 251 - 125));
        }
    }
  }

  AttentionParams params() {
    AttentionParams p = common();
    p.q = with(q_view, q.e.data(), E::kDType), p.out = with(out_view, out.e.data(), E::kDType);
    p.k = with(k_view, k.e.data(), E::kDType), p.v = with(v_view, v.e.data(), E::kDType);
    p.lse = lse.data();
    p.sinks = c.sinks ? sinks.data() : nullptr;
    return p;
  }
  FlashAttentionBackwardParams backward_params() {
    FlashAttentionBackwardParams p;
    p.forward = params();
    p.dout = with(out_view, dout.e.data(), E::kDType);
    p.dlse = dlse.data();
    p.dq = with(contiguous(c.heads.n_q, c.d_k), dq.e.data(), E::kDType);
    p.dk = with(dk_view, dk.e.data(), E::kDType), p.dv = with(dv_view, dv.e.data(), E::kDType);
    p.dsinks = c.sinks ? dsinks.data() : nullptr;
    return p;
  }
  // Fills out.wide and lse64.
  void reference() { run_serially(wide_params(), 1); }
  // Fills dq.wide, dk.wide, dv.wide and dsinks64; also copies the reference's out and lse, rounded, to where the
  // kernels take them from.
  void reference_backward() {
    reference();
    for (size_t i = 0; i < out.wide.size(); ++i) out.e[i] = E::put(float(out.wide[i]));
    for (size_t i = 0; i < lse.size(); ++i) lse[i] = float(lse64[i]);
    FlashAttentionBackwardParams p;
    p.forward = wide_params();
    p.dout = with(out_view, dout.wide.data(), DType::f64);
    p.dlse = dlse64.data();
    p.dq = with(contiguous(c.heads.n_q, c.d_k), dq.wide.data(), DType::f64);
    p.dk = with(dk_view, dk.wide.data(), DType::f64), p.dv = with(dv_view, dv.wide.data(), DType::f64);
    p.dsinks = c.sinks ? dsinks64.data() : nullptr;
    run_serially(p, 1);
  }
  // Where the reference has NaN (gaps), E must have it still: nothing was written there.
  void check(const Array& x, double tolerance, const char* what) const {
    double error = 0.0, norm = 0.0;
    for (size_t i = 0; i < x.e.size(); ++i) {
      const double got = E::get(x.e[i]), want = x.wide[i];
      const bool gap = std::isnan(want);
      const bool good = gap ? std::isnan(got) : std::abs(got - want) <= 16 * tolerance * std::max(1.0, std::abs(want));
      if (!good) {  // an assertion takes longer than the kernel
        CAPTURE(what, i, got, want);
        REQUIRE(good);
      }
      if (!gap) error += (got - want) * (got - want), norm += want * want;
    }
    CAPTURE(what, std::sqrt(error / std::max(norm, 1e-30)));
    REQUIRE(error <= tolerance * tolerance * std::max(norm, 1e-30));
  }
  void check_forward(double tolerance = kTolerance) const {
    check(out, tolerance, "out");
    for (size_t i = 0; i < lse.size(); ++i) {
      CAPTURE(i, lse[i], lse64[i]);
      REQUIRE(std::isinf(lse[i]) == std::isinf(lse64[i]));
      if (!std::isinf(lse64[i])) REQUIRE(std::abs(lse[i] - lse64[i]) <= 2e-5 * std::max(1.0, std::abs(lse64[i])));
    }
  }
  // The rounding of results and probabilities.
  static constexpr double kTolerance = E::kDType == DType::f32 ? 2e-6 : E::kDType == DType::f16 ? 1e-3 : 6e-3;

  int64_t queries(int64_t b) const {
    return c.packed ? cu_q[static_cast<size_t>(b + 1)] - cu_q[static_cast<size_t>(b)] : c.s_q;
  }

 private:
  template <class View>
  static View with(View view, void* data, DType dtype) {
    view.data = data, view.dtype = dtype;
    return view;
  }
  TokenView contiguous(int64_t heads, int64_t d) const {
    if (c.packed) return {nullptr, 0, d, heads * d};
    return {nullptr, heads * c.s_q * d, c.s_q * d, d};
  }
  // Queries as projections leave them, [batch, tokens, heads, dim] in memory, with gaps.
  TokenView rows_view(int64_t heads, int64_t d) const {
    return {nullptr, c.packed ? 0 : c.s_q * heads * (d + c.gap), d + c.gap, heads * (d + c.gap)};
  }
  TokenView key_rows_view(int64_t heads, int64_t d, int64_t) const {
    if (c.packed) return {nullptr, 0, d, heads * d};
    return {nullptr, heads * c.s_k * d, c.s_k * d, d};
  }

  void lengths() {
    for (int64_t b = 0; b < c.batch; ++b) {
      // The second entry is the longest, the third one empty where lengths differ.
      const int64_t end_of = c.padded ? (b % 3 == 1 ? c.s_k : b % 3 == 2 ? 0 : c.s_k * 2 / 3) : c.s_k;
      // Of entries without keys some begin where they end, some beyond all keys.
      const int64_t start_of = b % 3 == 2 ? c.s_k + 5 : b % 4 == 3 ? end_of : std::min<int64_t>(b * 3, end_of);
      start.push_back(int32_t(c.padded ? start_of : 0));
      end.push_back(int32_t(end_of));
    }
    cu_q = {0}, cu_k = {0};
    for (int64_t b = 0; b < c.batch; ++b) {
      cu_q.push_back(cu_q.back() + int32_t(b % 3 == 0 ? c.s_q : b % 3 == 1 ? c.s_q / 2 : 0));
      cu_k.push_back(cu_k.back() + int32_t(b % 2 == 0 ? c.s_k : c.s_k / 3));
    }
  }

  void keys_and_values() {
    const HeadGroups& h = c.heads;
    const int64_t pages_per_entry = c.page_size > 0 ? (c.s_k + c.page_size - 1) / c.page_size : 1;
    const int64_t page_size = c.page_size > 0 ? c.page_size : c.s_k;
    const int64_t pages = c.packed ? 1 : c.batch * pages_per_entry + (c.page_size > 0 ? 2 : 0);
    const int64_t tokens = c.packed ? cu_k.back() : page_size;
    const auto view = [&](int64_t heads, int64_t per_group, int64_t d) {
      KvView x;
      const int64_t row = d + c.gap;
      if (c.cached) {  // [pages, G, tokens, heads of a group, dim]
        x.stride_head = row, x.stride_token = per_group * row, x.stride_group = tokens * x.stride_token;
      } else {  // [pages, tokens, heads, dim]
        x.stride_head = row, x.stride_group = per_group * row, x.stride_token = heads * row;
      }
      x.stride_page = tokens * heads * row;
      return x;
    };
    k_view = view(h.n_k, h.k_per_group(), c.d_k), v_view = view(h.n_v, h.v_per_group(), c.d_v);
    k.reset(pages * tokens * h.n_k * (c.d_k + c.gap)), v.reset(pages * tokens * h.n_v * (c.d_v + c.gap));
    paging.page_size = page_size;
    if (c.packed) paging.first_token = cu_k.data();
    if (c.page_size > 0) {
      std::vector<int32_t> ids(static_cast<size_t>(pages));
      std::iota(ids.begin(), ids.end(), 0);
      std::shuffle(ids.begin(), ids.end(), random);
      const int64_t stride = pages_per_entry + 1;
      table.assign(static_cast<size_t>(c.batch * stride), 2147480000);  // of blocks that no token needs
      for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t block = 0; start[static_cast<size_t>(b)] < end[static_cast<size_t>(b)] &&
                                block * page_size < end[static_cast<size_t>(b)];
             ++block)
          table[static_cast<size_t>(b * stride + block)] = ids[static_cast<size_t>(b * pages_per_entry + block)];
      paging.block_table = table.data(), paging.stride = stride;
    }
    std::normal_distribution<float> normal;
    for (int64_t b = 0; b < c.batch; ++b) {
      const size_t e = static_cast<size_t>(b);
      const int64_t length = c.packed ? cu_k[e + 1] - cu_k[e] : c.s_k;
      for (int64_t token = 0; token < length; ++token) {
        if (!c.packed && (token < start[e] || token >= end[e])) continue;  // stays NaN
        const KvSlot slot = kv_page(paging, b, token);
        for (int64_t head = 0; head < h.n_k; ++head)
          for (int64_t j = 0; j < c.d_k; ++j)
            k.set(kv_row(k_view, head / h.k_per_group(), head % h.k_per_group(), slot) + j, normal(random));
        for (int64_t head = 0; head < h.n_v; ++head)
          for (int64_t j = 0; j < c.d_v; ++j)
            v.set(kv_row(v_view, head / h.v_per_group(), head % h.v_per_group(), slot) + j, normal(random));
      }
    }
  }

  AttentionParams common() {
    AttentionParams p;
    p.heads = c.heads;
    p.batch = c.batch, p.s_q = c.s_q, p.s_k = c.s_k, p.d_k = c.d_k, p.d_v = c.d_v;
    if (!c.packed && (c.padded || c.cached)) p.kv_start = start.data(), p.kv_end = end.data();
    if (c.cached) p.length = end.data();
    if (c.packed) p.cu_seqlens_q = cu_q.data(), p.cu_seqlens_k = cu_k.data(), p.packed_queries = total_q;
    p.paging = paging;
    p.softmax_scale = softmax_scale;
    p.softcap = c.softcap;
    p.window_left = c.window_left, p.window_right = c.causal ? 0 : c.window_right;
    p.dropout.threshold = uint32_t(c.dropout_p * 65536.0 + 0.5);
    p.dropout.seed = 0x123456789abcdefu, p.dropout.offset = 7;
    return p;
  }
  AttentionParams wide_params() {
    AttentionParams p = common();
    p.q = with(q_view, q.wide.data(), DType::f64), p.out = with(out_view, out.wide.data(), DType::f64);
    p.k = with(k_view, k.wide.data(), DType::f64), p.v = with(v_view, v.wide.data(), DType::f64);
    p.lse = lse64.data();
    p.sinks = c.sinks ? sinks64.data() : nullptr;
    return p;
  }
};

}  // namespace diffqkv
