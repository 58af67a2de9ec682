// Every op of this library. Options that Python spells as strings are ints here.
#include "ops/torch_compat.h"

STABLE_TORCH_LIBRARY(diffqkv, m) {
  // The options of attention. Between window_left and window_right tokens around its own a query sees keys (-1: all);
  // dropout is a function of seed and offset. lse is float32, of float64 inputs float64.
#define DIFFQKV_OPTIONS                                                                                         \
  "bool causal=False, float? softmax_scale=None, int window_left=-1, int window_right=-1, float softcap=0.0, "  \
  "Tensor? sinks=None, Tensor? kv_start=None, Tensor? kv_end=None, float dropout_p=0.0, SymInt seed=0, SymInt " \
  "offset=0"
#define DIFFQKV_PACKED "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "

  // -> out [b, n_q, s_q, d_v], lse [b, n_q, s_q]
  m.def("flash_attention(Tensor q, Tensor k, Tensor v, " DIFFQKV_OPTIONS ") -> (Tensor, Tensor)");
  // -> out [total_q, n_q, d_v], lse [n_q, total_q]
  m.def("flash_attention_varlen(Tensor q, Tensor k, Tensor v, " DIFFQKV_PACKED DIFFQKV_OPTIONS ") -> (Tensor, Tensor)");
  // -> dq, dk, dv, dsinks (without sinks: of no elements)
  m.def(
      "flash_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
      "lse, " DIFFQKV_OPTIONS ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "flash_attention_varlen_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
      "lse, " DIFFQKV_PACKED DIFFQKV_OPTIONS ") -> (Tensor, Tensor, Tensor, Tensor)");
#undef DIFFQKV_OPTIONS
#undef DIFFQKV_PACKED

  // k_layout: 0 rows, 1 panels. -> out [b, n_q, s_q, d_v], lse [b, n_q, s_q]
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, *, Tensor? cache_start=None, "
      "Tensor? block_table=None, float? softmax_scale=None, int k_layout=0, int window_left=-1, int window_right=-1, "
      "float softcap=0.0, Tensor? sinks=None) -> (Tensor, Tensor)");

  m.def(
      "kv_cache_update(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor positions, *, "
      "Tensor? cos=None, Tensor? sin=None, Tensor? block_table=None, Tensor(c!)? v_stats=None, int k_layout=0) -> ()");

  // tail: 0 drop, 1 renorm, 2 mean. -> out, lse, kept_mass, indices, rows_used, error_bound; error_bound is +inf
  // without return_bound, and indices are [b, n_q, s_q, 0] without return_indices
  m.def(
      "selective_v_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, int top_k, *, int tail=0, "
      "int keep_first=0, int keep_last=0, Tensor? v_stats=None, Tensor? cache_start=None, Tensor? block_table=None, "
      "float? softmax_scale=None, int k_layout=0, float? max_error=None, bool return_bound=False, "
      "bool return_indices=False) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor dout, Tensor gate, Tensor up) -> (Tensor, Tensor)");

  // What the machine can do, for benchmarks. what: 0 fp32 multiply-adds, 1 bf16 dot products, 2 reads of data
  // -> FLOPs done or bytes read, 0 where the CPU has no such instruction
  m.def("probe(Tensor data, int what, int rounds) -> float");
}
