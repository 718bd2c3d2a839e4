// The causal depthwise convolution over a ring of past tokens, and the token shift.
#pragma once

#include "scans.h"

namespace UNSPOOL_ISA {

constexpr int64_t CONV_CHANNELS = 256;  // in one piece

UNSPOOL_INLINE int64_t next_row(int64_t row, int64_t depth) { return row + 1 == depth ? 0 : row + 1; }

template <typename T>
inline void convolve(const ShortConvArguments& a, const Span& span, int64_t first, int64_t end) {
  T* ring = (T*)a.state + span.slot * a.state_stride + first;
  int64_t oldest = a.cursor[span.slot * a.cursor_stride];
  const float* taps = a.taps + first;
  for (int64_t t = span.first; t < span.end; ++t, oldest = next_row(oldest, a.depth)) {
    const int64_t at = t * a.channels + first;
    for_lanes(end - first, [&](int64_t i, int n) UNSPOOL_BODY {
      const F32 x = load_first(a.x + at + i, n);
      F32 y = a.bias ? load_first(a.bias + first + i, n) : zero();
      int64_t row = oldest;
      for (int64_t tap = 0; tap < a.depth; ++tap, row = next_row(row, a.depth))
        y = fma(load_first(taps + tap * a.channels + i, n), load_first(ring + row * a.channels + i, n), y);
      y = fma(load_first(taps + a.depth * a.channels + i, n), x, y);
      store_first(ring + oldest * a.channels + i, x, n);
      store_first(a.y + at + i, a.silu ? silu(y) : y, n);
    });
  }
}

inline const char* short_conv(const ShortConvArguments* arguments, int threads) {
  const ShortConvArguments& a = *arguments;
  with_state(a.state, a.state_format, [&](auto* state) {
    using T = std::remove_pointer_t<decltype(state)>;
    for_channel_blocks(
        a.sequences, a.channels, CONV_CHANNELS, num_tokens(a.sequences) * a.channels * a.depth, threads,
        [&](const Span& span, int64_t first, int64_t end) { convolve<T>(a, span, first, end); },
        [&](int64_t t) { fill_zeros(a.y + t * a.channels, a.channels); });
  });
  for (int64_t s = 0; s < a.sequences.count; ++s) {  // only now: every piece has read its own
    const Span span = span_of(a.sequences, s);
    if (span.is_padding()) continue;
    int32_t* cursor = a.cursor + span.slot * a.cursor_stride;
    *cursor = (int32_t)((*cursor + span.end - span.first) % a.depth);
  }
  return nullptr;
}

template <typename T>
inline void shift(const TokenShiftArguments& a, const Span& span, int64_t first, int64_t end) {
  T* state = (T*)a.state + span.slot * a.state_stride;
  for (int64_t t = span.first; t < span.end; ++t)
    for_lanes(end - first, [&](int64_t i, int n) UNSPOOL_BODY {
      const int64_t at = t * a.channels + first + i;
      store_first(a.y + at, load_first(state + first + i, n), n);
      store_first(state + first + i, load_first(a.x + at, n), n);
    });
}

inline const char* token_shift(const TokenShiftArguments* arguments, int threads) {
  const TokenShiftArguments& a = *arguments;
  with_state(a.state, a.state_format, [&](auto* state) {
    using T = std::remove_pointer_t<decltype(state)>;
    for_channel_blocks(
        a.sequences, a.channels, CONV_CHANNELS, num_tokens(a.sequences) * a.channels, threads,
        [&](const Span& span, int64_t first, int64_t end) { shift<T>(a, span, first, end); },
        [&](int64_t t) { fill_zeros(a.y + t * a.channels, a.channels); });
  });
  return nullptr;
}

}  // namespace UNSPOOL_ISA
