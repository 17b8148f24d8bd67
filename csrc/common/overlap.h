// Whether tensors share memory: an op that writes into one while it reads or writes another that has an element of it races with itself.
// Not for kernels. The answers are exact, and those of pytransformer/ops/overlap.py.
#pragma once

#include <initializer_list>

#include "tensor.h"

namespace pytransformer {

struct Argument {
  Argument(const char* name, const Facts& tensor) : name(name), tensor(&tensor) {}
  Argument(const char* name, const OptionalFacts& tensor) : name(name), tensor(tensor ? &*tensor : nullptr) {}

  const char* name;
  const Facts* tensor;
};

// Refuses what is written if it shares an element with something else that is written or read.
void check_apart(std::initializer_list<Argument> written, std::initializer_list<Argument> read);

// Refuses a tensor that is written and of which two indices have one address, as in an expanded one.
void check_written(const char* name, const Facts& tensor);

}  // namespace pytransformer
