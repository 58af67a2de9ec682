#include "plan/cost.h"

#include <algorithm>

namespace diffqkv {
namespace {

// The sum of clamp(first + i, 0, most) over i in [0, count).
double clamped_ramp(double first, double count, double most) {
  const double rises = std::clamp(-first, 0.0, count), flat = std::clamp(most - first, rises, count);
  return (flat - rises) * (first + 0.5 * (rises + flat - 1.0)) + (count - flat) * most;
}

// The (query, key) pairs of a head that the window lets through.
double visible_pairs(const AttentionParams& p, int64_t max_keys) {
  const double queries = double(p.s_q), keys = double(max_keys), position = keys - queries;
  const double ends =
      p.window_right < 0 ? queries * keys : clamped_ramp(position + double(p.window_right) + 1.0, queries, keys);
  const double begins = p.window_left < 0 ? 0.0 : clamped_ramp(position - double(p.window_left), queries, keys);
  return std::max(0.0, ends - begins);
}

}  // namespace

AttentionCost attention_cost(const AttentionParams& p, int64_t max_keys) {
  const HeadGroups& heads = p.heads;
  return {
      2.0 * p.batch * heads.n_q * visible_pairs(p, max_keys) * double(p.d_k + p.d_v),
      double(dtype_size(p.q.dtype)) * p.batch *
          (double(max_keys) * (heads.n_k * p.d_k + heads.n_v * p.d_v) + double(p.s_q) * heads.n_q * (p.d_k + p.d_v))};
}

double attention_backward_flops(const AttentionParams& p) {
  return 2.0 * p.batch * p.heads.n_q * visible_pairs(p, p.s_k) * double(3 * p.d_k + 2 * p.d_v);
}

}  // namespace diffqkv
