#include "ops/cache_slots.h"

#include "ops/torch_compat.h"
#include "params/layout.h"

namespace diffqkv {

void check_new_token_slots(const KvCacheUpdateParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t t = 0; t < p.s_new; ++t) {
      const int64_t position = new_token_position(p, b, t);
      DIFFQKV_CHECK(position >= -1 && position < p.capacity, "positions: got ", position, " at [", b, ", ", t,
                    "], want -1 (skip) to ", p.capacity - 1);
      DIFFQKV_CHECK(position < 0 || new_token_slot(p, b, t).page >= 0,
                    "block_table: got no block of the pool for position ", position, " of entry ", b, ", want 0 to ",
                    p.pages - 1);
    }
  }
}

}  // namespace diffqkv
