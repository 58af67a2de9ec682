// The tensors of a call once more, so far apart that offsets pass 2^31 elements. Their memory is reserved; only the
// rows are ever touched.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "attention_problem.h"

namespace diffqkv {

enum class Apart { rows, blocks };  // every row by itself, or heads and batch entries (pages, groups) as they are

class Far {
 public:
  explicit Far(Apart apart) : apart_(apart) {}
  Far(const Far&) = delete;
  ~Far() {
    for (const auto& [memory, bytes] : reserved_) munmap(memory, bytes);
  }

  void move(TokenView& x, int64_t batch, int64_t heads, int64_t tokens, int64_t d) {
    const bool packed = x.stride_batch == 0;
    move(x.data, x.dtype, d,
         {{packed ? 1 : batch, x.stride_batch, true},
          {heads, x.stride_head, true},
          {tokens, x.stride_token, apart_ == Apart::rows}});
    if (packed) x.stride_batch = 0;
  }
  void move(KvView& x, int64_t pages, int64_t groups, int64_t heads, int64_t tokens, int64_t d) {
    const bool rows = apart_ == Apart::rows;
    move(x.data, x.dtype, d,
         {{pages, x.stride_page, true},
          {groups, x.stride_group, true},
          {heads, x.stride_head, rows},
          {tokens, x.stride_token, rows}});
  }
  // Moves all that the kernels take with strides.
  template <class E>
  void move(AttentionParams& p, const AttentionProblem<E>& problem) {
    const HeadGroups& h = p.heads;
    const int64_t queries = p.cu_seqlens_q ? p.packed_queries : p.s_q;
    const int64_t keys = p.cu_seqlens_k ? p.cu_seqlens_k[p.batch] : p.paging.page_size;
    const int64_t pages = int64_t(problem.k.e.size()) / (keys * h.n_k * (p.d_k + problem.c.gap));
    move(p.q, p.batch, h.n_q, queries, p.d_k), move(p.out, p.batch, h.n_q, queries, p.d_v);
    move(p.k, pages, h.groups(), h.k_per_group(), keys, p.d_k);
    move(p.v, pages, h.groups(), h.v_per_group(), keys, p.d_v);
  }
  // Copies everything to where it came from.
  void bring_back() const {
    for (const auto& [near, far, bytes] : rows_) std::memcpy(near, far, bytes);
  }

 private:
  struct Dim {
    int64_t size;
    int64_t& stride;
    bool apart;
  };
  struct Row {
    char *near, *far;
    size_t bytes;
  };

  // Dimensions from the outermost to the innermost.
  void move(void*& data, DType dtype, int64_t row, std::vector<Dim> dims) {
    const int64_t bytes = dtype_size(dtype);
    // Rows: 16 of them pass 2^31 elements. Blocks: the second one does, beyond all that lies in a block.
    int64_t distance = apart_ == Apart::rows ? (int64_t{1} << 27) + 64 : (int64_t{1} << 31) + (int64_t{1} << 20);
    std::vector<int64_t> near;
    for (const Dim& dim : dims) near.push_back(dim.stride);
    for (size_t i = dims.size(); i-- > 0;) {
      if (!dims[i].apart) continue;
      dims[i].stride = distance;
      distance *= std::max<int64_t>(dims[i].size, 1);
    }
    const size_t total = size_t(distance * bytes);
    void* memory = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    INFO("reserves " << (total >> 30) << " GiB of addresses");
    REQUIRE(memory != MAP_FAILED);
    reserved_.emplace_back(memory, total);
    char* const from = static_cast<char*>(data);
    data = memory;
    std::vector<int64_t> index(dims.size(), 0);
    const auto next = [&] {
      for (size_t i = dims.size(); i-- > 0; index[i] = 0)
        if (++index[i] < dims[i].size) return true;
      return false;
    };
    do {
      int64_t near_offset = 0, far_offset = 0;
      for (size_t i = 0; i < dims.size(); ++i)
        near_offset += index[i] * near[i], far_offset += index[i] * dims[i].stride;
      rows_.push_back(
          {from + near_offset * bytes, static_cast<char*>(memory) + far_offset * bytes, size_t(row * bytes)});
      std::memcpy(rows_.back().far, rows_.back().near, rows_.back().bytes);
    } while (next());
  }

  Apart apart_;
  std::vector<std::pair<void*, size_t>> reserved_;
  std::vector<Row> rows_;
};

}  // namespace diffqkv
