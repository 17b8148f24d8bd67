// A kernel's launch.
#pragma once

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace emulator {

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments&&... arguments) {
  if (options().stub_launches) return;
  if (shared_bytes > allowances().get(reinterpret_cast<const void*>(kernel), current_device())) {
    throw Error(std::string(name) + ": " + std::to_string(shared_bytes) + " bytes of dynamic shared memory were not asked for");
  }
  std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  auto body = [&] { std::apply(kernel, values); };
  run_grid(name, grid, block, shared_bytes, &body, [](void* call) { (*static_cast<decltype(body)*>(call))(); });
}

}  // namespace emulator
