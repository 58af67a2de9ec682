#include "ops/options.h"

#include <algorithm>
#include <cmath>

#include "ops/views.h"

namespace diffqkv {
namespace {

// No two tokens are farther apart. Windows end here, so that positions and windows add up without an overflow.
constexpr int64_t kFarthest = int64_t{1} << 40;
// Times log2(e) it is still a number of float32.
constexpr double kMostScale = 1e38;

void check_window(const char* name, int64_t tokens) {
  DIFFQKV_CHECK(tokens >= -1, name, ": got ", tokens, ", want a number of tokens, or -1 (unlimited)");
}

}  // namespace

void check_softmax_scale(std::optional<double> softmax_scale) {
  DIFFQKV_CHECK(!softmax_scale || std::abs(*softmax_scale) <= kMostScale, "softmax_scale: got ",
                text_of(*softmax_scale), ", want a number from -1e38 to 1e38");
}

double softmax_scale_or_default(std::optional<double> softmax_scale, int64_t d_k) {
  return softmax_scale ? *softmax_scale : 1.0 / std::sqrt(double(d_k));
}

void LogitOptions::check_ranges() const {
  check_window("window_left", window_left);
  check_window("window_right", window_right);
  DIFFQKV_CHECK(softcap >= 0 && softcap <= kMostScale, "softcap: got ", text_of(softcap), ", want 0 (none) to 1e38");
}

void LogitOptions::check_sinks(TensorChecks& checks) const {
  if (sinks) checks.vector("sinks", *sinks, {ScalarType::Float, checks.dtype()}, "n_q");
}

void LogitOptions::fill(AttentionParams& p, bool causal) const {
  p.softcap = softcap;
  p.window_left = std::min(window_left, kFarthest);
  p.window_right = causal ? 0 : std::min(window_right, kFarthest);
}

std::optional<Tensor> LogitOptions::wide_sinks(ScalarType wide_dtype) const {
  return sinks ? std::optional(as_dtype(*sinks, wide_dtype)) : std::nullopt;
}

void AttentionOptions::check(TensorChecks& checks) const {
  check_softmax_scale(softmax_scale);
  logits.check_ranges();
  logits.check_sinks(checks);
  if (kv_start) checks.vector("kv_start", *kv_start, {ScalarType::Int}, "b");
  if (kv_end) checks.vector("kv_end", *kv_end, {ScalarType::Int}, "b");
  DIFFQKV_CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p: got ", text_of(dropout_p),
                ", want a probability in [0, 1)");
  DIFFQKV_CHECK(offset >= 0 && offset <= int64_t(UINT32_MAX), "offset: got ", offset,
                ", want an integer from 0 to 2**32 - 1");
}

void AttentionOptions::fill(AttentionParams& p) const {
  p.softmax_scale = softmax_scale_or_default(softmax_scale, p.d_k);
  logits.fill(p, causal);
  p.kv_start = data_of<const int32_t>(kv_start);
  p.kv_end = data_of<const int32_t>(kv_end);
  p.dropout.threshold = uint32_t(std::min(65535.0, std::floor(dropout_p * 65536.0 + 0.5)));
  p.dropout.seed = uint64_t(seed);
  p.dropout.offset = uint32_t(offset);
}

}  // namespace diffqkv
