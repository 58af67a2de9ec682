#include <stdexcept>

#include "cpu/isa.h"
#include "support/catch.h"

using namespace diffqkv;

TEST_CASE("an unknown or unsupported CPU level is refused by name") {
  REQUIRE_THROWS_AS(choose_cpu_isa("sse9"), std::runtime_error);
  REQUIRE(choose_cpu_isa("") == supported_cpu_isas().back());
  REQUIRE(choose_cpu_isa(nullptr) == supported_cpu_isas().back());
  for (const CpuIsa isa : supported_cpu_isas()) REQUIRE(choose_cpu_isa(name_of(isa)) == isa);
}
