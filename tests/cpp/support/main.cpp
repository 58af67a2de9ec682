// Runs all tests at the level that DIFFQKV_CPU_ISA names; 77 (skipped) where this CPU lacks it.
#include <cstdio>
#include <stdexcept>

#include "cpu/isa.h"

#if __has_include(<catch2/catch_session.hpp>)
#include <catch2/catch_session.hpp>
#else
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#endif

int main(int argc, char** argv) {
  try {
    std::printf("CPU level: %s\n", diffqkv::name_of(diffqkv::cpu_isa()));
  } catch (const std::runtime_error& error) {
    std::printf("skipped: %s\n", error.what());
    return 77;
  }
  return Catch::Session().run(argc, argv);
}
