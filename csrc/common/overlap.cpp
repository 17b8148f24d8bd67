#include "overlap.h"

#include <cstddef>
#include <numeric>

namespace pytransformer {
namespace {

// An int from `low` to `high`, times the weight.
struct Term {
  int64_t weight, low, high;
};

// Strides that layouts have are settled in a few steps. What is not after these counts as overlapping.
constexpr int kMostSteps = 10000;

int64_t floor_divide(int64_t x, int64_t y) { return x / y - (x % y < 0); }

// Whether a sum of the terms, whose weights ascend, is `total`.
bool has_solution(const std::vector<Term>& terms, size_t count, int64_t total, int& steps) {
  if (++steps > kMostSteps) return true;
  if (count == 0) return total == 0;
  int64_t low = 0, high = 0, divisor = 0;  // of the smaller terms, and the divisor of all
  for (size_t i = 0; i + 1 < count; ++i) {
    low += terms[i].weight * terms[i].low;
    high += terms[i].weight * terms[i].high;
    divisor = std::gcd(divisor, terms[i].weight);
  }
  const Term& term = terms[count - 1];
  if (total % std::gcd(divisor, term.weight) != 0) return false;
  const int64_t first = std::max(term.low, -floor_divide(high - total, term.weight));
  const int64_t last = std::min(term.high, floor_divide(total - low, term.weight));
  for (int64_t number = first; number <= last; ++number) {
    if (has_solution(terms, count - 1, total - number * term.weight, steps)) return true;
  }
  return false;
}

void sort_by_weight(std::vector<Term>& terms) {
  std::sort(terms.begin(), terms.end(), [](const Term& a, const Term& b) { return a.weight < b.weight; });
}

int64_t item_size(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    default:
      return 1;
  }
}

// Bytes from the first element to the end of the last; 0 without elements.
int64_t length_of(const Facts& x) {
  int64_t last = 0;
  for (int64_t i = 0; i < x.dim; ++i) {
    if (x.size(i) == 0) return 0;
    last += (x.size(i) - 1) * x.stride(i);
  }
  return (last + 1) * item_size(x.type);
}

// Whether x and y share a byte, whose first elements are `distance` bytes apart.
bool overlap(const Facts& x, const Facts& y, int64_t distance) {
  std::vector<Term> steps_in_bytes, terms;
  for (const Facts* tensor : {&x, &y}) {
    const int64_t bytes = item_size(tensor->type);
    const auto add = [&](int64_t stride, int64_t size) {
      if (stride > 0 && size > 1) steps_in_bytes.push_back({stride, tensor == &x ? 0 : 1 - size, tensor == &x ? size - 1 : 0});
    };
    for (int64_t i = 0; i < tensor->dim; ++i) add(tensor->stride(i) * bytes, tensor->size(i));
    add(1, bytes);
  }
  sort_by_weight(steps_in_bytes);
  // Multiples of a weight without a gap take in those of its multiples.
  for (const auto& [weight, low, high] : steps_in_bytes) {
    if (!terms.empty()) {
      Term& unit = terms.back();
      const int64_t times = weight / unit.weight;
      if (weight % unit.weight == 0 && times <= unit.high - unit.low + 1) {
        unit.low += times * low;
        unit.high += times * high;
        continue;
      }
    }
    terms.push_back({weight, low, high});
  }
  int steps = 0;
  return has_solution(terms, terms.size(), distance, steps);
}

bool overlaps_itself(const Facts& x) {
  std::vector<Term> dims;
  for (int64_t i = 0; i < x.dim; ++i) {
    if (x.size(i) == 0) return false;
    if (x.size(i) > 1) dims.push_back({x.stride(i), 1 - x.size(i), x.size(i) - 1});
  }
  sort_by_weight(dims);
  int64_t reach = 0;
  for (size_t place = 0; place < dims.size(); ++place) {
    const auto [stride, low, high] = dims[place];
    if (stride == 0) return true;
    // A step in this dimension may lead where steps in the smaller ones lead, too.
    int steps = 0;
    for (int64_t step = 1; step <= std::min(high, reach / stride); ++step) {
      if (has_solution(dims, place, step * stride, steps)) return true;
    }
    reach += high * stride;
  }
  return false;
}

struct Range {
  const char* name;
  const Facts* tensor;
  int64_t begin, length;
};

}  // namespace

void check_apart(std::initializer_list<Argument> written, std::initializer_list<Argument> read) {
  constexpr size_t kMost = 32;
  Range ranges[kMost];
  size_t count = 0, num_written = 0;
  for (const auto* arguments : {&written, &read}) {
    for (const auto& [name, tensor] : *arguments) {
      const int64_t length = tensor == nullptr ? 0 : length_of(*tensor);
      if (length == 0) continue;
      PYT_CHECK(count < kMost, "too many tensors");
      ranges[count++] = {name, tensor, static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor->data())), length};
    }
    if (arguments == &written) num_written = count;
  }
  for (size_t i = 0; i < num_written; ++i) {
    for (size_t j = i + 1; j < count; ++j) {
      const Range &x = ranges[i], &y = ranges[j];
      const int64_t distance = y.begin - x.begin;
      PYT_CHECK(distance >= x.length || -distance >= y.length || !overlap(*x.tensor, *y.tensor, distance), x.name,
                " is written to, so it must not share memory with ", y.name);
    }
  }
}

void check_written(const char* name, const Facts& tensor) {
  PYT_CHECK(!overlaps_itself(tensor), name, " is written to, so it must not be expanded, nor its elements share memory in another way");
}

}  // namespace pytransformer
