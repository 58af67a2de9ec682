// A language for the shapes of a call: "b n_k s_k d_k" is four sizes by name, and a name has one size in all tensors.
#pragma once
#include <array>
#include <string_view>

#include "ops/torch_compat.h"

namespace diffqkv {

// "[2, 3, 7, 64]"
std::string list_of(torch::headeronly::IntHeaderOnlyArrayRef values);

class Shapes {
 public:
  // Makes a size known. The name has no spaces, but may be a formula: "d_k/2". It has to outlive this object.
  void set(std::string_view name, int64_t size);
  // The size of this name, which is known.
  int64_t operator[](std::string_view name) const;

  // Checks that t has a dimension for each word of `want`, names or integers, and every size that is known; the others
  // are known from then on. The error is
  //   k: got shape [2, 3, 7, 64], want [b = 2, n_k, s_k, d_k = 64]
  void check(const char* argument, const Tensor& t, std::string_view want);

 private:
  struct Size {
    std::string_view name;
    int64_t value;
  };
  const Size* find(std::string_view name) const;
  void add(std::string_view name, int64_t size);
  bool matches(std::string_view word, int64_t size);
  std::string text(std::string_view want) const;

  static constexpr size_t kMostSizes = 24;  // no op has as many
  std::array<Size, kMostSizes> sizes_;
  size_t known_ = 0;
};

}  // namespace diffqkv
