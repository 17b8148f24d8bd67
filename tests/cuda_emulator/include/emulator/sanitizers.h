// What the emulator tells the sanitizers; nothing where a build has none.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#define EMULATOR_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __SANITIZE_THREAD__
#define EMULATOR_TSAN 1
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

// The emulator's own bookkeeping is shared by all fibers on purpose: ThreadSanitizer must not see it.
#define EMULATOR_RUNTIME __attribute__((no_sanitize("thread")))

namespace emulator::sanitizers {

// Orders what was done before a release() at an address before what follows an acquire() there.
EMULATOR_RUNTIME inline void acquire([[maybe_unused]] void* address) {
#ifdef EMULATOR_TSAN
  __tsan_acquire(address);
#endif
}

EMULATOR_RUNTIME inline void release([[maybe_unused]] void* address) {
#ifdef EMULATOR_TSAN
  __tsan_release(address);
#endif
}

// Accesses that g++ folds away from ThreadSanitizer's sight (memcpy and memset of a known size).
EMULATOR_RUNTIME inline void will_read([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_TSAN
  __tsan_read_range(const_cast<void*>(address), bytes);
#endif
}

EMULATOR_RUNTIME inline void will_write([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
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
