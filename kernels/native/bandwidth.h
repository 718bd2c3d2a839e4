// What memory can do: one streaming read, or one in-place read-modify-write, of a buffer by all threads.
#pragma once

#include "library.h"
#include "simd.h"

namespace UNSPOOL_ISA {

using namespace unspool;

inline const char* sweep(const SweepArguments* a, int threads) {
  constexpr int64_t PIECE = 16384;  // floats: 64 KiB
  run(threads, [&](Team& team, int thread) {
    F32 sums[4] = {zero(), zero(), zero(), zero()};
    team.for_each(thread, a->count / PIECE, [&](int64_t piece) {
      float* p = a->memory + piece * PIECE;
      for (int64_t i = 0; i < PIECE; i += 4 * LANES)
        for (int j = 0; j < 4; ++j) {
          float* at = p + i + j * LANES;
          if (a->update) store(at, fma(load(at), broadcast(0.999f), broadcast(0.001f)));
          else sums[j] = add(sums[j], load(at));
        }
    });
    a->sink[thread] = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  });
  return nullptr;
}

}  // namespace UNSPOOL_ISA
