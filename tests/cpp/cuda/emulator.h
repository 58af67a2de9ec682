// A GPU on the CPU: the vocabulary of csrc/cuda/device.cuh, so that the tests run the kernels' own source.
//
// The threads of a block are fibers, the blocks of a grid run one after another. What a warp or a block does together
// happens when its last member comes; fragments lie in the lanes as the PTX manual says. It is a hard judge:
// - Warps run as far as they can in the order that the schedule names, and so do lanes and blocks, so that a missing
//   barrier shows as a wrong result under one of the schedules.
// - Shared memory holds NaN at first. The target of an asynchronous copy holds NaN from the copy's issue to the wait
//   that covers it: reading too early, and overwriting what others still read, both show.
// - Lanes that do not come to an operation of their warp, misaligned or foreign addresses, and deadlocks are errors.
// - Bank conflicts of matrix loads are counted.
// Under AddressSanitizer it also finds every access outside a buffer.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "params/arithmetic.h"
#include "params/params.h"

#define DIFFQKV_DEVICE inline
#define DIFFQKV_UNROLL
#define DIFFQKV_UNROLL_BY(n)

namespace diffqkv::device {

namespace emulator {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};
enum class Schedule { forward, reverse, shuffled };
inline constexpr Schedule kSchedules[] = {Schedule::forward, Schedule::reverse, Schedule::shuffled};

// What the emulated kernel did.
struct Counts {
  int64_t matrix_rows = 0;        // 8 x 8 matrices loaded from shared memory
  int64_t matrix_wavefronts = 0;  // trips to it that this took: as many without bank conflicts
  int64_t mma = 0;                // matrix products, per warp
  int64_t copied_bytes = 0;       // by asynchronous copies, zeros included
};

struct Place {
  int thread = 0;
  int64_t x = 0, y = 0, z = 0;
  Grid grid;
};
extern Place place;  // of the running fiber
extern Counts counts;
extern const std::vector<float> halves;  // by their bits

// Stops the emulation with an error.
[[noreturn]] void fail(const char* what);
// Comes to an operation of the warp; `act` runs once, with the arguments of all 32 lanes.
void together(const char* name, void* argument, void (*act)(void* const* arguments));
bool sync_block(bool x);
void check_shared(const void* p, int64_t bytes, int64_t alignment, const char* what);
void count_matrix(const void* const* rows);
void copy_async(void* shared, const void* global, bool valid, int bytes);
void copy_commit();
void copy_wait(int pending);
void barrier_init(void* barrier, int arrivals);
void barrier_arrive(void* barrier, int64_t bytes);
void barrier_wait(void* barrier, int parity);
void copy_bulk(void* shared, const void* global, int64_t bytes, void* barrier);

void run(void (*body)(void* context, char* shared), void* context, int threads, Grid grid, int64_t shared_bytes,
         Schedule schedule);

}  // namespace emulator

// Runs a grid of a kernel; throws std::runtime_error on what is forbidden.
template <class Kernel>
emulator::Counts emulate(const typename Kernel::Params& params, emulator::Grid grid, int64_t shared_bytes,
                         emulator::Schedule schedule) {
  emulator::counts = {};
  emulator::run(
      [](void* context, char* shared) { Kernel::run(*static_cast<const typename Kernel::Params*>(context), shared); },
      const_cast<typename Kernel::Params*>(&params), Kernel::kThreads, grid, shared_bytes, schedule);
  return emulator::counts;
}

inline int thread() { return emulator::place.thread; }
inline int lane() { return emulator::place.thread % 32; }
inline int warp() { return emulator::place.thread / 32; }
inline int64_t block_x() { return emulator::place.x; }
inline int64_t block_y() { return emulator::place.y; }
inline int64_t block_z() { return emulator::place.z; }
inline int64_t grid_x() { return emulator::place.grid.x; }

inline void sync_block() { emulator::sync_block(false); }
inline bool any_in_block(bool x) { return emulator::sync_block(x); }
inline void sync_warp() {
  emulator::together("sync_warp", nullptr, [](void* const*) {});
}
inline uint32_t ballot(bool x) {
  struct Argument {
    bool x;
    uint32_t result;
  } argument{x, 0};
  emulator::together("ballot", &argument, [](void* const* all) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= uint32_t(static_cast<Argument*>(all[i])->x) << i;
    for (int i = 0; i < 32; ++i) static_cast<Argument*>(all[i])->result = bits;
  });
  return argument.result;
}
template <class T>
T shuffle(T x, int from) {
  struct Argument {
    T x, result;
    int from;
  } argument{x, x, from};
  emulator::together("shuffle", &argument, [](void* const* all) {
    for (int i = 0; i < 32; ++i) {
      auto* a = static_cast<Argument*>(all[i]);
      a->result = static_cast<Argument*>(all[a->from & 31])->x;
    }
  });
  return argument.result;
}
template <class T>
T shuffle_xor(T x, int mask) {
  return shuffle(x, lane() ^ mask);
}

inline void fence() {}
inline uint32_t take_ticket(uint32_t* counter, uint32_t tickets) {
  const uint32_t before = *counter;
  *counter = before >= tickets - 1 ? 0 : before + 1;
  return before;
}
inline uint32_t atomic_add(uint32_t* counter, uint32_t x) {
  const uint32_t before = *counter;
  *counter += x;
  return before;
}
struct alignas(16) Float4 {
  float x[4];
};
template <class T>
T load_shared_by_blocks(const T* p) {
  return *p;
}

template <class Vector>
Vector load_vector(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) emulator::fail("load_vector: misaligned");
  Vector v;
  std::memcpy(&v, p, 16);
  return v;
}

inline float exp2(float x) { return std::exp2(x); }
inline float log2(float x) { return std::log2(x); }
inline double exp2(double x) { return std::exp2(x); }
inline double log2(double x) { return std::log2(x); }
inline double tanh(double x) { return std::tanh(x); }
inline float tanh(float x) { return 1.0f - 2.0f / (exp2(2.0f * kLog2e<float> * x) + 1.0f); }
inline float sqrt(float x) { return std::sqrt(x); }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float add(float a, float b) { return a + b; }
inline float mul(float a, float b) { return a * b; }
inline double mul(double a, double b) { return a * b; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline int count_ones(uint32_t x) { return __builtin_popcount(x); }

namespace emulator {

// Loads the 8 x 8 matrices whose rows the lanes [0, 8 * N) name; element (row, column) of matrix m goes to
// part `column % 2` of word m of lane 4 * row + column / 2, transposed with row and column exchanged.
template <int N, bool transposed>
void load(uint32_t (&r)[N], const void* row) {
  struct Argument {
    const void* row;
    uint32_t* r;
  } argument{row, r};
  together(transposed ? "load_matrices_transposed" : "load_matrices", &argument, [](void* const* all) {
    const void* rows[32];
    for (int i = 0; i < 32; ++i) {
      rows[i] = static_cast<Argument*>(all[i])->row;
      check_shared(rows[i], 16, 16, "load_matrices");
    }
    for (int m = 0; m < N; ++m) {
      count_matrix(rows + 8 * m);
      uint16_t x[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(x[i], rows[8 * m + i], 16);
      for (int l = 0; l < 32; ++l) {
        const int i = l / 4, j = 2 * (l % 4);
        const uint32_t low = transposed ? x[j][i] : x[i][j], high = transposed ? x[j + 1][i] : x[i][j + 1];
        static_cast<Argument*>(all[l])->r[m] = low | high << 16;
      }
    }
  });
}

template <class E>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Argument {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } argument{c, a, {b0, b1}};
  together("mma", &argument, [](void* const* all) {
    ++counts.mma;
    float x[16][16], y[16][8];
    for (int l = 0; l < 32; ++l) {
      const auto& lane = *static_cast<Argument*>(all[l]);
      for (int half = 0; half < 2; ++half) {
        const int shift = 16 * half, j = 2 * (l % 4) + half;
        for (int w = 0; w < 4; ++w) x[l / 4 + 8 * (w % 2)][j + 8 * (w / 2)] = E::get(uint16_t(lane.a[w] >> shift));
        for (int w = 0; w < 2; ++w) y[j + 8 * w][l / 4] = E::get(uint16_t(lane.b[w] >> shift));
      }
    }
    for (int l = 0; l < 32; ++l) {
      const auto& lane = *static_cast<Argument*>(all[l]);
      for (int w = 0; w < 4; ++w) {
        const int i = l / 4 + 8 * (w / 2), j = 2 * (l % 4) + w % 2;
        float sum = lane.c[w];
        for (int k = 0; k < 16; ++k) sum += x[i][k] * y[k][j];
        lane.c[w] = sum;
      }
    }
  });
}

}  // namespace emulator

inline void load_matrices(uint32_t (&r)[4], const void* row) { emulator::load<4, false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulator::load<4, true>(r, row); }
inline void load_matrices(uint32_t (&r)[2], const void* row) { emulator::load<2, false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[2], const void* row) { emulator::load<2, true>(r, row); }

struct F32 {
  using T = float;
  static constexpr DType kDType = DType::f32;
  static float get(T x) { return x; }
  static T put(float x) { return x; }
};
struct F64 {
  using T = double;
  static constexpr DType kDType = DType::f64;
  static double get(T x) { return x; }
  static T put(double x) { return x; }
};
struct F16 {
  using T = uint16_t;
  static constexpr DType kDType = DType::f16;
  static float get(T x) { return emulator::halves[x]; }
  static T put(float x) {
    const _Float16 f = _Float16(x);
    T bits;
    std::memcpy(&bits, &f, 2);
    return bits;
  }
  static uint32_t pack(float low, float high) { return put(low) | uint32_t(put(high)) << 16; }
  static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { emulator::mma<F16>(c, a, b0, b1); }
};
struct BF16 {
  using T = uint16_t;
  static constexpr DType kDType = DType::bf16;
  static float get(T x) { return float_of(uint32_t(x) << 16); }
  static T put(float x) {  // to nearest, ties to even
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return T(0x7fff);
    return T((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  static uint32_t pack(float low, float high) { return put(low) | uint32_t(put(high)) << 16; }
  static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::mma<BF16>(c, a, b0, b1);
  }
};

inline void copy_async(void* shared, const void* global, bool valid) {
  emulator::copy_async(shared, global, valid, 16);
}
inline void copy_async_8(void* shared, const void* global, bool valid) {
  emulator::copy_async(shared, global, valid, 8);
}
inline void copy_commit() { emulator::copy_commit(); }
template <int pending>
void copy_wait() {
  emulator::copy_wait(pending);
}

struct Barrier {
  uint64_t word;
};
inline void barrier_init(Barrier* b, int arrivals) { emulator::barrier_init(b, arrivals); }
inline void barrier_init_done() {}
inline void barrier_arrive_expecting(Barrier* b, int bytes) { emulator::barrier_arrive(b, bytes); }
inline void barrier_wait(Barrier* b, int parity) { emulator::barrier_wait(b, parity); }
inline void copy_bulk(void* shared, const void* global, int bytes, Barrier* b) {
  emulator::copy_bulk(shared, global, bytes, b);
}
inline void fence_before_bulk() {}

}  // namespace diffqkv::device
