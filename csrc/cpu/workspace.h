// How the memory of a call is shared out.
#pragma once
#include <cstdint>

#include "plan/cpu/scratch.h"

namespace diffqkv::cpu {

// Hands out the pieces of a workspace one after the other, or counts the bytes that they take.
class Workspace {
 public:
  // base: null where only the size is of interest.
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    char* const piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += aligned(count * int64_t(sizeof(T)));
    return reinterpret_cast<T*>(piece);
  }
  // The bytes that a caller has to bring: kernels align their scratch, wherever it begins.
  int64_t bytes() const { return kSlack + used_; }

 private:
  static constexpr int64_t kSlack = 64;

  char* base_;
  int64_t used_ = 0;
};

// The scratch of all threads of a call.
class ThreadScratch {
 public:
  ThreadScratch(Workspace& workspace, int64_t threads, int64_t bytes)
      : stride_(aligned(bytes)), first_(workspace.take<char>(threads * stride_)) {}

  char* of(int64_t worker) const { return first_ + worker * stride_; }

 private:
  int64_t stride_;
  char* first_;
};

}  // namespace diffqkv::cpu
