// Stage 2 of the token mixer, far: the matrix state that holds what left the window.
#pragma once

#include "mixer_shape.h"

namespace UNSPOOL_ISA {

// Folds one token into ROWS rows of the state and reads them with one or more queries.
template <typename T, int QUERIES, int ROWS>
UNSPOOL_INLINE void update_rows(T* state, const float* v, const float* k, const float* decay, const float* const* q,
                                int64_t features, float* const* out) {
  F32 acc[ROWS][QUERIES], value[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    value[r] = broadcast(v[r]);
    for (int g = 0; g < QUERIES; ++g) acc[r][g] = zero();
  }
  for (int64_t i = 0; i < features; i += LANES) {
    const F32 key = load(k + i), keep = load(decay + i);
    F32 part[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      T* at = state + r * features + i;
      prefetch(at + FETCHED_ROWS * features);
      part[r] = fma(value[r], key, mul(load(at), keep));
      store(at, part[r]);
    }
    for (int g = 0; g < QUERIES; ++g) {
      const F32 query = load(q[g] + i);
      for (int r = 0; r < ROWS; ++r) acc[r][g] = fma(part[r], query, acc[r][g]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int g = 0; g < QUERIES; ++g) out[g][r] = sum(acc[r][g]);
}

template <typename T, int QUERIES>
inline void update_state(T* state, const float* v, const float* k, const float* decay, const float* const* q,
                         int64_t features, int64_t rows, float* const* out) {
  float* at[MOST_QUERIES];
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    for (int g = 0; g < QUERIES; ++g) at[g] = out[g] + row;
    update_rows<T, QUERIES, 4>(state + row * features, v + row, k, decay, q, features, at);
  }
  for (; row < rows; ++row) {
    for (int g = 0; g < QUERIES; ++g) at[g] = out[g] + row;
    update_rows<T, QUERIES, 1>(state + row * features, v + row, k, decay, q, features, at);
  }
}

// Reads without writing: for the queries beyond the first few of a head.
template <typename T>
inline void read_state(const T* state, const float* q, int64_t features, int64_t rows, float* out) {
  for (int64_t row = 0; row < rows; ++row) {
    F32 acc = zero();
    for (int64_t i = 0; i < features; i += LANES) acc = fma(load(state + row * features + i), load(q + i), acc);
    out[row] = sum(acc);
  }
}

// Stage 2, far: one sequence's tokens over some value rows of one head's state.
template <typename T>
inline void sweep_state(const Model& m, const Layer& l, const MixerMemory& w, int64_t head, int64_t piece, int64_t slot,
                        int64_t first_token, int64_t tokens, int64_t position) {
  const MixerShape s = mixer_shape(m, l);
  const int64_t d = m.head_dim, piece_rows = state_piece_rows(s.value_rows);
  const int64_t first_row = piece * piece_rows, rows = least(piece_rows, s.value_rows - first_row);
  const int64_t queries = m.heads / s.state_heads, kv_head = head * m.kv_heads / s.state_heads;
  T* state = (T*)l.far + ((slot * s.state_heads + head) * s.value_rows + first_row) * l.features;
  for (int64_t t = first_token; t < first_token + tokens; ++t, ++position) {
    if (!writes_state(l, position)) continue;
    float v[STATE_ROWS + 4];
    for (int64_t r = 0; r < rows; ++r)
      v[r] = first_row + r < d ? w.written_v[(t * m.kv_heads + kv_head) * d + first_row + r] : 1.0f;
    const float* k = w.written_k + (t * s.state_heads + head) * l.features;
    const float* decay = w.decay + (t * s.state_heads + head) * l.features;
    const float* q[MOST_QUERIES];
    float* out[MOST_QUERIES];
    const int64_t together = least(MOST_QUERIES, queries), first_query = t * m.heads + head * queries;
    for (int64_t g = 0; g < together; ++g) {
      q[g] = w.query_features + (first_query + g) * l.features;
      out[g] = w.far + (first_query + g) * s.value_rows + first_row;
    }
    switch (together) {
      case 1: update_state<T, 1>(state, v, k, decay, q, l.features, rows, out); break;
      case 2: update_state<T, 2>(state, v, k, decay, q, l.features, rows, out); break;
      case 3: update_state<T, 3>(state, v, k, decay, q, l.features, rows, out); break;
      default: update_state<T, 4>(state, v, k, decay, q, l.features, rows, out); break;
    }
    for (int64_t g = together; g < queries; ++g)
      read_state(state, w.query_features + (first_query + g) * l.features, l.features, rows,
                 w.far + (first_query + g) * s.value_rows + first_row);
  }
}

}  // namespace UNSPOOL_ISA
