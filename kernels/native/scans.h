// Scans over one number, or a few, per channel: h = a h + x, RWKV-4's stabilised quotient of two of them, and softmax
// with a fixed query as a recurrence. A piece is some channels, or one head, of one sequence.
#pragma once

#include <type_traits>

#include "packed_tokens.h"

namespace UNSPOOL_ISA {

constexpr int64_t SCAN_NUMBERS = 1024;      // of the state in one piece
constexpr int64_t EXPONENTIAL_CHANNELS = 128;

// Lanes (x, y, x, y, ...).
UNSPOOL_INLINE F32 alternating(float x, float y) {
  const float lanes[LANES] = {x, y, x, y, x, y, x, y, x, y, x, y, x, y, x, y};
  return load(lanes);
}

template <bool COMPLEX>
UNSPOOL_INLINE F32 advance(F32 h, F32 a, F32 x) {
  if constexpr (!COMPLEX) return fma(a, h, x);
  const F32 crossed = mul(second_of_pairs(a), swap_pairs(h));
  return fma(first_of_pairs(a), h, fma(crossed, alternating(-1.0f, 1.0f), x));
}

// CHANNELS channels of one token: y[c] = sum of read h.
template <typename T, bool COMPLEX, int CHANNELS>
UNSPOOL_INLINE void read_channels(const DiagonalScanArguments& a, T* h, const float* decay, const float* x,
                                  const float* read, float* y) {
  F32 acc[CHANNELS];
  for (int c = 0; c < CHANNELS; ++c) acc[c] = zero();
  for_lanes(a.features, [&](int64_t i, int n) UNSPOOL_BODY {
    for (int c = 0; c < CHANNELS; ++c) {
      const int64_t at = c * a.features + i;
      const F32 next = advance<COMPLEX>(load_first(h + at, n), load_first(decay + at, n), load_first(x + at, n));
      const F32 weight = load_first(read + c * a.read_channel + i, n);
      store_first(h + at, next, n);
      acc[c] = COMPLEX ? fma(mul(weight, next), alternating(2.0f, -2.0f), acc[c]) : fma(weight, next, acc[c]);
    }
  });
  sums<CHANNELS>(acc, y);
}

template <typename T, bool COMPLEX>
inline void scan_channels(const DiagonalScanArguments& a, const Span& span, int64_t first, int64_t end) {
  T* state = (T*)a.state + span.slot * a.state_stride;
  for (int64_t t = span.first; t < span.end; ++t) {
    const float* decay = a.decay + t * a.decay_stride;
    const float* x = a.x + t * a.channels * a.features;
    if (!a.read) {
      const int64_t from = first * a.features;
      float* y = a.y + t * a.channels * a.features + from;
      for_lanes((end - first) * a.features, [&](int64_t i, int n) UNSPOOL_BODY {
        T* at = state + from + i;
        const F32 h = advance<COMPLEX>(load_first(at, n), load_first(decay + from + i, n), load_first(x + from + i, n));
        store_first(at, h, n);
        store_first(y + i, h, n);
      });
      continue;
    }
    const float* read = a.read + t * a.read_token;
    float* y = a.y + t * a.channels;
    int64_t c = first;
    for (; c + 4 <= end; c += 4) {
      const int64_t at = c * a.features;
      read_channels<T, COMPLEX, 4>(a, state + at, decay + at, x + at, read + c * a.read_channel, y + c);
    }
    for (; c < end; ++c) {
      const int64_t at = c * a.features;
      read_channels<T, COMPLEX, 1>(a, state + at, decay + at, x + at, read + c * a.read_channel, y + c);
    }
  }
}

// Calls piece(span, first, end) for blocks of the channels of every sequence, zeros(token) for those of padding ones.
template <typename Piece, typename Zeros>
inline void for_channel_blocks(const Sequences& sequences, int64_t channels, int64_t block, int64_t work, int threads,
                               Piece piece_of, Zeros zeros) {
  const int64_t blocks = ceil_div(channels, block);
  run(team_size(work, threads), [&](Team& team, int thread) {
    team.for_each(thread, sequences.count * blocks, [&](int64_t piece) {
      const Span span = span_of(sequences, piece / blocks);
      const int64_t first = piece % blocks * block;
      if (!span.is_padding()) return piece_of(span, first, least(first + block, channels));
      if (first == 0)
        for (int64_t t = span.first; t < span.end; ++t) zeros(t);
    });
  });
}

inline const char* diagonal_scan(const DiagonalScanArguments* arguments, int threads) {
  const DiagonalScanArguments& a = *arguments;
  const int64_t numbers = a.channels * a.features, outputs = a.read ? a.channels : numbers;
  with_state(a.state, a.state_format, [&](auto* state) {
    using T = std::remove_pointer_t<decltype(state)>;
    for_channel_blocks(
        a.sequences, a.channels, most(SCAN_NUMBERS / a.features, 1), num_tokens(a.sequences) * numbers, threads,
        [&](const Span& span, int64_t first, int64_t end) {
          if (a.complex) scan_channels<T, true>(a, span, first, end);
          else scan_channels<T, false>(a, span, first, end);
        },
        [&](int64_t t) { fill_zeros(a.y + t * outputs, outputs); });
  });
  return nullptr;
}

// Some channels of RWKV-4's state, one array for each of its three numbers.
struct ExponentialState {
  float numerator[EXPONENTIAL_CHANNELS];
  float denominator[EXPONENTIAL_CHANNELS];
  float maximum[EXPONENTIAL_CHANNELS];
};

template <typename T>
inline void read_triples(const T* triples, int64_t channels, ExponentialState& s) {
  float lanes[3 * EXPONENTIAL_CHANNELS];
  for_lanes(3 * channels, [&](int64_t i, int n) UNSPOOL_BODY { store(lanes + i, load_first(triples + i, n)); });
  for (int64_t c = 0; c < round_up(channels, LANES); ++c) {
    s.numerator[c] = c < channels ? lanes[3 * c] : 0.0f;
    s.denominator[c] = c < channels ? lanes[3 * c + 1] : 0.0f;
    s.maximum[c] = c < channels ? lanes[3 * c + 2] : 0.0f;
  }
}
template <typename T>
inline void write_triples(T* triples, int64_t channels, const ExponentialState& s) {
  float lanes[3 * EXPONENTIAL_CHANNELS];
  for (int64_t c = 0; c < channels; ++c) {
    lanes[3 * c] = s.numerator[c];
    lanes[3 * c + 1] = s.denominator[c];
    lanes[3 * c + 2] = s.maximum[c];
  }
  for_lanes(3 * channels, [&](int64_t i, int n) UNSPOOL_BODY { store_first(triples + i, load(lanes + i), n); });
}

template <typename T>
inline void scan_exponentials(const ExponentialScanArguments& a, const Span& span, int64_t first, int64_t end) {
  T* triples = (T*)a.state + span.slot * a.state_stride + 3 * first;
  ExponentialState s;
  read_triples(triples, end - first, s);
  for (int64_t t = span.first; t < span.end; ++t)
    for_vectors(end - first, [&](int64_t i, int n) UNSPOOL_BODY {
      const int64_t at = t * a.channels + first + i;
      const F32 k = load_first(a.k + at, n), v = load_first(a.v + at, n);
      const F32 top = load(s.numerator + i), bottom = load(s.denominator + i), past = load(s.maximum + i);
      const F32 boosted = add(k, load_first(a.bonus + first + i, n));
      const F32 shift = shift_of(max(past, boosted));
      const F32 old = exp(sub(past, shift)), own = exp(sub(boosted, shift));
      store_first(a.y + at, div(fma(old, top, mul(own, v)), fma(old, bottom, own)), n);
      const F32 faded = add(past, load_first(a.decay + first + i, n));
      const F32 maximum = stored_maximum(triples, faded, k, bottom), scale = shift_of(maximum);
      const F32 kept = exp(sub(faded, scale)), entering = exp(sub(k, scale));
      store(s.numerator + i, stored(triples, fma(kept, top, mul(entering, v))));
      store(s.denominator + i, stored(triples, fma(kept, bottom, entering)));
      store(s.maximum + i, maximum);
    });
  write_triples(triples, end - first, s);
}

inline const char* exponential_scan(const ExponentialScanArguments* arguments, int threads) {
  const ExponentialScanArguments& a = *arguments;
  with_state(a.state, a.state_format, [&](auto* state) {
    using T = std::remove_pointer_t<decltype(state)>;
    for_channel_blocks(
        a.sequences, a.channels, EXPONENTIAL_CHANNELS, 16 * num_tokens(a.sequences) * a.channels, threads,
        [&](const Span& span, int64_t first, int64_t end) { scan_exponentials<T>(a, span, first, end); },
        [&](int64_t t) { fill_zeros(a.y + t * a.channels, a.channels); });
  });
  return nullptr;
}

template <typename T>
inline void scan_softmax(const SoftmaxScanArguments& a, const Span& span, int64_t head) {
  T* state = (T*)a.state + span.slot * a.state_stride + head * (a.values + 2);
  float maximum = load_one(state), mass = load_one(state + 1);
  for (int64_t t = span.first; t < span.end; ++t) {
    const int64_t at = t * a.heads + head;
    const float score = a.scores[at], *v = a.v + at * a.values;
    const F32 past = broadcast(maximum), next = stored_maximum(state, past, broadcast(score), broadcast(mass)), shift = shift_of(next);
    const F32 kept = exp(sub(past, shift)), entering = exp(sub(broadcast(score), shift));
    const F32 total = stored(state, fma(kept, broadcast(mass), entering));
    maximum = first_lane(next);
    mass = first_lane(total);
    const bool empty = mass == 0.0f;
    const F32 share = empty ? zero() : div(broadcast(1.0f), total);
    for_lanes(a.values, [&](int64_t i, int n) UNSPOOL_BODY {
      const F32 w = fma(kept, load_first(state + 2 + i, n), mul(entering, load_first(v + i, n)));
      store_first(state + 2 + i, w, n);
      store_first(a.o + at * a.values + i, mul(stored(state, w), share), n);
    });
    a.log_mass[at] = empty ? -__builtin_inff() : maximum + unspool::logarithm(mass);
  }
  if (span.first == span.end) return;
  store_one(state, maximum);
  store_one(state + 1, mass);
}

inline const char* softmax_scan(const SoftmaxScanArguments* arguments, int threads) {
  const SoftmaxScanArguments& a = *arguments;
  with_state(a.state, a.state_format, [&](auto* state) {
    using T = std::remove_pointer_t<decltype(state)>;
    for_channel_blocks(
        a.sequences, a.heads, 1, num_tokens(a.sequences) * a.heads * (a.values + 64), threads,
        [&](const Span& span, int64_t head, int64_t) { scan_softmax<T>(a, span, head); },
        [&](int64_t t) {
          fill_zeros(a.o + t * a.heads * a.values, a.heads * a.values);
          fill_zeros(a.log_mass + t * a.heads, a.heads);
        });
  });
  return nullptr;
}

}  // namespace UNSPOOL_ISA
