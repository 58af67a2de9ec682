// Views of contiguous fp32 arrays [batch, heads, tokens, dim].
#pragma once
#include <vector>

#include "params/params.h"

inline diffqkv::TokenView dense_rows(std::vector<float>& x, int64_t heads, int64_t tokens, int64_t dim) {
  return {x.data(), heads * tokens * dim, tokens * dim, dim};
}
inline diffqkv::KvView dense_keys(std::vector<float>& x, int64_t heads, int64_t heads_per_group, int64_t tokens,
                                  int64_t dim) {
  return {.data = x.data(),
          .stride_page = heads * tokens * dim,
          .stride_group = heads_per_group * tokens * dim,
          .stride_head = tokens * dim,
          .stride_token = dim};
}
