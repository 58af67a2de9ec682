// The options that the attention ops share.
#pragma once
#include "ops/checks.h"
#include "ops/registration.h"

namespace diffqkv {

// They say which keys a query sees, and what becomes of their scores.
struct LogitOptions : ArgumentGroup {
  int64_t window_left = next<int64_t>();
  int64_t window_right = next<int64_t>();
  double softcap = next<double>();
  std::optional<Tensor> sinks = next<std::optional<Tensor>>();

  void check_ranges() const;
  // checks: of a call whose n_q is known.
  void check_sinks(TensorChecks& checks) const;
  // Fills all but the sinks, which may need memory.
  void fill(AttentionParams& p, bool causal) const;
  // The sinks in the dtype that the kernels take.
  std::optional<Tensor> wide_sinks(ScalarType wide_dtype) const;
};

// The options of the flash_attention ops.
struct AttentionOptions : ArgumentGroup {
  bool causal = next<bool>();
  std::optional<double> softmax_scale = next<std::optional<double>>();
  LogitOptions logits = next<LogitOptions>();
  std::optional<Tensor> kv_start = next<std::optional<Tensor>>();
  std::optional<Tensor> kv_end = next<std::optional<Tensor>>();
  double dropout_p = next<double>();
  int64_t seed = next<int64_t>();
  int64_t offset = next<int64_t>();

  // checks: of a call whose b and n_q are known.
  void check(TensorChecks& checks) const;
  // Fills all but the sinks.
  void fill(AttentionParams& p) const;
};

void check_softmax_scale(std::optional<double> softmax_scale);
// The scale of a call, d_k^-0.5 by default.
double softmax_scale_or_default(std::optional<double> softmax_scale, int64_t d_k);

}  // namespace diffqkv
