// The CPU kernels of packed_linear against a product in double, without torch.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/run.h"
#include "support/catch.h"
#include "support/on_threads.h"

using namespace diffqkv;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Numbers of a floating-point dtype, which have the value that `set` could store.
class Numbers {
 public:
  Numbers() = default;
  Numbers(DType dtype, int64_t n) : dtype_(dtype), bytes_(n * size()) {}

  void set(int64_t i, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (dtype_ == DType::bf16) bits >>= 16;
    if (dtype_ == DType::f16) bits = half_bits(x);
    std::memcpy(&bytes_[i * size()], &bits, size());
  }
  double operator[](int64_t i) const {
    uint32_t bits = 0;
    std::memcpy(&bits, &bytes_[i * size()], size());
    if (dtype_ == DType::f16) return half_value(bits);
    if (dtype_ == DType::bf16) bits <<= 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  void* data() { return bytes_.data(); }
  const std::vector<char>& bytes() const { return bytes_; }
  int64_t size() const { return dtype_ == DType::f32 ? 4 : 2; }  // of one

 private:
  static uint32_t half_bits(float x) {
    const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return 0x7e00;
    if (std::isinf(x)) return sign | 0x7c00;
    if (std::abs(x) < 6.2e-5f) return sign;  // no subnormal numbers
    const int e = std::ilogb(x);
    return sign | (uint32_t(e + 15) << 10) + (uint32_t(std::rint(std::ldexp(std::abs(x), 10 - e))) - 1024);
  }
  static double half_value(uint32_t bits) {
    const int e = bits >> 10 & 31, m = bits & 1023;
    const double size = e == 31  ? (m != 0 ? kNan : kInfinity)
                        : e == 0 ? std::ldexp(m, -24)
                                 : std::ldexp(1024 + m, e - 25);
    return bits & 0x8000 ? -size : size;
  }

  DType dtype_ = DType::f32;
  std::vector<char> bytes_;
};

struct Case {
  WeightForm form;
  DType dtype;  // of x, bias and results
  int64_t rows, in_features, out_features;
  int64_t group_size = 0;
  DType scales_dtype = DType::f32;
  bool zeros = false, bias = false;
};

// A call, and its weights one by one in double. What a panel has beside the output features is NaN, or the scale of it.
struct Problem {
  Case shape;
  PackedLinearParams p;
  Numbers x, out, bias, weight, scales, zeros;
  std::vector<uint8_t> integers;
  std::vector<double> w;      // [out_features, in_features]
  std::vector<double> parts;  // of the same shape: |w|, or what is added up to it, |scale * integer| + |zero|
  std::mt19937 random{77};

  explicit Problem(const Case& c) : shape(c) {
    p.rows = c.rows, p.in_features = c.in_features, p.out_features = c.out_features;
    p.dtype = c.dtype, p.form = c.form, p.group_size = c.group_size, p.scales_dtype = c.scales_dtype;
    x = filled(c.dtype, c.rows * c.in_features);
    out = Numbers(c.dtype, c.rows * c.out_features + 1);
    bias = filled(c.dtype, c.out_features);
    w.resize(c.out_features * c.in_features);
    parts.resize(w.size());
    if (p.is_integer())
      make_integers();
    else
      make_floats();
  }

  Numbers filled(DType dtype, int64_t n) {
    std::normal_distribution<float> normal;
    Numbers x(dtype, n);
    for (int64_t i = 0; i < n; ++i) x.set(i, normal(random));
    return x;
  }

  void make_floats() {
    const Case& c = shape;
    const int64_t K = c.in_features, pairs = c.form == WeightForm::bf16 ? 2 : 1;
    weight = filled(c.dtype, p.panels() * kPanelFeatures * K);
    for (int64_t n = 0; n < p.panels() * kPanelFeatures; ++n)
      for (int64_t k = 0; k < K; ++k) {
        const int64_t panel = n / kPanelFeatures, lane = n % kPanelFeatures;
        const int64_t at = (panel * K + k / pairs * pairs) * kPanelFeatures + lane * pairs + k % pairs;
        if (n < c.out_features)
          w[n * K + k] = weight[at], parts[n * K + k] = std::abs(weight[at]);
        else
          weight.set(at, kNan);
      }
  }

  void make_integers() {
    const Case& c = shape;
    const int64_t K = c.in_features, groups = p.groups();
    const bool four = c.form == WeightForm::int4;
    scales = filled(c.scales_dtype, p.panels() * groups * kPanelFeatures);
    zeros = filled(c.scales_dtype, p.panels() * groups * kPanelFeatures);
    integers.resize(p.panels() * kPanelFeatures * K / (four ? 2 : 1));
    std::uniform_int_distribution<int> some(four ? -8 : -128, four ? 7 : 127);
    for (int64_t n = 0; n < p.panels() * kPanelFeatures; ++n)
      for (int64_t k = 0; k < K; ++k) {
        const int64_t panel = n / kPanelFeatures, lane = n % kPanelFeatures;
        const int64_t scale_at = (panel * groups + k / c.group_size) * kPanelFeatures + lane;
        const int integer = k % 50 == 49 ? (four ? -8 : -128) : some(random);
        if (four) {
          const int64_t j = k % 8 / 2, half = k % 2;  // of the eight features of a step
          const int64_t at = ((panel * K / 8 + k / 8) * kPanelFeatures + lane) * 4 + half * 2 + j / 2;
          integers[at] |= uint8_t(integer + 8) << (j % 2 * 4);
        } else {
          integers[(panel * K / 2 + k / 2) * kPanelFeatures * 2 + lane * 2 + k % 2] = uint8_t(integer);
        }
        if (n >= c.out_features) {
          scales.set(scale_at, kNan);
          continue;
        }
        const double product = scales[scale_at] * integer, zero = c.zeros ? zeros[scale_at] : 0.0;
        w[n * K + k] = product + zero, parts[n * K + k] = std::abs(product) + std::abs(zero);
      }
  }

  const Numbers& run(int64_t threads = 1) {
    p.x = x.data(), p.out = out.data();
    p.bias = shape.bias ? bias.data() : nullptr;
    p.weight = p.is_integer() ? integers.data() : weight.data();
    if (p.is_integer()) p.scales = scales.data();
    if (shape.zeros) p.zeros = zeros.data();
    for (int64_t i = 0; i <= shape.rows * shape.out_features; ++i) out.set(i, kNan);
    out.set(shape.rows * shape.out_features, -7.0f);
    run_params(threads);
    return out;
  }

  void run_params(int64_t threads = 1) const {
    struct VectorMemory final : Memory {
      std::vector<char> piece;
      void* take(int64_t bytes) override {
        piece.assign(bytes, char(0xff));
        return piece.data();
      }
    } memory;
    cpu::run(p, {threads, on_threads, memory});
  }

  // The row's integers: x is rounded to 1 / 65534 of the largest of its group, or of 1e-30.
  double rounding_of_x(int64_t r, int64_t k) const {
    if (!p.is_integer()) return 0.0;
    double largest = 1e-30;
    for (int64_t i = k / shape.group_size * shape.group_size, end = i + shape.group_size; i < end; ++i)
      largest = std::max(largest, std::abs(x[r * shape.in_features + i]));
    return 1.6e-5 * largest;
  }

  void check_row(int64_t r) const {
    const Case& c = shape;
    const int64_t K = c.in_features;
    const double u = std::ldexp(1.0, -24), steps = p.is_integer() ? 8.0 + double(p.groups()) : 130.0 + double(K) / 128;
    std::vector<double> rounding(K);
    for (int64_t k = 0; k < K; ++k) rounding[k] = rounding_of_x(r, k);
    for (int64_t n = 0; n < c.out_features; ++n) {
      double exact = c.bias ? bias[n] : 0.0, size = std::abs(exact), error = 1e-35;
      for (int64_t k = 0; k < K; ++k) {
        const double product = x[r * K + k] * w[n * K + k];
        exact += product, size += std::abs(x[r * K + k]) * parts[n * K + k];
        error += rounding[k] * std::abs(w[n * K + k]);
      }
      error += u * steps * size;
      if (c.dtype == DType::bf16) error += std::ldexp(std::abs(exact), -8);
      if (c.dtype == DType::f16) error += std::ldexp(std::abs(exact), -11) + std::ldexp(1.0, -25);
      CAPTURE(int(c.form), int(c.dtype), c.rows, K, c.out_features, c.group_size, c.zeros, c.bias, r, n);
      REQUIRE(std::abs(out[r * c.out_features + n] - exact) <= error);
    }
  }
  void check() const {
    for (int64_t r = 0; r < shape.rows; ++r) check_row(r);
    REQUIRE(out[shape.rows * shape.out_features] == -7.0);
  }

  bool row_is(const Numbers& other, int64_t r, int64_t r_other) const {
    const int64_t bytes = shape.out_features * out.size();
    return std::memcmp(&out.bytes()[r * bytes], &other.bytes()[r_other * bytes], bytes) == 0;
  }
};

const std::vector<Case> kKinds = {
    {WeightForm::f32, DType::f32, 1, 256, 32},
    {WeightForm::f16, DType::f16, 1, 256, 32},
    {WeightForm::bf16, DType::bf16, 1, 256, 32},
    {WeightForm::int8, DType::f32, 1, 256, 32, 32},
    {WeightForm::int8, DType::bf16, 1, 256, 32, 64, DType::bf16, true},
    {WeightForm::int4, DType::f16, 1, 256, 32, 32, DType::f16, false},
    {WeightForm::int4, DType::f32, 1, 256, 32, 32, DType::bf16, true},
};

}  // namespace

TEST_CASE("packed_linear equals its definition, for any number of rows") {
  for (Case c : kKinds)
    for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 17, 23, 24, 29, 40}) {
      c.rows = rows, c.out_features = 45, c.bias = rows % 2 == 0;
      Problem problem(c);
      problem.run();
      problem.check();
    }
}

TEST_CASE("packed_linear equals its definition, for any number of output features") {
  for (Case c : kKinds)
    for (const int64_t out_features : {1, 3, 15, 31, 32, 33, 64, 70, 333}) {
      c.rows = 3, c.out_features = out_features, c.bias = true;
      Problem problem(c);
      problem.run(2);
      problem.check();
    }
}

TEST_CASE("packed_linear equals its definition, for any number of input features") {
  for (Case c : kKinds)
    for (const int64_t in_features : {1, 2, 3, 30, 127, 128, 129, 255, 256, 257, 514, 1001})
      for (const int64_t rows : {1, 5, 14}) {
        if (c.group_size != 0 || (c.form == WeightForm::bf16 && in_features % 2 == 1)) continue;
        c.rows = rows, c.in_features = in_features, c.out_features = 40;
        Problem problem(c);
        problem.run();
        problem.check();
      }
}

TEST_CASE("packed_linear equals its definition, for groups of any size, with scales and zeros of any dtype") {
  for (const WeightForm form : {WeightForm::int8, WeightForm::int4})
    for (int64_t group_size = kLeastGroupSize; group_size <= kMostGroupSize; group_size += 32)
      for (const DType scales_dtype : {DType::f32, DType::bf16, DType::f16})
        for (const int64_t rows : {1, 4, 13}) {
          Problem problem({form, DType::f32, rows, 3 * group_size, 40, group_size, scales_dtype, rows != 4});
          problem.run();
          problem.check();
        }
}

TEST_CASE("packed_linear: the largest integers of the largest groups do not overflow") {
  for (const WeightForm form : {WeightForm::int8, WeightForm::int4})
    for (const int64_t rows : {1, 5})
      for (const float sign : {1.0f, -1.0f}) {
        Problem problem({form, DType::f32, rows, 512, 32, 256});
        for (int64_t i = 0; i < rows * 512; ++i) problem.x.set(i, sign * 3.0f);
        const bool four = form == WeightForm::int4;
        std::fill(problem.integers.begin(), problem.integers.end(), uint8_t(four ? 0 : 0x80));
        for (int64_t n = 0; n < 32; ++n)
          for (int64_t k = 0; k < 512; ++k)
            problem.w[n * 512 + k] = problem.scales[k / 256 * 32 + n] * (four ? -8 : -128),
                                problem.parts[n * 512 + k] = std::abs(problem.w[n * 512 + k]);
        problem.run();
        problem.check();
      }
}

TEST_CASE("packed_linear: a group of zeros adds nothing, and groups may be as small or as large as numbers are") {
  for (const WeightForm form : {WeightForm::int8, WeightForm::int4})
    for (const int64_t rows : {1, 6}) {
      Problem problem({form, DType::f32, rows, 4 * 32, 40, 32, DType::f32, true});
      // Of the last row: zeros, numbers near 1, below the normal numbers, and far above.
      const int64_t last = (rows - 1) * 128;
      for (int64_t k = 0; k < 32; ++k) problem.x.set(last + k, k % 2 == 0 ? 0.0f : -0.0f);
      for (int64_t k = 64; k < 96; ++k) problem.x.set(last + k, 1e-41f * float(k));
      for (int64_t k = 96; k < 128; ++k) problem.x.set(last + k, 1e33f * float(k % 5 - 2));
      problem.run();
      problem.check();
      for (int64_t k = 32; k < 128; ++k) problem.x.set(last + k, k < 64 ? 0.0f : 2e-39f * float(k % 7 - 3));
      problem.run();
      problem.check();
      for (int64_t k = 32; k < 128; ++k) problem.x.set(last + k, 0.0f);
      problem.run();
      for (int64_t n = 0; n < 40; ++n) REQUIRE(problem.out[(rows - 1) * 40 + n] == 0.0);
    }
}

TEST_CASE("packed_linear: what is not finite stays in its row, and makes it NaN beside integer weights") {
  for (Case c : kKinds)
    for (const int64_t rows : {1, 3, 14})
      for (const float bad : {kNan, kInfinity, -kInfinity})
        for (const int64_t at : {0, 100, 255}) {
          c.rows = rows, c.out_features = 40;
          Problem clean(c), problem(c);
          clean.run();
          const int64_t row = rows / 2;
          problem.x.set(row * 256 + at, bad);
          problem.run();
          CAPTURE(int(c.form), int(c.dtype), rows, bad, at);
          for (int64_t r = 0; r < rows; ++r)
            if (r != row) REQUIRE(problem.row_is(clean.out, r, r));
          for (int64_t n = 0; n < 40; ++n) {
            const double got = problem.out[row * 40 + n];
            if (c.group_size != 0 || std::isnan(bad))
              REQUIRE(std::isnan(got));
            else
              REQUIRE(!std::isfinite(got));
          }
        }
}

TEST_CASE("packed_linear: bits do not depend on the threads, nor on other rows") {
  for (Case c : kKinds) {
    c.rows = 53, c.out_features = 900, c.zeros = c.group_size != 0, c.bias = true;
    Problem problem(c);
    const Numbers alone = problem.run(1);
    for (const int64_t threads : {2, 3, 8}) REQUIRE(problem.run(threads).bytes() == alone.bytes());
    Problem one(c);
    one.shape.rows = one.p.rows = 1;
    for (const int64_t r : {0, 11, 12, 40, 52}) {
      for (int64_t k = 0; k < c.in_features; ++k) one.x.set(k, float(problem.x[r * c.in_features + k]));
      one.run(2);
      CAPTURE(int(c.form), int(c.dtype), r);
      REQUIRE(problem.row_is(one.out, r, 0));
    }
  }
}

TEST_CASE("packed_linear: rows of two bytes may begin at any number") {
  for (const int64_t rows : {1, 2}) {
    Problem problem({WeightForm::bf16, DType::bf16, rows, 130, 33});
    const std::vector<char> want = problem.run().bytes();
    std::vector<char> shifted(problem.x.bytes().size() + 2);
    std::memcpy(&shifted[2], problem.x.data(), problem.x.bytes().size());
    problem.p.x = &shifted[2];
    problem.out.set(0, kNan);
    problem.run_params();
    REQUIRE(problem.out.bytes() == want);
  }
}

TEST_CASE("packed_linear: without rows nothing is written") {
  for (Case c : kKinds) {
    c.rows = 0;
    REQUIRE(Problem(c).run()[0] == -7.0);
  }
}
