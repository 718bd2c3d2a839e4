// Memory for weights and states that are swept at every token: page-aligned, in huge pages where the system has them.
#include <cstdint>
#include <cstdlib>

#include "library.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Null when there is not that much memory. Zeroed on first use.
UNSPOOL_API void* unspool_allocate(int64_t bytes) {
#if defined(__linux__)
  void* memory = mmap(nullptr, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  madvise(memory, (size_t)bytes, MADV_HUGEPAGE);
  return memory;
#else
  return std::calloc(1, (size_t)bytes);
#endif
}

UNSPOOL_API void unspool_release(void* memory, int64_t bytes) {
#if defined(__linux__)
  munmap(memory, (size_t)bytes);
#else
  (void)bytes;
  std::free(memory);
#endif
}
