#include "ops/shapes.h"

#include <algorithm>
#include <charconv>

namespace diffqkv {
namespace {

// Takes the first word off `words`, which are separated by one space each.
std::string_view next_word(std::string_view& words) {
  const size_t end = std::min(words.find(' '), words.size());
  const std::string_view word = words.substr(0, end);
  words.remove_prefix(std::min(end + 1, words.size()));
  return word;
}

bool is_integer(std::string_view word) { return word.front() >= '0' && word.front() <= '9'; }

int64_t integer(std::string_view word) {
  int64_t value = 0;
  std::from_chars(word.data(), word.data() + word.size(), value);
  return value;
}

// Names of one length mostly differ in their first or last letter, which is told sooner than memcmp is called.
bool same(std::string_view a, std::string_view b) {
  return a.size() == b.size() && a.back() == b.back() && a.front() == b.front() && a == b;
}

}  // namespace

std::string list_of(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::string text = "[";
  for (const int64_t value : values) text += (text.size() > 1 ? ", " : "") + std::to_string(value);
  return text + "]";
}

const Shapes::Size* Shapes::find(std::string_view name) const {
  for (size_t i = 0; i < known_; ++i)
    if (same(sizes_[i].name, name)) return &sizes_[i];
  return nullptr;
}

void Shapes::add(std::string_view name, int64_t size) {
  STD_TORCH_CHECK(known_ < kMostSizes, name, ": a size too many");
  sizes_[known_++] = {name, size};
}

void Shapes::set(std::string_view name, int64_t size) {
  STD_TORCH_CHECK(find(name) == nullptr, name, ": a size that is known already");
  add(name, size);
}

int64_t Shapes::operator[](std::string_view name) const {
  const Size* size = find(name);
  STD_TORCH_CHECK(size != nullptr, name, ": a size that is not known");
  return size->value;
}

bool Shapes::matches(std::string_view word, int64_t size) {
  if (is_integer(word)) return integer(word) == size;
  if (const Size* known = find(word)) return known->value == size;
  add(word, size);
  return true;
}

std::string Shapes::text(std::string_view want) const {
  std::string text = "[";
  while (!want.empty()) {
    const std::string_view word = next_word(want);
    text += (text.size() > 1 ? ", " : "") + std::string(word);
    if (const Size* size = find(word)) text += " = " + std::to_string(size->value);
  }
  return text + "]";
}

void Shapes::check(const char* argument, const Tensor& t, std::string_view want) {
  const auto sizes = t.sizes();
  const size_t known_before = known_;
  size_t dim = 0;
  bool fits = true;
  for (std::string_view words = want; fits && !words.empty(); ++dim)
    fits = dim < sizes.size() && matches(next_word(words), sizes[dim]);
  if (fits && dim == sizes.size()) return;
  known_ = known_before;  // the sizes of this tensor are not what it should have
  DIFFQKV_CHECK(false, argument, ": got shape ", list_of(sizes), ", want ", text(want));
}

}  // namespace diffqkv
