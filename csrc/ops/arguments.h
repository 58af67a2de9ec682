// Checks of arguments and their translation into params, shared by the ops. Everything is checked here, before torch is
// asked for memory and before anything is written.
#pragma once
#include "ops/torch_compat.h"

namespace diffqkv {

std::string shape_of(const Tensor& t);
const char* name_of(ScalarType dtype);

// `want` names the dimensions, e.g. "[b, n_q, s_q, d_k]".
void check_rank(const char* name, const Tensor& t, int64_t rank, const char* want);
void check_floating(const char* name, const Tensor& t);        // fp32, fp16 or bf16
void check_differentiable(const char* name, const Tensor& t);  // or fp64
bool last_stride_is_one(const Tensor& t);
void check_same_dtype(const char* name, const Tensor& t, const char* other_name, const Tensor& other);
void check_same_device(const char* name, const Tensor& t, const char* other_name, const Tensor& other);
void check_unit_last_stride(const char* name, const Tensor& t);
void check_size(const char* name, const Tensor& t, int64_t dim, int64_t want, const char* meaning);
void check_head_dim(const char* name, int64_t d);
void check_heads(const HeadGroups& heads);
// int32 [batch], contiguous.
void check_per_entry(const char* name, const Tensor& t, int64_t batch, const Tensor& beside);
// [n_q], contiguous, float32 or q's dtype.
void check_sinks(const Tensor& sinks, const Tensor& q, int64_t n_q);
// Of lse and of the sinks in the kernels: float32, beside float64 data float64.
ScalarType wide_dtype(const Tensor& q);

// float32 [batch, n_v, d_v + 1], contiguous.
void check_v_stats(const Tensor& t, int64_t batch, int64_t n_v, int64_t d_v, const char* other_name,
                   const Tensor& other);

DType dtype_of(const Tensor& t);
// [batch, heads, tokens, dim] with a unit last stride.
TokenView token_view(const Tensor& t);
// The same tensor as K or V of an attention over whole sequences: one page per batch entry.
KvView kv_view_of_heads(const Tensor& t, int64_t heads_per_group);

// K and V caches with their block table, checked and measured.
struct CacheArguments {
  HeadGroups heads;  // n_q not set
  int64_t d_k = 0, d_v = 0;
  int64_t pages = 0, capacity = 0;  // capacity: tokens that an entry can address
  KvView k, v;
  Paging paging;
};
CacheArguments cache_arguments(const Tensor& k_cache, const Tensor& v_cache, const std::optional<Tensor>& block_table,
                               int64_t k_layout, int64_t batch);
// CPU only: every block that holds a token of [begin, end) of entry b must be a page of the pool.
void check_blocks(const CacheArguments& cache, int64_t b, int64_t begin, int64_t end);

}  // namespace diffqkv
