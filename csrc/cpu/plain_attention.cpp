#include "cpu/plain_attention.h"

#include <cmath>
#include <limits>

#include "cpu/kernels/dropout.h"
#include "params/key_range.h"
#include "params/layout.h"

namespace diffqkv {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0.0;
  for (int64_t x = 0; x < n; ++x) sum += a[x] * b[x];
  return sum;
}
void add(double factor, const double* a, int64_t n, double* sum) {
  for (int64_t x = 0; x < n; ++x) sum[x] += factor * a[x];
}

// One query row and what it sees.
struct Row {
  const AttentionParams& p;
  const Entry& entry;
  int64_t head, query;
  KeyRange keys = keys_of_query(p, entry, query);

  double* at(const TokenView& view) const { return static_cast<double*>(view.data) + row_of(view, entry, head, query); }
  const double* key(int64_t j) const {
    const KvSlot slot = kv_page(p.paging, entry.b, j);
    return head_at<const double>(p.k, slot.page, p.heads.k_head(head), p.heads.k_per_group()) +
           slot.token * p.k.stride_token;
  }
  const double* value(int64_t j) const {
    const KvSlot slot = kv_page(p.paging, entry.b, j);
    return head_at<const double>(p.v, slot.page, p.heads.v_head(head), p.heads.v_per_group()) +
           slot.token * p.v.stride_token;
  }
  double& lse() const { return static_cast<double*>(p.lse)[lse_of(p, entry, head, query)]; }
  double sink() const { return p.sinks ? static_cast<const double*>(p.sinks)[head] : -kInfinity; }

  // The capped and scaled score of a key; slope: what a change of the dot product does to it.
  double score(int64_t j, double* slope = nullptr) const {
    const double scaled = dot(at(p.q), key(j), p.d_k) * p.softmax_scale;
    if (slope) *slope = p.softmax_scale;
    if (p.softcap == 0.0) return scaled;
    const double t = std::tanh(scaled / p.softcap);
    if (slope) *slope *= 1.0 - t * t;
    return p.softcap * t;
  }
  // The factor of a key's probability: 0 for what dropout takes, else what makes up for it.
  double kept(int64_t j) const {
    if (p.dropout.threshold == 0) return 1.0;
    uint16_t bits[kDraws * kKeysPerDraw];
    draw_bits(p.dropout, entry.b * p.heads.n_q + head, query, j, j + 1, bits);
    return bits[j % kKeysPerDraw] < p.dropout.threshold ? 0.0 : p.dropout.keep_scale();
  }
};

}  // namespace

void plain_attention(const AttentionParams& p, int64_t item, double* scores) {
  const Entry entry = entry_of(p, item / p.heads.n_q);
  for (int64_t i = 0; i < entry.s_q; ++i) {
    const Row row{p, entry, item % p.heads.n_q, i};
    double most = row.sink(), sum = 0.0;
    for (int64_t j = row.keys.lo; j < row.keys.hi; ++j) {
      scores[j] = row.score(j);
      if (!(scores[j] <= most)) most = scores[j];
    }
    const double shift = most == -kInfinity ? 0.0 : most;
    for (int64_t j = row.keys.lo; j < row.keys.hi; ++j) sum += std::exp(scores[j] - shift);
    sum += std::exp(row.sink() - shift);
    row.lse() = shift + std::log(sum);
    double* out = row.at(p.out);
    for (int64_t x = 0; x < p.d_v; ++x) out[x] = 0.0;
    if (sum == 0.0) continue;
    for (int64_t j = row.keys.lo; j < row.keys.hi; ++j)
      add(std::exp(scores[j] - shift) / sum * row.kept(j), row.value(j), p.d_v, out);
  }
}

void plain_attention_backward(const FlashAttentionBackwardParams& bp, int64_t item, double* dsinks) {
  const AttentionParams& p = bp.forward;
  const HeadGroups& heads = p.heads;
  const int64_t group = item % heads.groups();
  const Entry entry = entry_of(p, item / heads.groups());
  const auto gradient = [&](const TokenView& view, int64_t head, int64_t j) {
    return static_cast<double*>(view.data) + key_row_of(view, entry, head, j);
  };
  for (int64_t j = 0; j < entry.s_k; ++j) {
    for (int64_t k = group * heads.k_per_group(); k < (group + 1) * heads.k_per_group(); ++k)
      for (int64_t x = 0; x < p.d_k; ++x) gradient(bp.dk, k, j)[x] = 0.0;
    for (int64_t v = group * heads.v_per_group(); v < (group + 1) * heads.v_per_group(); ++v)
      for (int64_t x = 0; x < p.d_v; ++x) gradient(bp.dv, v, j)[x] = 0.0;
  }
  for (int64_t h = group * heads.q_per_group(); h < (group + 1) * heads.q_per_group(); ++h) {
    double& dsink = dsinks[entry.b * heads.n_q + h] = 0.0;
    for (int64_t i = 0; i < entry.s_q; ++i) {
      const Row row{p, entry, h, i};
      const double *dout = row.at(bp.dout), lse = row.lse();
      double* dq = row.at(bp.dq);
      for (int64_t x = 0; x < p.d_k; ++x) dq[x] = 0.0;
      if (lse == -kInfinity) continue;
      const double dlse = bp.dlse ? static_cast<const double*>(bp.dlse)[lse_of(p, entry, h, i)] : 0.0;
      const double delta = dot(dout, row.at(p.out), p.d_v) - dlse;
      dsink -= std::exp(row.sink() - lse) * delta;
      for (int64_t j = row.keys.lo; j < row.keys.hi; ++j) {
        double slope;
        const double probability = std::exp(row.score(j, &slope) - lse), kept = row.kept(j);
        const double ds = probability * (dot(dout, row.value(j), p.d_v) * kept - delta) * slope;
        add(ds, row.key(j), p.d_k, dq);
        add(ds, row.at(p.q), p.d_k, gradient(bp.dk, heads.k_head(h), j));
        add(probability * kept, dout, p.d_v, gradient(bp.dv, heads.v_head(h), j));
      }
    }
  }
}

}  // namespace diffqkv
