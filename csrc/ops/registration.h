// How an op's C++ function becomes a kernel of torch. Its parameters are those of the schema, in the schema's order; a
// run of arguments that several functions take may be one parameter, an ArgumentGroup.
#pragma once
#include <type_traits>
#include <utility>

#include "ops/torch_compat.h"

namespace diffqkv {

class ArgumentReader;

// A struct of this base lists its arguments as members, each with `= next<type>()`: they are read in that order.
struct ArgumentGroup {
  ArgumentReader* reader;

  template <class T>
  T next() const;
};

// The types of single arguments. A value on torch's stack has 64 bits: as a float or an int32_t, half of it would be
// read, without a word.
template <class T>
inline constexpr bool is_argument =
    std::is_same_v<T, Tensor> || std::is_same_v<T, int64_t> || std::is_same_v<T, double> || std::is_same_v<T, bool>;
template <class T>
inline constexpr bool is_argument<std::optional<T>> = is_argument<T>;

// Takes the arguments of one call off torch's stack.
class ArgumentReader {
 public:
  ArgumentReader(StableIValue* stack, uint64_t count) : next_(stack), left_(count) {}

  template <class T>
  T next() {
    if constexpr (std::is_base_of_v<ArgumentGroup, T>) {
      return T{ArgumentGroup{this}};
    } else {
      static_assert(is_argument<T>, "an argument is a Tensor, an int64_t, a double or a bool, optional or not");
      STD_TORCH_CHECK(left_ > 0, "the function has more parameters than its schema has arguments");
      --left_;
      return torch::stable::detail::to<T>(*next_++);
    }
  }
  uint64_t left() const { return left_; }

 private:
  StableIValue* next_;
  uint64_t left_;
};

template <class T>
T ArgumentGroup::next() const {
  return reader->next<T>();
}

template <class T>
void write_results(StableIValue* stack, const T& result) {
  stack[0] = torch::stable::detail::from(result);
}
template <class... T>
void write_results(StableIValue* stack, const std::tuple<T...>& results) {
  std::apply([stack](const T&... each) mutable { ((*stack++ = torch::stable::detail::from(each)), ...); }, results);
}

template <class T>
inline constexpr uint64_t result_count = 1;
template <>
inline constexpr uint64_t result_count<void> = 0;
template <class... T>
inline constexpr uint64_t result_count<std::tuple<T...>> = sizeof...(T);

// `function` as torch calls it.
template <auto function>
struct Boxed;
template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    STD_TORCH_CHECK(results == result_count<Result>, "the function has other results than its schema");
    ArgumentReader reader(stack, arguments);
    // Braces, for they are evaluated from left to right.
    std::tuple<std::remove_cvref_t<Parameters>...> values{reader.next<std::remove_cvref_t<Parameters>>()...};
    STD_TORCH_CHECK(reader.left() == 0, "the function has fewer parameters than its schema has arguments");
    if constexpr (std::is_void_v<Result>) {
      std::apply(function, values);
    } else {
      write_results(stack, std::apply(function, values));
    }
  }
};

}  // namespace diffqkv

// The function `name` of this scope runs the op of that name on CPU tensors, or on those of every device that the
// library was built for. Beside the STABLE_TORCH_LIBRARY_FRAGMENT that has the schema.
#define DIFFQKV_REGISTER_FOR(device, name) \
  STABLE_TORCH_LIBRARY_IMPL(diffqkv, device, m) { m.impl(#name, &::diffqkv::Boxed<&name>::call); }
#define DIFFQKV_REGISTER_CPU(name) DIFFQKV_REGISTER_FOR(CPU, name)
#ifdef DIFFQKV_HAVE_CUDA
#define DIFFQKV_REGISTER(name) DIFFQKV_REGISTER_FOR(CPU, name) DIFFQKV_REGISTER_FOR(CUDA, name)
#else
#define DIFFQKV_REGISTER(name) DIFFQKV_REGISTER_FOR(CPU, name)
#endif
