// The ops' C++ functions, one per schema and device; what each takes is said in schema.cpp.
#pragma once
#include "ops/arguments.h"
#include "ops/attention_options.h"

namespace diffqkv {

std::tuple<Tensor, Tensor> flash_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                               DIFFQKV_OPTION_PARAMETERS);
std::tuple<Tensor, Tensor> flash_attention_varlen_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                      DIFFQKV_PACKED_PARAMETERS, DIFFQKV_OPTION_PARAMETERS);
std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_backward_cpu(const Tensor& dout,
                                                                        const std::optional<Tensor>& dlse,
                                                                        const Tensor& q, const Tensor& k,
                                                                        const Tensor& v, const Tensor& out,
                                                                        const Tensor& lse, DIFFQKV_OPTION_PARAMETERS);
std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_varlen_backward_cpu(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, DIFFQKV_PACKED_PARAMETERS, DIFFQKV_OPTION_PARAMETERS);

std::tuple<Tensor, Tensor> decode_attention_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                                const Tensor& cache_seqlens, const std::optional<Tensor>& cache_start,
                                                const std::optional<Tensor>& block_table,
                                                std::optional<double> softmax_scale, int64_t k_layout,
                                                int64_t window_left, int64_t window_right, double softcap,
                                                const std::optional<Tensor>& sinks);

void kv_cache_update_cpu(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v, const Tensor& positions,
                         const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                         const std::optional<Tensor>& block_table, std::optional<Tensor> v_stats, int64_t k_layout);

SelectiveResults selective_v_attention_cpu(DIFFQKV_SELECTIVE_PARAMETERS);

Tensor swiglu_cpu(const Tensor& gate, const Tensor& up);
std::tuple<Tensor, Tensor> swiglu_backward_cpu(const Tensor& dout, const Tensor& gate, const Tensor& up);

double probe_cpu(const Tensor& data, int64_t what, int64_t rounds);

// Plans and runs an attention whose params are complete. max_keys: the longest sequence of the call.
void run_attention(const AttentionParams& params, int64_t max_keys, const Tensor& like);

// Checks of kv_cache_update that need no look at device data, and its params.
KvCacheUpdateParams kv_cache_update_params(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                                           const Tensor& v, const Tensor& positions, const std::optional<Tensor>& cos,
                                           const std::optional<Tensor>& sin, const std::optional<Tensor>& block_table,
                                           const std::optional<Tensor>& v_stats, int64_t k_layout);

// Checked operands of swiglu, contiguous, and memory for its results.
struct SwigluForward {
  Tensor gate, up, out;
  SwigluParams p;
};
SwigluForward swiglu_forward(const Tensor& gate, const Tensor& up);
struct SwigluBackward {
  Tensor dout, gate, up, dgate, dup;
  SwigluParams p;
};
SwigluBackward swiglu_backward(const Tensor& dout, const Tensor& gate, const Tensor& up);

// What decode_attention and selective_v_attention share on every device: shapes checked, contents not looked at.
struct CachedAttention {
  AttentionParams params;  // out and lse by allocate()
  CacheArguments cache;
  Tensor out, lse;
  void allocate(const Tensor& q);
};
CachedAttention cached_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                 const Tensor& cache_seqlens, const std::optional<Tensor>& cache_start,
                                 const std::optional<Tensor>& block_table, std::optional<double> softmax_scale,
                                 int64_t k_layout);
// Checks lengths, starts and the blocks in use, given in host memory; returns the longest length.
int64_t check_cached_contents(const CachedAttention& call, const Tensor& cache_seqlens,
                              const std::optional<Tensor>& cache_start, const std::optional<Tensor>& block_table);

// A checked call of selective_v_attention; its params and results are complete after allocate().
struct SelectiveCall {
  CachedAttention cached;
  SelectiveVAttentionParams params;
  Tensor kept_mass, rows_used, error_bound, indices;
  void allocate(const Tensor& q);
  SelectiveResults results() const { return {cached.out, cached.lse, kept_mass, indices, rows_used, error_bound}; }
};
SelectiveCall selective_call(DIFFQKV_SELECTIVE_PARAMETERS);

}  // namespace diffqkv
