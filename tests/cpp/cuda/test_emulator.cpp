// The emulator itself: fragments against matrix products, and that it finds what it promises to find.
#include <string>
#include <vector>

#include "cuda/device.cuh"
#include "support/catch.h"

using namespace diffqkv::device;
using emulator::kSchedules;
using emulator::Schedule;

namespace {

// One warp: c = a b of [16, 16] and [16, 8], both from shared memory, b stored as its transpose [8, 16].
template <class E>
struct Product {
  struct Params {
    const uint16_t *a, *b;
    float* c;
    int stride;  // of a row of a in shared memory, elements
  };
  static constexpr int kThreads = 32, kMinBlocks = 1;
  static void run(const Params& p, char* shared) {
    auto *a = reinterpret_cast<uint16_t*>(shared), *b = a + 16 * p.stride;
    for (int i = lane(); i < 16 * 2; i += 32) copy_async(a + i / 2 * p.stride + i % 2 * 8, p.a + i * 8, true);
    for (int i = lane(); i < 8 * 2; i += 32) copy_async(b + i * 8, p.b + i * 8, true);
    copy_commit();
    copy_wait<0>();
    sync_block();
    uint32_t x[4], y[2];
    load_matrices(x, a + lane() % 16 * p.stride + lane() / 16 * 8);
    load_matrices(y, b + lane() % 8 * 16 + lane() / 8 % 2 * 8);
    float c[4] = {};
    E::mma(c, x, y[0], y[1]);
    for (int i = 0; i < 4; ++i) p.c[(lane() / 4 + i / 2 * 8) * 8 + 2 * (lane() % 4) + i % 2] = c[i];
  }
};

// Thread t writes, its neighbour in the next warp reads: right only with the barrier.
struct Exchange {
  struct Params {
    int* out;
    bool barrier;
  };
  static constexpr int kThreads = 64, kMinBlocks = 1;
  static void run(const Params& p, char* shared) {
    auto* x = reinterpret_cast<int*>(shared);
    x[thread()] = thread();
    if (p.barrier) sync_block();
    p.out[thread()] = x[(thread() + 32) % 64];
  }
};

struct Faulty {
  struct Params {
    int fault;
    const char* global;
  };
  static constexpr int kThreads = 64, kMinBlocks = 1;
  static void run(const Params& p, char* shared) {
    if (p.fault == 0 && lane() < 16) return;
    if (p.fault == 0) sync_warp();
    if (p.fault == 1 && lane() < 16) sync_warp();
    if (p.fault == 1 && lane() >= 16) ballot(true);
    if (p.fault == 2) copy_async(shared + 8, p.global, true);
    if (p.fault == 3) copy_async(shared + 1024, p.global, true);
    if (p.fault == 4) copy_async(shared, p.global + 4, true);
  }
};

struct Transpose {
  struct Params {
    uint32_t* loaded;
  };
  static constexpr int kThreads = 32, kMinBlocks = 1;
  static void run(const Params& p, char* shared) {
    auto* x = reinterpret_cast<uint16_t*>(shared);
    for (int i = lane(); i < 256; i += 32) x[i] = uint16_t(i);
    sync_block();
    uint32_t t[4];
    load_matrices_transposed(t, x + lane() * 8);
    p.loaded[lane()] = t[2];
  }
};

std::string fault(int which) {
  alignas(16) static const char global[64] = {};
  try {
    emulate<Faulty>({which, global}, {}, 1024, Schedule::forward);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "none";
}

template <class E>
void check_product(int stride, int64_t wavefronts) {
  std::vector<uint16_t> a(256), b(128);
  std::vector<float> c(128);
  for (int i = 0; i < 256; ++i) a[i] = E::put(float(i * 7 % 13) - 6.0f);
  for (int i = 0; i < 128; ++i) b[i] = E::put(float(i * 5 % 11) - 5.0f);
  const auto counts =
      emulate<Product<E>>({a.data(), b.data(), c.data(), stride}, {}, 2 * (16 * stride + 128), Schedule::forward);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += E::get(a[i * 16 + k]) * E::get(b[j * 16 + k]);
      REQUIRE(c[i * 8 + j] == sum);
    }
  CHECK(counts.mma == 1);
  CHECK(counts.matrix_rows == 6);
  CHECK(counts.matrix_wavefronts == wavefronts);
  CHECK(counts.copied_bytes == 2 * (256 + 128));
}

}  // namespace

TEST_CASE("emulated fragments make a matrix product, and bank conflicts are counted") {
  check_product<BF16>(24, 4 + 2 * 2);     // rows 48 bytes apart: no conflicts; rows 32 bytes apart: two to a bank
  check_product<F16>(64, 4 * 8 + 2 * 2);  // 128 bytes: all rows in the same bank
}

TEST_CASE("a missing barrier shows under one of the schedules") {
  for (const bool barrier : {true, false}) {
    int wrong = 0;
    for (const Schedule schedule : kSchedules) {
      std::vector<int> out(64);
      emulate<Exchange>({out.data(), barrier}, {}, 64 * 4, schedule);
      for (int t = 0; t < 64; ++t) wrong += out[t] != (t + 32) % 64;
    }
    CHECK((wrong > 0) != barrier);
  }
}

TEST_CASE("the emulator refuses what a GPU forbids") {
  CHECK(fault(0).find("deadlock") != std::string::npos);
  CHECK(fault(1).find("different operations") != std::string::npos);
  CHECK(fault(2).find("misaligned") != std::string::npos);
  CHECK(fault(3).find("outside shared memory") != std::string::npos);
  CHECK(fault(4).find("misaligned source") != std::string::npos);
}

TEST_CASE("a matrix is loaded transposed") {
  std::vector<uint32_t> loaded(32);
  emulate<Transpose>({loaded.data()}, {}, 512, Schedule::reverse);
  for (uint32_t l = 0; l < 32; ++l) {
    const uint32_t first = 128 + 2 * (l % 4) * 8 + l / 4;  // the third matrix begins at 128; its rows have 8 elements
    CHECK(loaded[l] == (first | (first + 8) << 16));
  }
}
