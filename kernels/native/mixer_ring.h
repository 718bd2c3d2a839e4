// Stage 2 of the token mixer, near: softmax over the rows of a ring, and of a bank behind it.
#pragma once

#include "mixer_shape.h"

namespace UNSPOOL_ISA {

// Scores of ROWS neighbouring rows (one or four), and fetches the values that will be weighed by them.
template <typename T, int QUERIES, int ROWS>
UNSPOOL_INLINE void score_rows(const float* const* q, const T* keys, const T* values, int64_t head_dim, float scale,
                               float* const* scores) {
  F32 acc[ROWS][QUERIES];
  for (int r = 0; r < ROWS; ++r)
    for (int g = 0; g < QUERIES; ++g) acc[r][g] = zero();
  for (int64_t i = 0; i < head_dim; i += LANES) {
    F32 key[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      key[r] = load(keys + r * head_dim + i);
      prefetch(values + r * head_dim + i);
    }
    for (int g = 0; g < QUERIES; ++g) {
      const F32 query = load(q[g] + i);
      for (int r = 0; r < ROWS; ++r) acc[r][g] = fma(key[r], query, acc[r][g]);
    }
  }
  for (int g = 0; g < QUERIES; ++g) {
    if constexpr (ROWS == 4) sum_four(acc[0][g], acc[1][g], acc[2][g], acc[3][g], scores[g]);
    else scores[g][0] = sum(acc[0][g]);
    for (int r = 0; r < ROWS; ++r) scores[g][r] *= scale;
  }
}

// VECTORS vectors of channels of the values of all rows, weighed. Fetches as much of `next` meanwhile.
template <typename T, int QUERIES, int VECTORS>
UNSPOOL_INLINE void weigh_values(const float (*weights)[RING_ROWS + LANES], const T* values, const T* next,
                                 int64_t count, int64_t head_dim, int64_t channel, float* const* out) {
  F32 acc[QUERIES][VECTORS];
  for (int g = 0; g < QUERIES; ++g)
    for (int i = 0; i < VECTORS; ++i) acc[g][i] = zero();
  for (int64_t row = 0; row < count; ++row) {
    F32 v[VECTORS];
    for (int i = 0; i < VECTORS; ++i) {
      v[i] = load(values + row * head_dim + channel + i * LANES);
      prefetch(next + row * head_dim + channel + i * LANES);
    }
    for (int g = 0; g < QUERIES; ++g) {
      const F32 weight = broadcast(weights[g][row]);
      for (int i = 0; i < VECTORS; ++i) acc[g][i] = fma(v[i], weight, acc[g][i]);
    }
  }
  for (int g = 0; g < QUERIES; ++g)
    for (int i = 0; i < VECTORS; ++i) store(out[g] + channel + i * LANES, acc[g][i]);
}

// One query group's softmax over rows [0, count) of a ring piece.
template <typename T, int QUERIES>
inline void attend_rows(const float* const* q, const float* const* sink_q, const T* keys, const T* values,
                        int64_t sink_rows, int64_t count, int64_t head_dim, float* const* out) {
  float scores[MOST_QUERIES][RING_ROWS + LANES];
  const float scale = 1.0f / __builtin_sqrtf((float)head_dim);
  for (int64_t row = 0; row < count;) {
    float* at[QUERIES];
    for (int g = 0; g < QUERIES; ++g) at[g] = scores[g] + row;
    const float* const* query = row < sink_rows ? sink_q : q;
    const int64_t alike = row < sink_rows ? sink_rows : count;
    const T *k = keys + row * head_dim, *v = values + row * head_dim;
    if (row + 4 <= alike) score_rows<T, QUERIES, 4>(query, k, v, head_dim, scale, at), row += 4;
    else score_rows<T, QUERIES, 1>(query, k, v, head_dim, scale, at), row += 1;
  }
  const int64_t padded = round_up(count, LANES);
  for (int g = 0; g < QUERIES; ++g) {
    for (int64_t row = count; row < padded; ++row) scores[g][row] = -__builtin_inff();
    F32 peak = broadcast(-__builtin_inff()), mass = zero();
    for (int64_t row = 0; row < padded; row += LANES) peak = max(peak, load(scores[g] + row));
    const float top = largest(peak);
    for (int64_t row = 0; row < padded; row += LANES) {
      const F32 e = exp(sub(load(scores[g] + row), broadcast(top)));
      store(scores[g] + row, e);
      mass = add(mass, e);
    }
    out[g][head_dim] = sum(mass);
    out[g][head_dim + 1] = top;
  }
  int64_t channel = 0;
  const T* next = keys + count * head_dim;  // the keys of the next piece
  for (; channel + 4 * LANES <= head_dim; channel += 4 * LANES)
    weigh_values<T, QUERIES, 4>(scores, values, next, count, head_dim, channel, out);
  for (; channel < head_dim; channel += LANES)
    weigh_values<T, QUERIES, 1>(scores, values, next, count, head_dim, channel, out);
}

// Stage 2, near: one sequence's tokens over one piece of one head's ring.
template <typename T>
inline void sweep_ring(const Model& m, const Layer& l, const MixerMemory& w, int64_t head, int64_t piece, int64_t slot,
                       int64_t first_token, int64_t tokens, int64_t position) {
  const MixerShape s = mixer_shape(m, l);
  const int64_t d = m.head_dim, pieces = ring_pieces(s.rows), rows = ring_piece_rows(s.rows);
  const int64_t first_row = piece * rows, end_row = least(first_row + rows, s.rows);
  T* keys = (T*)l.near_keys + ((slot * m.kv_heads + head) * s.rows + first_row) * d;
  T* values = (T*)l.near_values + ((slot * m.kv_heads + head) * s.rows + first_row) * d;
  const auto write = [&](int64_t row, const float* k, const float* v) {
    if (row < first_row || row >= end_row) return;
    write_row(keys + (row - first_row) * d, d, k);
    write_row(values + (row - first_row) * d, d, v);
  };
  for (int64_t t = first_token; t < first_token + tokens; ++t, ++position) {
    const int64_t at = t * m.kv_heads + head;
    const float* v = w.qkv + t * w.qkv_stride + (m.heads + m.kv_heads + head) * d;
    write(ring_row(l, position), w.rotated_k + at * d, v);
    if (l.bank && w.bank_row[at] >= 0)
      write(l.sinks + l.window + w.bank_row[at], w.left_k + at * d, w.left_v + at * d);
    const int64_t count = least(position + 1, end_row) - first_row;
    for (int64_t g = 0; g < s.group; g += MOST_QUERIES) {
      const float *q[MOST_QUERIES], *sink_q[MOST_QUERIES];
      float* out[MOST_QUERIES];
      const int64_t queries = least(MOST_QUERIES, s.group - g);
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t query_head = t * m.heads + head * s.group + g + i;
        q[i] = w.rotated_q + query_head * d;
        sink_q[i] = w.sink_q + query_head * d;
        out[i] = w.ring + (query_head * pieces + piece) * (d + 2);
        if (count <= 0) out[i][d] = 0.0f, out[i][d + 1] = -__builtin_inff();
      }
      if (count <= 0) continue;
      const int64_t sink_rows = most(0, least(l.sinks, first_row + count) - first_row);
      switch (queries) {
        case 1: attend_rows<T, 1>(q, sink_q, keys, values, sink_rows, count, d, out); break;
        case 2: attend_rows<T, 2>(q, sink_q, keys, values, sink_rows, count, d, out); break;
        case 3: attend_rows<T, 3>(q, sink_q, keys, values, sink_rows, count, d, out); break;
        default: attend_rows<T, 4>(q, sink_q, keys, values, sink_rows, count, d, out); break;
      }
    }
  }
}

}  // namespace UNSPOOL_ISA
