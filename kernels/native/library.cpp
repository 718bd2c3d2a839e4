// The library's plain C interface, and the choice of the instruction set.
#include "library.h"

#include <cmath>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace unspool {
namespace {

bool runs_here(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!std::strcmp(name, "avx2")) return avx2;
  if (!std::strcmp(name, "avx512"))
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
#endif
#if defined(__aarch64__)
  if (!std::strcmp(name, "neon")) return true;
#endif
  return !std::strcmp(name, "scalar");
}

#ifdef UNSPOOL_HAS_NEON
bool has_dot_products() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
  int found = 0;
  size_t size = sizeof(found);
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) == 0 && found;
#else
  return false;
#endif
}
#endif

// Best first.
struct InstructionSet { const char* name; const Functions* (*functions)(); };
const InstructionSet INSTRUCTION_SETS[] = {
#ifdef UNSPOOL_HAS_AVX512
    {"avx512", avx512_functions},
#endif
#ifdef UNSPOOL_HAS_AVX2
    {"avx2", avx2_functions},
#endif
#ifdef UNSPOOL_HAS_NEON
    {"neon", has_dot_products() ? neon_dotprod_functions : neon_functions},
#endif
    {"scalar", scalar_functions},
};

const InstructionSet* best() {
  for (const InstructionSet& set : INSTRUCTION_SETS)
    if (runs_here(set.name)) return &set;
  return nullptr;
}

const InstructionSet* chosen = best();

}  // namespace

float logarithm(float x) { return (float)std::log((double)x); }

}  // namespace unspool

// The instruction set in use.
UNSPOOL_API const char* unspool_instruction_set() { return unspool::chosen->name; }

// The i-th instruction set that this library was built for, best first, or null; `runs` tells whether this machine has it.
UNSPOOL_API const char* unspool_built_for(int i, int* runs) {
  constexpr int count = sizeof(unspool::INSTRUCTION_SETS) / sizeof(unspool::INSTRUCTION_SETS[0]);
  if (i < 0 || i >= count) return nullptr;
  *runs = unspool::runs_here(unspool::INSTRUCTION_SETS[i].name);
  return unspool::INSTRUCTION_SETS[i].name;
}

// Uses another instruction set from the next call on; false if this machine or this build has it not.
UNSPOOL_API int unspool_choose(const char* name) {
  for (const unspool::InstructionSet& set : unspool::INSTRUCTION_SETS)
    if (!std::strcmp(set.name, name) && unspool::runs_here(name)) {
      unspool::chosen = &set;
      return 1;
    }
  return 0;
}

// Each function, and the size of its arguments, by which a caller can tell that its structures are these.
#define UNSPOOL_FUNCTION(name, Arguments)                                                    \
  UNSPOOL_API const char* unspool_##name(const unspool::Arguments* arguments, int threads) { \
    return unspool::chosen->functions()->name(arguments, threads);                           \
  }                                                                                          \
  UNSPOOL_API int64_t unspool_size_of_##name() { return (int64_t)sizeof(unspool::Arguments); }
#include "functions.inc"
#undef UNSPOOL_FUNCTION
