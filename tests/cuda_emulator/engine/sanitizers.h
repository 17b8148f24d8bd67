// What the emulator tells the sanitizers; nothing where a build has none.
#pragma once

#include <cstddef>

#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
extern "C" {
void __asan_loadN(void* address, size_t bytes);
void __asan_storeN(void* address, size_t bytes);
}
#endif

#ifdef EMULATOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, size_t bytes);
void __tsan_write_range(void* address, size_t bytes);
}
#endif

namespace emulator::sanitizers {

// Orders what was done before a release() at an address before what follows an acquire() there.
inline void acquire([[maybe_unused]] void* address) {
#ifdef EMULATOR_TSAN
  __tsan_acquire(address);
#endif
}

inline void release([[maybe_unused]] void* address) {
#ifdef EMULATOR_TSAN
  __tsan_release(address);
#endif
}

// Accesses to a kernel's memory, which no compiler has put a check before.
inline void will_read([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_ASAN
  __asan_loadN(const_cast<void*>(address), bytes);
#endif
#ifdef EMULATOR_TSAN
  __tsan_read_range(const_cast<void*>(address), bytes);
#endif
}

inline void will_write([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_ASAN
  __asan_storeN(address, bytes);
#endif
#ifdef EMULATOR_TSAN
  __tsan_write_range(address, bytes);
#endif
}

inline void poison([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_ASAN
  __asan_poison_memory_region(address, bytes);
#endif
}

inline void unpoison([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_ASAN
  __asan_unpoison_memory_region(address, bytes);
#endif
}

}  // namespace emulator::sanitizers
