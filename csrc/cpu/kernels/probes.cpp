// The physical limits that benchmarks compare with: arithmetic on registers, and reading memory.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/words.h"

namespace diffqkv {
namespace {

// Enough independent accumulators to hide the latency of two multiply-adds a cycle, few enough for the registers.
constexpr int kAccumulators = 12;

template <bool kDot>
float multiply_add(int64_t rounds) {
  vf acc[kAccumulators];
  DIFFQKV_UNROLL
  for (int i = 0; i < kAccumulators; ++i) acc[i] = vset(float(i));
  vf b = vset(1e-3f);
  for (int64_t r = 0; r < rounds; ++r) {
    asm volatile("" : "+v"(b));  // a new value as far as the compiler knows: nothing can be hoisted
    DIFFQKV_UNROLL
    for (int i = 0; i < kAccumulators; ++i) acc[i] = mac<kDot>(0x3f803f80u, b, acc[i]);
  }
  vf sum = acc[0];
  for (int i = 1; i < kAccumulators; ++i) sum = vadd(sum, acc[i]);
  return vsum(sum);
}

}  // namespace

namespace DIFFQKV_ISA {

double probe_fma(int64_t rounds, float* sink) {
  *sink = multiply_add<false>(rounds);
  return double(rounds) * kAccumulators * VL * 2;
}

double probe_dot(int64_t rounds, float* sink) {
#if defined(__AVX512BF16__)
  *sink = multiply_add<true>(rounds);
  return double(rounds) * kAccumulators * VL * 4;
#else
  *sink = float(rounds);
  return 0;
#endif
}

void probe_read(const void* data, int64_t bytes, float* sink) {
  constexpr int kStreams = 4;  // the hardware prefetchers follow several
  const float* p = (const float*)data;
  const int64_t n = bytes / 4 / kStreams / (4 * VL) * (4 * VL);
  vf acc[4] = {vset(0), vset(0), vset(0), vset(0)};
  for (int64_t i = 0; i < n; i += 4 * VL) {
    DIFFQKV_UNROLL
    for (int s = 0; s < kStreams; ++s) {
      DIFFQKV_UNROLL
      for (int x = 0; x < 4; ++x) acc[x] = vmax(acc[x], vload(p + s * n + i + x * VL));
    }
  }
  *sink = vsum(vadd(vadd(acc[0], acc[1]), vadd(acc[2], acc[3])));
}

}  // namespace DIFFQKV_ISA
}  // namespace diffqkv
