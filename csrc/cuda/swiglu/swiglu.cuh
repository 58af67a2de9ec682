// swiglu and its gradient: a thread takes 16 bytes of each operand at a time, in fp32.
#pragma once
#include "cuda/device.cuh"

namespace diffqkv::device {

// Threads take vectors where all pointers are aligned to them, and single elements of the tail and of other tensors.
template <class E, bool backward>
struct Swiglu {
  struct Params {
    SwigluBackwardParams bp;  // forward alone, where that is the op
    bool aligned;
  };
  using T = typename E::T;
  static constexpr int kThreads = 256, kMinBlocks = 4, kWidth = 16 / sizeof(T);
  struct alignas(16) Vector {
    T x[kWidth];
  };

  static DIFFQKV_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exp2(-kLog2e<float> * x)); }

  static DIFFQKV_DEVICE void one(T gate, T up, T dout, T& out, T& dgate, T& dup) {
    const float x = E::get(gate), s = sigmoid(x), silu = x * s;
    if constexpr (backward) {
      const float d = E::get(dout);
      dgate = E::put(d * E::get(up) * (s + silu * (1.0f - s)));
      dup = E::put(d * silu);
    } else {
      out = E::put(silu * E::get(up));
    }
  }

  template <class V>
  static DIFFQKV_DEVICE const V& at(const void* data, int64_t i) {
    return static_cast<const V*>(data)[i];
  }

  static DIFFQKV_DEVICE void run(const Params& params, char*) {
    const SwigluBackwardParams& bp = params.bp;
    const SwigluParams& p = bp.forward;
    const int64_t step = grid_x() * kThreads, first = block_x() * kThreads + thread();
    const int64_t vectors = params.aligned ? p.numel / kWidth : 0;
    for (int64_t i = first; i < vectors; i += step) {
      const Vector gate = at<Vector>(p.gate, i), up = at<Vector>(p.up, i);
      const Vector dout = backward ? at<Vector>(bp.dout, i) : Vector{};
      Vector out, dgate, dup;
      DIFFQKV_UNROLL
      for (int j = 0; j < kWidth; ++j) one(gate.x[j], up.x[j], dout.x[j], out.x[j], dgate.x[j], dup.x[j]);
      if constexpr (backward) {
        static_cast<Vector*>(bp.dgate)[i] = dgate;
        static_cast<Vector*>(bp.dup)[i] = dup;
      } else {
        static_cast<Vector*>(p.out)[i] = out;
      }
    }
    for (int64_t i = vectors * kWidth + first; i < p.numel; i += step) {
      T out, dgate, dup;
      one(at<T>(p.gate, i), at<T>(p.up, i), backward ? at<T>(bp.dout, i) : T(0), out, dgate, dup);
      if constexpr (backward) {
        static_cast<T*>(bp.dgate)[i] = dgate;
        static_cast<T*>(bp.dup)[i] = dup;
      } else {
        static_cast<T*>(p.out)[i] = out;
      }
    }
  }
};

}  // namespace diffqkv::device
