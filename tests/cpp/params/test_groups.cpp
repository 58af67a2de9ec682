#include "params/groups.h"
#include "support/catch.h"

using diffqkv::HeadGroups;

TEST_CASE("Sigma's heads form four groups") {
  constexpr HeadGroups heads{32, 4, 16};
  STATIC_REQUIRE(heads.groups() == 4);
  STATIC_REQUIRE(heads.q_per_group() == 8);
  STATIC_REQUIRE(heads.k_per_group() == 1);
  STATIC_REQUIRE(heads.v_per_group() == 4);
}

TEST_CASE("every q head's K and V head lie in its group, and follow eq. 16 and 17") {
  for (int64_t n_q = 1; n_q <= 24; ++n_q)
    for (int64_t n_k = 1; n_k <= n_q; ++n_k)
      for (int64_t n_v = 1; n_v <= n_q; ++n_v) {
        const HeadGroups heads{n_q, n_k, n_v};
        REQUIRE(heads.valid() == (n_q % n_k == 0 && n_q % n_v == 0));
        if (!heads.valid()) continue;
        for (int64_t i = 0; i < n_q; ++i) {
          CAPTURE(n_q, n_k, n_v, i);
          REQUIRE(heads.k_head(i) == i * n_k / n_q);
          REQUIRE(heads.v_head(i) == i * n_v / n_q);
          const int64_t group = i / heads.q_per_group();
          REQUIRE(heads.k_head(i) / heads.k_per_group() == group);
          REQUIRE(heads.v_head(i) / heads.v_per_group() == group);
        }
      }
}

TEST_CASE("counts that are no head map are not valid") {
  REQUIRE_FALSE(HeadGroups{32, 5, 16}.valid());
  REQUIRE_FALSE(HeadGroups{32, 4, 12}.valid());
  REQUIRE_FALSE(HeadGroups{0, 1, 1}.valid());
  REQUIRE_FALSE(HeadGroups{8, 0, 8}.valid());
}
