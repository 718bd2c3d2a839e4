// Norms and the rotary embedding, one token after another.
#pragma once

#include "packed_tokens.h"

namespace UNSPOOL_ISA {

constexpr int64_t ROWS_TOGETHER = 16;  // in one piece

// Four sums at once, because one would wait for itself.
UNSPOOL_INLINE float sum_of_squares(const float* x, int64_t size) {
  F32 acc[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * LANES <= size; i += 4 * LANES)
    for (int j = 0; j < 4; ++j) acc[j] = fma(load(x + i + j * LANES), load(x + i + j * LANES), acc[j]);
  for (; i < size; i += LANES) {
    const F32 part = load_first(x + i, (int)least(LANES, size - i));
    acc[0] = fma(part, part, acc[0]);
  }
  return sum(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
}

UNSPOOL_INLINE void normalize_row(const NormalizeArguments& a, int64_t token) {
  const float* x = a.x + token * a.channels;
  float* y = a.y + token * a.channels;
  const float square = sum_of_squares(x, a.channels) / (float)a.divisor + (float)a.eps;
  const F32 scale = div(broadcast(1.0f), sqrt(broadcast(square)));
  for_lanes(a.channels, [&](int64_t i, int n) UNSPOOL_BODY {
    F32 scaled = mul(load_first(x + i, n), scale);
    if (a.weight) scaled = mul(scaled, load_first(a.weight + i, n));
    store_first(y + i, scaled, n);
  });
}

UNSPOOL_INLINE void rotate_row(const RotaryArguments& a, int64_t token, int64_t head) {
  const int64_t half = a.channels / 2, at = (token * a.heads + head) * a.channels;
  for_lanes(half, [&](int64_t i, int n) UNSPOOL_BODY {
    const F32 first = load_first(a.x + at + i, n), second = load_first(a.x + at + half + i, n);
    const F32 c = load_first(a.cosine + token * half + i, n), s = load_first(a.sine + token * half + i, n);
    store_first(a.y + at + i, fma(first, c, mul(second, mul(s, broadcast(-1.0f)))), n);
    store_first(a.y + at + half + i, fma(second, c, mul(first, s)), n);
  });
}

// Calls row(index) for 0 .. rows - 1.
template <typename Row>
inline void for_rows(int64_t rows, int64_t size, int threads, Row row) {
  run(team_size(rows * size, threads), [&](Team& team, int thread) {
    team.for_each(thread, ceil_div(rows, ROWS_TOGETHER), [&](int64_t piece) {
      const int64_t first = piece * ROWS_TOGETHER, end = least(first + ROWS_TOGETHER, rows);
      for (int64_t i = first; i < end; ++i) row(i);
    });
  });
}

inline const char* normalize(const NormalizeArguments* a, int threads) {
  for_rows(a->tokens, a->channels, threads, [&](int64_t token) { normalize_row(*a, token); });
  return nullptr;
}

inline const char* rotary(const RotaryArguments* a, int threads) {
  for_rows(a->tokens * a->heads, a->channels, threads, [&](int64_t row) { rotate_row(*a, row / a->heads, row % a->heads); });
  return nullptr;
}

}  // namespace UNSPOOL_ISA
