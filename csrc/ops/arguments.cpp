#include "ops/arguments.h"

namespace diffqkv {

std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

void check_rank(const char* name, const Tensor& t, int64_t rank, const char* want) {
  DIFFQKV_CHECK(t.dim() == rank, name, ": got shape ", shape_of(t), ", want ", want);
}
namespace {
bool is_floating(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}
}  // namespace
void check_floating(const char* name, const Tensor& t) {
  DIFFQKV_CHECK(is_floating(t), name, ": got dtype ", name_of(t.scalar_type()), ", want float32, float16 or bfloat16");
}
void check_differentiable(const char* name, const Tensor& t) {
  DIFFQKV_CHECK(t.scalar_type() == ScalarType::Double || is_floating(t), name, ": got dtype ", name_of(t.scalar_type()),
                ", want float32, float16, bfloat16 or float64");
}
void check_same_dtype(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  DIFFQKV_CHECK(t.scalar_type() == other.scalar_type(), name, ": got dtype ", name_of(t.scalar_type()), ", want ",
                name_of(other.scalar_type()), ", that of ", other_name);
}
void check_same_device(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  const auto device = t.device(), wanted = other.device();
  DIFFQKV_CHECK(device.type() == wanted.type() && (t.is_cpu() || t.get_device_index() == other.get_device_index()),
                name, ": got another device, want that of ", other_name);
}
bool last_stride_is_one(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1 || t.numel() == 0;  // numpy's empty arrays have none
}
void check_unit_last_stride(const char* name, const Tensor& t) {
  DIFFQKV_CHECK(last_stride_is_one(t), name, ": got stride ", t.stride(t.dim() - 1), " in the last dimension, want 1");
}
void check_size(const char* name, const Tensor& t, int64_t dim, int64_t want, const char* meaning) {
  DIFFQKV_CHECK(t.size(dim) == want, name, ": got ", t.size(dim), " in dimension ", dim, " of ", shape_of(t), ", want ",
                want, " (", meaning, ")");
}
void check_head_dim(const char* name, int64_t d) {
  DIFFQKV_CHECK(d >= 8 && d <= kMaxHeadDim && d % 8 == 0, name, ": got head dimension ", d,
                ", want a multiple of 8 from 8 to ", kMaxHeadDim);
}
void check_heads(const HeadGroups& heads) {
  DIFFQKV_CHECK(heads.n_k > 0 && heads.n_q > 0 && heads.n_q % heads.n_k == 0, "k: got n_k = ", heads.n_k,
                " heads, want a divisor of n_q = ", heads.n_q);
  DIFFQKV_CHECK(heads.n_v > 0 && heads.n_q % heads.n_v == 0, "v: got n_v = ", heads.n_v,
                " heads, want a divisor of n_q = ", heads.n_q);
}
void check_per_entry(const char* name, const Tensor& t, int64_t batch, const Tensor& beside) {
  DIFFQKV_CHECK(t.scalar_type() == ScalarType::Int, name, ": got dtype ", name_of(t.scalar_type()), ", want int32");
  DIFFQKV_CHECK(t.dim() == 1 && t.size(0) == batch, name, ": got shape ", shape_of(t), ", want [", batch,
                "], one per batch entry");
  DIFFQKV_CHECK(t.is_contiguous(), name, ": got stride ", t.stride(0), ", want 1");
  check_same_device(name, t, "q", beside);
}

void check_sinks(const Tensor& sinks, const Tensor& q, int64_t n_q) {
  DIFFQKV_CHECK(sinks.scalar_type() == ScalarType::Float || sinks.scalar_type() == q.scalar_type(), "sinks: got dtype ",
                name_of(sinks.scalar_type()), ", want float32 or ", name_of(q.scalar_type()), ", that of q");
  DIFFQKV_CHECK(sinks.dim() == 1 && sinks.size(0) == n_q, "sinks: got shape ", shape_of(sinks), ", want [n_q] = [", n_q,
                "]");
  DIFFQKV_CHECK(sinks.is_contiguous(), "sinks: got stride ", sinks.stride(0), ", want 1");
  check_same_device("sinks", sinks, "q", q);
}
ScalarType wide_dtype(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_v_stats(const Tensor& t, int64_t batch, int64_t n_v, int64_t d_v, const char* other_name,
                   const Tensor& other) {
  DIFFQKV_CHECK(t.scalar_type() == ScalarType::Float, "v_stats: got dtype ", name_of(t.scalar_type()),
                ", want float32");
  check_rank("v_stats", t, 3, "[b, n_v, d_v + 1]");
  check_size("v_stats", t, 0, batch, "batch entries");
  check_size("v_stats", t, 1, n_v, "V heads of v_cache");
  check_size("v_stats", t, 2, d_v + 1, "d_v + 1");
  DIFFQKV_CHECK(t.is_contiguous(), "v_stats: got strides with gaps, want a contiguous tensor");
  check_same_device("v_stats", t, other_name, other);
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Double: return DType::f64;
    default: return DType::f32;
  }
}
TokenView token_view(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), dtype_of(t)}; }
KvView kv_view_of_heads(const Tensor& t, int64_t heads_per_group) {
  KvView view;
  view.data = t.data_ptr();
  view.stride_page = t.stride(0);
  view.stride_group = t.stride(1) * heads_per_group;
  view.stride_head = t.stride(1);
  view.stride_token = t.stride(2);
  view.dtype = dtype_of(t);
  return view;
}

namespace {

// k_cache in panels: [pages, n_k, panels, d_k, 32], bf16 [pages, n_k, panels, d_k / 2, 32, 2].
void read_panels(const Tensor& k_cache, CacheArguments& cache) {
  const bool pairs = k_cache.scalar_type() == ScalarType::BFloat16;
  check_rank("k_cache", k_cache, pairs ? 6 : 5,
             pairs ? "[b or blocks, n_k, panels, d_k / 2, 32, 2] (bf16 panels)"
                   : "[b or blocks, n_k, panels, d_k, 32] (panels)");
  check_size("k_cache", k_cache, 4, kPanelTokens, "tokens of a panel");
  if (pairs) check_size("k_cache", k_cache, 5, 2, "dimensions of a pair");
  cache.heads.n_k = k_cache.size(1);
  cache.d_k = k_cache.size(3) * (pairs ? 2 : 1);
  const bool packed = pairs ? k_cache.stride(5) == 1 && k_cache.stride(4) == 2 && k_cache.stride(3) == 2 * kPanelTokens
                            : k_cache.stride(4) == 1 && k_cache.stride(3) == kPanelTokens;
  DIFFQKV_CHECK(packed || k_cache.numel() == 0, "k_cache: got strides that scatter a panel, want contiguous panels");
  cache.k.stride_page = k_cache.stride(0);
  cache.k.stride_head = k_cache.stride(1);
  cache.k.stride_panel = k_cache.stride(2);
  cache.k.layout = KLayout::panels;
}

void read_rows(const char* name, const Tensor& t, KvView& view) {
  check_rank(name, t, 5, "[b or blocks, G, tokens, heads / G, dim]");
  check_unit_last_stride(name, t);
  view.stride_page = t.stride(0);
  view.stride_group = t.stride(1);
  view.stride_token = t.stride(2);
  view.stride_head = t.stride(3);
}

}  // namespace

CacheArguments cache_arguments(const Tensor& k_cache, const Tensor& v_cache, const std::optional<Tensor>& block_table,
                               int64_t k_layout, int64_t batch) {
  CacheArguments cache;
  DIFFQKV_CHECK(k_layout == 0 || k_layout == 1, "k_layout: got ", k_layout, ", want 0 (rows) or 1 (panels)");
  check_floating("k_cache", k_cache);
  check_same_dtype("v_cache", v_cache, "k_cache", k_cache);
  check_same_device("v_cache", v_cache, "k_cache", k_cache);
  read_rows("v_cache", v_cache, cache.v);
  const int64_t groups = v_cache.size(1), tokens = v_cache.size(2);
  cache.heads.n_v = groups * v_cache.size(3);
  cache.d_v = v_cache.size(4);
  if (k_layout == 1) {
    read_panels(k_cache, cache);
    const int64_t panels = (tokens + kPanelTokens - 1) / kPanelTokens;
    DIFFQKV_CHECK(k_cache.size(2) == panels, "k_cache: got ", k_cache.size(2), " panels of 32 tokens, want ", panels,
                  " for the ", tokens, " tokens of v_cache");
  } else {
    read_rows("k_cache", k_cache, cache.k);
    check_size("k_cache", k_cache, 1, groups, "groups of v_cache");
    check_size("k_cache", k_cache, 2, tokens, "tokens of v_cache");
    cache.heads.n_k = groups * k_cache.size(3);
    cache.d_k = k_cache.size(4);
  }
  DIFFQKV_CHECK(cache.heads.n_k > 0 && cache.heads.n_v > 0, "v_cache: got ", cache.heads.n_v, " V heads and ",
                cache.heads.n_k, " K heads, want at least one of each");
  cache.heads.n_q = cache.heads.n_k * cache.heads.n_v;
  DIFFQKV_CHECK(groups == cache.heads.groups(), "v_cache: got ", groups, " groups, want gcd(n_k, n_v) = gcd(",
                cache.heads.n_k, ", ", cache.heads.n_v, ") = ", cache.heads.groups());
  if (k_layout == 1) cache.k.stride_group = cache.k.stride_head * cache.heads.k_per_group();
  check_head_dim("k_cache", cache.d_k);
  check_head_dim("v_cache", cache.d_v);
  check_size("k_cache", k_cache, 0, v_cache.size(0), "pages or batch entries of v_cache");
  cache.pages = v_cache.size(0);
  cache.paging.page_size = tokens;
  cache.capacity = tokens;
  if (block_table.has_value()) {
    const Tensor& table = *block_table;
    DIFFQKV_CHECK(table.scalar_type() == ScalarType::Int, "block_table: got dtype ", name_of(table.scalar_type()),
                  ", want int32");
    check_rank("block_table", table, 2, "[b, max_blocks]");
    check_size("block_table", table, 0, batch, "batch entries");
    check_unit_last_stride("block_table", table);
    check_same_device("block_table", table, "k_cache", k_cache);
    DIFFQKV_CHECK(tokens > 0, "k_cache: got blocks of 0 tokens, want at least 1");
    DIFFQKV_CHECK(k_layout == 0 || tokens % kPanelTokens == 0, "k_cache: got blocks of ", tokens,
                  " tokens, want a multiple of 32 for panels");
    cache.paging.block_table = static_cast<const int32_t*>(table.data_ptr());
    cache.paging.stride = table.stride(0);
    cache.capacity = tokens * table.size(1);
  } else {
    check_size("k_cache", k_cache, 0, batch, "batch entries");
  }
  cache.k.data = k_cache.data_ptr();
  cache.v.data = v_cache.data_ptr();
  cache.k.dtype = cache.v.dtype = dtype_of(k_cache);
  return cache;
}

void check_blocks(const CacheArguments& cache, int64_t b, int64_t begin, int64_t end) {
  if (cache.paging.block_table == nullptr || begin >= end) return;
  for (int64_t i = begin / cache.paging.page_size; i <= (end - 1) / cache.paging.page_size; ++i) {
    const int64_t block = cache.paging.block_table[b * cache.paging.stride + i];
    DIFFQKV_CHECK(block >= 0 && block < cache.pages, "block_table: got block ", block, " at [", b, ", ", i,
                  "], want 0 to ", cache.pages - 1, " where the sequence has tokens");
  }
}

}  // namespace diffqkv
