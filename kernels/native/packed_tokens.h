// What the kernel families share: the tokens of a sequence, vectors of any length, and states of either format.
#pragma once

#include "library.h"
#include "packed_matrix.h"
#include "simd.h"

namespace UNSPOOL_ISA {

using namespace unspool;

constexpr int64_t SMALL_WORK = 1 << 15;  // numbers to visit that one thread has done before a second one has woken up

UNSPOOL_INLINE int team_size(int64_t work, int threads) { return work < SMALL_WORK ? 1 : threads; }

struct Span {
  int64_t slot, first, end;
  bool is_padding() const { return slot < 0; }
};

UNSPOOL_INLINE Span span_of(const Sequences& sequences, int64_t s) {
  return {sequences.slots[s], sequences.starts[s], sequences.starts[s + 1]};
}
UNSPOOL_INLINE int64_t num_tokens(const Sequences& sequences) { return sequences.starts[sequences.count]; }

// Lambdas that hold vectors must not become calls, which would put these into memory.
#define UNSPOOL_BODY __attribute__((always_inline))

// body(i, n) for n <= 16 neighbouring numbers of `size` each time. for_lanes writes the body out once for whole vectors
// and once for the last one; for_vectors suits longer bodies.
template <typename Body>
UNSPOOL_INLINE void for_lanes(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) body(i, LANES);
  if (i < size) body(i, (int)(size - i));
}
template <typename Body>
UNSPOOL_INLINE void for_vectors(int64_t size, Body body) {
  for (int64_t i = 0; i < size; i += LANES) body(i, (int)least(LANES, size - i));
}

// A value as a state of the pointer's type keeps it.
UNSPOOL_INLINE F32 stored(const float*, F32 x) { return x; }
UNSPOOL_INLINE F32 stored(const Half*, F32 x) { return round_to_half(x); }

template <int COUNT>
UNSPOOL_INLINE void sums(const F32* x, float* out) {
  static_assert(COUNT == 1 || COUNT == 4, "");
  if constexpr (COUNT == 4) sum_four(x[0], x[1], x[2], x[3], out);
  else out[0] = sum(x[0]);
}

UNSPOOL_INLINE const float* at_offset(const float* absent_or_there, int64_t offset) {
  return absent_or_there ? absent_or_there + offset : nullptr;
}
UNSPOOL_INLINE void fill_zeros(float* out, int64_t count) { std::memset(out, 0, (size_t)count * sizeof(float)); }

// The maximum of logarithms by which a state's sums are scaled, as the state keeps it. A float16 maximum can be too coarse
// to follow a slow decay: then the sums fade in its stead, and once `mass` is small it gives way by a step it can take.
UNSPOOL_INLINE F32 stored_maximum(const float*, F32 faded, F32 entering, F32) { return max(faded, entering); }
UNSPOOL_INLINE F32 stored_maximum(const Half*, F32 faded, F32 entering, F32 mass) {
  const F32 lower = where_less(mass, broadcast(0.0625f), sub(faded, broadcast(2.0f)), faded);
  return round_to_half(max(lower, entering));
}

// What to take from logarithms before exp: the maximum, or 0 where it is -inf because nothing came in yet.
UNSPOOL_INLINE F32 shift_of(F32 maximum) { return where_less(maximum, broadcast(-3.0e38f), zero(), maximum); }

// Calls body(T*) with the state's own type.
template <typename Body>
UNSPOOL_INLINE void with_state(void* state, int64_t format, Body body) {
  if (format == FLOAT16) body((Half*)state);
  else body((float*)state);
}

}  // namespace UNSPOOL_ISA
