// Where tokens and dimensions lie: every place is used, and used once.
#include <cstdint>
#include <limits>
#include <vector>

#include "params/layout.h"
#include "support/catch.h"
#include "support/kv_element.h"

using namespace diffqkv;

namespace {

// Counts how often each offset occurs; REQUIREs that all lie in range.
struct Tally {
  std::vector<int> count;
  explicit Tally(int64_t size) : count(static_cast<size_t>(size), 0) {}
  void add(int64_t offset) {
    REQUIRE((offset >= 0 && offset < static_cast<int64_t>(count.size())));
    ++count[static_cast<size_t>(offset)];
  }
  bool all_once() const {
    for (const int n : count)
      if (n != 1) return false;
    return true;
  }
};

// Element (token, dim) of one head's panels when they lie back to back.
int64_t panel_offset(int64_t token, int64_t dim, int64_t d, DType dtype) {
  KvView view;
  view.dtype = dtype;
  view.layout = KLayout::panels;
  view.stride_panel = d * kPanelTokens;
  return kv_element(view, 0, 0, {0, token}, dim);
}

}  // namespace

TEST_CASE("a head's panels are a bijection of (token, dim)") {
  const DType dtype = GENERATE(DType::f32, DType::f16, DType::bf16);
  const int64_t d = GENERATE(8, 40, 64, 256), panels = GENERATE(1, 3);
  Tally tally(panels * kPanelTokens * d);
  for (int64_t t = 0; t < panels * kPanelTokens; ++t)
    for (int64_t c = 0; c < d; ++c) tally.add(panel_offset(t, c, d, dtype));
  CHECK(tally.all_once());
}

TEST_CASE("panel offsets are those of the documented shapes") {
  const int64_t d = 24;
  for (int64_t t = 0; t < 3 * kPanelTokens; ++t) {
    for (int64_t c = 0; c < d; ++c) {
      const int64_t plain = ((t / 32) * d + c) * 32 + t % 32;                          // [s / 32, d, 32]
      const int64_t words = ((t / 32) * (d / 2) + c / 2) * 64 + (t % 32) * 2 + c % 2;  // [s / 32, d / 2, 32, 2]
      REQUIRE(panel_offset(t, c, d, DType::f32) == plain);
      REQUIRE(panel_offset(t, c, d, DType::f16) == plain);
      REQUIRE(panel_offset(t, c, d, DType::bf16) == words);
    }
  }
  // A bf16 word holds dimensions c and c + 1 of one token, and neighbouring tokens are neighbouring words.
  CHECK(panel_element(5, 7, DType::bf16) == panel_element(5, 6, DType::bf16) + 1);
  CHECK(panel_element(6, 6, DType::bf16) == panel_element(5, 6, DType::bf16) + 2);
}

TEST_CASE("panel offsets beyond 2^31 elements") {
  const int64_t token = int64_t{1} << 25, d = 256;
  CHECK(panel_offset(token, 0, d, DType::f32) == token * d);
  CHECK(panel_offset(token, 3, d, DType::bf16) == token * d + 65);
}

TEST_CASE("a contiguous cache has one page per batch entry") {
  Paging paging;
  paging.page_size = 100;
  for (int64_t entry = 0; entry < 3; ++entry) {
    for (const int64_t token : {0, 1, 99}) {
      const KvSlot slot = kv_page(paging, entry, token);
      CHECK(slot.page == entry);
      CHECK(slot.token == token);
    }
  }
}

TEST_CASE("a paged cache finds its blocks through the table") {
  constexpr int64_t kBatch = 2, kBlocks = 3, kStride = 5, kPageSize = 32, kPages = 7;
  const int32_t unused = std::numeric_limits<int32_t>::max();
  const std::vector<int32_t> table = {4, 0,  6, unused, unused,  //
                                      2, -1, 7, unused, unused};
  Paging paging;
  paging.block_table = table.data();
  paging.stride = kStride;
  paging.page_size = kPageSize;

  Tally tally(kPages * kPageSize);
  for (int64_t token = 0; token < kBlocks * kPageSize; ++token) {
    const KvSlot slot = kv_page(paging, 0, token);
    REQUIRE(slot.page == table[static_cast<size_t>(token / kPageSize)]);
    tally.add(slot.page * kPageSize + slot.token);
  }
  for (const int n : tally.count) REQUIRE(n <= 1);

  const int64_t capacity = kBlocks * kPageSize;
  const auto page = [&](int64_t entry, int64_t position) {
    return kv_page_checked(paging, kPages, capacity, entry, position).page;
  };
  CHECK(page(kBatch - 1, 31) == 2);
  CHECK(page(kBatch - 1, 32) == -1);  // unmapped
  CHECK(page(kBatch - 1, 64) == -1);  // block 7 of 7
  CHECK(page(0, 95) == 6);
  CHECK(page(0, 96) == -1);  // beyond the capacity: the table is not read
  CHECK(page(0, -1) == -1);
  CHECK(page(0, std::numeric_limits<int64_t>::max()) == -1);
  CHECK(page(0, std::numeric_limits<int64_t>::min()) == -1);
}

TEST_CASE("a position outside a contiguous cache has no slot") {
  Paging paging;
  paging.page_size = 64;
  CHECK(kv_page_checked(paging, 2, 64, 1, 63).page == 1);
  CHECK(kv_page_checked(paging, 2, 64, 1, 64).page == -1);
  CHECK(kv_page_checked(paging, 2, 64, 1, -1).page == -1);
  CHECK(kv_page_checked(paging, 2, 64, 2, 0).page == -1);
}

TEST_CASE("cache elements are a bijection of (page, group, head, token, dim)") {
  const DType dtype = GENERATE(DType::f32, DType::bf16);
  const KLayout layout = GENERATE(KLayout::rows, KLayout::panels);
  constexpr int64_t kPages = 2, kGroups = 3, kHeads = 2, kTokens = 64, kDim = 16;
  KvView view;
  view.dtype = dtype;
  view.layout = layout;
  if (layout == KLayout::rows) {  // [pages, G, page_size, heads, dim]
    view.stride_head = kDim;
    view.stride_token = kHeads * kDim;
    view.stride_group = kTokens * view.stride_token;
  } else {  // [pages, n_k, panels, ...]
    view.stride_panel = kPanelTokens * kDim;
    view.stride_head = kTokens * kDim;
    view.stride_group = kHeads * view.stride_head;
  }
  view.stride_page = kGroups * view.stride_group;
  Tally tally(kPages * kGroups * kHeads * kTokens * kDim);
  for (int64_t page = 0; page < kPages; ++page)
    for (int64_t group = 0; group < kGroups; ++group)
      for (int64_t head = 0; head < kHeads; ++head)
        for (int64_t token = 0; token < kTokens; ++token)
          for (int64_t dim = 0; dim < kDim; ++dim) tally.add(kv_element(view, group, head, {page, token}, dim));
  CHECK(tally.all_once());
}
