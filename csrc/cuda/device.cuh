// The device's vocabulary: everything that a kernel asks of the GPU, and nothing else. Kernels are written in these
// functions, so that the tests run the same source on the CPU: tests/cpp/cuda/emulator.h defines them there, lane by
// lane as the PTX manual does.
//
// A kernel is a struct
//   struct K { using Params; static constexpr int kThreads, kMinBlocks; static DIFFQKV_DEVICE void run(const Params&,
//   char* shared); };
// of one-dimensional blocks of kThreads threads, with `shared` aligned to 128 bytes; kMinBlocks: blocks that a
// multiprocessor shall hold at once. launch.cuh runs it.
#pragma once
#include <cmath>
#include <cstdint>

#include "params/arithmetic.h"
#include "params/params.h"

#if !defined(__CUDACC__)
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DIFFQKV_DEVICE __device__ __forceinline__
#define DIFFQKV_UNROLL _Pragma("unroll")
#define DIFFQKV_PRAGMA(x) _Pragma(#x)
#define DIFFQKV_UNROLL_BY(n) DIFFQKV_PRAGMA(unroll n)

namespace diffqkv::device {

// ---- where a thread is ----------------------------------------------------------------------------------------------

DIFFQKV_DEVICE int thread() { return threadIdx.x; }
DIFFQKV_DEVICE int lane() { return threadIdx.x % 32; }
DIFFQKV_DEVICE int warp() { return threadIdx.x / 32; }
DIFFQKV_DEVICE int64_t block_x() { return blockIdx.x; }
DIFFQKV_DEVICE int64_t block_y() { return blockIdx.y; }
DIFFQKV_DEVICE int64_t block_z() { return blockIdx.z; }
DIFFQKV_DEVICE int64_t grid_x() { return gridDim.x; }

// ---- agreement ------------------------------------------------------------------------------------------------------

DIFFQKV_DEVICE void sync_block() { __syncthreads(); }
DIFFQKV_DEVICE void sync_warp() { __syncwarp(); }
DIFFQKV_DEVICE bool any_in_block(bool x) { return __syncthreads_or(x); }
// All 32 lanes take part in all of these.
DIFFQKV_DEVICE uint32_t ballot(bool x) { return __ballot_sync(~0u, x); }
template <class T>
DIFFQKV_DEVICE T shuffle(T x, int from) {
  return __shfl_sync(~0u, x, from);
}
template <class T>
DIFFQKV_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(~0u, x, mask);
}

// ---- between blocks -------------------------------------------------------------------------------------------------

// What this thread wrote before is seen by whoever sees what it writes afterwards.
DIFFQKV_DEVICE void fence() { __threadfence(); }
// Returns how many have taken a ticket before; the last of `tickets` resets the counter to 0.
DIFFQKV_DEVICE uint32_t take_ticket(uint32_t* counter, uint32_t tickets) { return atomicInc(counter, tickets - 1); }
DIFFQKV_DEVICE uint32_t atomic_add(uint32_t* counter, uint32_t x) { return atomicAdd(counter, x); }
struct alignas(16) Float4 {
  float x[4];
};
// These load past the first-level cache, which does not see what other blocks wrote.
DIFFQKV_DEVICE float load_shared_by_blocks(const float* p) { return __ldcg(p); }
DIFFQKV_DEVICE Float4 load_shared_by_blocks(const Float4* p) {
  const float4 y = __ldcg(reinterpret_cast<const float4*>(p));
  return {{y.x, y.y, y.z, y.w}};
}
DIFFQKV_DEVICE uint32_t load_shared_by_blocks(const uint32_t* p) { return __ldcg(p); }
DIFFQKV_DEVICE uint64_t load_shared_by_blocks(const uint64_t* p) {
  return __ldcg(reinterpret_cast<const unsigned long long*>(p));
}

// Loads 16 bytes at once, aligned to as many.
template <class Vector>
DIFFQKV_DEVICE Vector load_vector(const void* p) {
  static_assert(sizeof(Vector) == 16 && alignof(Vector) == 16);
  return *static_cast<const Vector*>(p);
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

// 2^x and log2(x) to about 2 ulp; exp2(-inf) = 0.
DIFFQKV_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DIFFQKV_DEVICE float log2(float x) { return __log2f(x); }
DIFFQKV_DEVICE double exp2(double x) { return ::exp2(x); }
DIFFQKV_DEVICE double log2(double x) { return ::log2(x); }
DIFFQKV_DEVICE double tanh(double x) { return ::tanh(x); }
// tanh to about 2e-7: a softcap's rounding, at a few instructions.
DIFFQKV_DEVICE float tanh(float x) { return 1.0f - __fdividef(2.0f, exp2(2.0f * kLog2e<float> * x) + 1.0f); }
DIFFQKV_DEVICE float sqrt(float x) { return __fsqrt_rn(x); }
DIFFQKV_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DIFFQKV_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
// These are rounded by themselves, never contracted to a multiply-add.
DIFFQKV_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
DIFFQKV_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
DIFFQKV_DEVICE double mul(double a, double b) { return __dmul_rn(a, b); }
// a b + c, rounded once.
DIFFQKV_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DIFFQKV_DEVICE int count_ones(uint32_t x) { return __popc(x); }

// ---- matrix fragments -----------------------------------------------------------------------------------------------

DIFFQKV_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane i gives the 16-byte row i % 8 of matrix i / 8, and
// gets of each matrix the elements (row lane / 4, columns 2 * (lane % 4) and the next); transposed: (rows
// 2 * (lane % 4) and the next, column lane / 4).
DIFFQKV_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DIFFQKV_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// Two matrices: lanes 0 to 15 give the rows, every lane must give a valid address.
DIFFQKV_DEVICE void load_matrices_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
DIFFQKV_DEVICE void load_matrices(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

struct F32 {
  using T = float;
  static constexpr DType kDType = DType::f32;
  static DIFFQKV_DEVICE float get(T x) { return x; }
  static DIFFQKV_DEVICE T put(float x) { return x; }
};
struct F64 {
  using T = double;
  static constexpr DType kDType = DType::f64;
  static DIFFQKV_DEVICE double get(T x) { return x; }
  static DIFFQKV_DEVICE T put(double x) { return x; }
};

// c += a b for a [16, 16], b [16, 8]. Lane l holds of c: rows l / 4 (c[0], c[1]) and l / 4 + 8 (c[2], c[3]), columns
// 2 * (l % 4) and the next; of a, two elements a word: (row l / 4, columns 2 * (l % 4) and the next), then row + 8,
// then columns + 8, then both; of b: (rows 2 * (l % 4) and the next, column l / 4), then rows + 8.
struct F16 {
  using T = uint16_t;
  static constexpr DType kDType = DType::f16;
  static DIFFQKV_DEVICE float get(T x) { return __half2float(__ushort_as_half(x)); }
  static DIFFQKV_DEVICE T put(float x) { return __half_as_ushort(__float2half_rn(x)); }
  static DIFFQKV_DEVICE uint32_t pack(float low, float high) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
  }
  static DIFFQKV_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};
struct BF16 {
  using T = uint16_t;
  static constexpr DType kDType = DType::bf16;
  static DIFFQKV_DEVICE float get(T x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
  static DIFFQKV_DEVICE T put(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
  static DIFFQKV_DEVICE uint32_t pack(float low, float high) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
  }
  static DIFFQKV_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// ---- copies to shared memory that do not wait ----------------------------------------------------------------------

// Copies 16 bytes, both sides aligned to as many; zeros where `valid` is false, and then the source is not read.
DIFFQKV_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Copies 8 bytes, aligned to as many.
DIFFQKV_DEVICE void copy_async_8(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 8 : 0)
               : "memory");
}
// Closes a group of this thread's copies; waits until at most `pending` groups of this thread are under way. Other
// threads see the data after the next sync_block.
DIFFQKV_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
DIFFQKV_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- bulk copies and their barriers (sm_90) -----------------------------------------------------------------------

// A barrier in shared memory, 8 bytes. Its phase ends when `arrivals` threads have arrived and all bytes announced have
// come; phases count 0, 1, 0, 1, ...
struct Barrier {
  uint64_t word;
};
// In code for older GPUs, which no planner chooses, all of these stop the kernel.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DIFFQKV_SM90(...) asm volatile(__VA_ARGS__)
#else
#define DIFFQKV_SM90(...) __trap()
#endif
DIFFQKV_DEVICE void barrier_init(Barrier* b, int arrivals) {
  DIFFQKV_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// After barrier_init, before a sync_block: the copy engine sees the barriers too.
DIFFQKV_DEVICE void barrier_init_done() { DIFFQKV_SM90("fence.mbarrier_init.release.cluster;" :: : "memory"); }
// Arrives, and announces bytes that copies will bring.
DIFFQKV_DEVICE void barrier_arrive_expecting(Barrier* b, int bytes) {
  DIFFQKV_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
               "r"(bytes) : "memory");
}
// Waits until the phase of this parity has ended.
DIFFQKV_DEVICE void barrier_wait(Barrier* b, int parity) {
  DIFFQKV_SM90(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(b)),
      "r"(parity) : "memory");
}
// Copies a multiple of 16 bytes, both sides aligned to 16; they count at the barrier when they have come.
DIFFQKV_DEVICE void copy_bulk(void* shared, const void* global, int bytes, Barrier* b) {
  DIFFQKV_SM90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(b)) : "memory");
}
// Ordinary writes to shared memory of this thread come before bulk copies to the same place issued after it and a
// sync_block.
DIFFQKV_DEVICE void fence_before_bulk() { DIFFQKV_SM90("fence.proxy.async.shared::cta;" :: : "memory"); }
#undef DIFFQKV_SM90

}  // namespace diffqkv::device
#endif
