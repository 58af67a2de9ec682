#pragma once
#include "params/params.h"

namespace diffqkv {

// Throws unless every new token has -1 or a position in a mapped page. Positions and block table must be host memory.
void check_new_token_slots(const KvCacheUpdateParams& p);

}  // namespace diffqkv
