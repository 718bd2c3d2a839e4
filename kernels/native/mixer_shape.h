// How the token mixer of one layer is cut up, and where what passes between its stages lies.
#pragma once

#include "packed_matrix.h"

namespace UNSPOOL_ISA {

constexpr int RING_ROWS = 160;  // a ring of more rows is swept in pieces, which are merged as shards of one softmax
constexpr int STATE_ROWS = 40;  // and a state of more value rows likewise, with nothing to merge
constexpr int FETCHED_ROWS = 8; // of a state, ahead of those that are updated
constexpr int MOST_QUERIES = 4; // queries that share one pass over the rows

// A ring's or state's rows in equal pieces of whole sixteens or fours.
UNSPOOL_INLINE int64_t ring_piece_rows(int64_t rows) {
  return round_up(ceil_div(rows, ceil_div(rows, RING_ROWS)), LANES);
}
UNSPOOL_INLINE int64_t ring_pieces(int64_t rows) { return ceil_div(rows, ring_piece_rows(rows)); }
UNSPOOL_INLINE int64_t state_piece_rows(int64_t rows) {
  return round_up(ceil_div(rows, ceil_div(rows, STATE_ROWS)), 4);
}
UNSPOOL_INLINE int64_t state_pieces(int64_t rows) { return ceil_div(rows, state_piece_rows(rows)); }

// Where everything of one layer lies in the workspace; all float32 [tokens, ...].
struct MixerMemory {
  float* qkv;          // the projections [(heads + 2 kv_heads) head_dim]
  float* rotated_q;    // [heads, head_dim]
  float* sink_q;       // as the sinks see it
  float* rotated_k;    // [kv_heads, head_dim]
  float* query_features;  // [heads, features]
  float* written_k;    // [state_heads, features]: features of the key that the state is given
  float* written_v;    // [kv_heads, head_dim]
  float* decay;        // [state_heads, features]
  float* ring;         // [heads, ring pieces, head_dim + 2]: unnormalised output, its mass, its largest score
  float* far;          // [heads, value rows]
  // Only where a layer has a bank:
  float* left_k;       // [kv_heads, head_dim]: what left the window, rotated
  float* left_v;
  float* evicted_k;    // what was evicted, as the state reads it; its value is written_v
  int32_t* bank_row;   // [kv_heads]: where in the bank the token that left the window stays, or -1
  const float* cosine;  // [head_dim / 2] per token
  const float* sine;
  const float* sink_cosine;
  const float* sink_sine;
  const float* inverse_cosine;  // of the position that leaves this layer's window
  const float* inverse_sine;
  int64_t qkv_stride;
};

struct MixerShape {
  int64_t heads, kv_heads, group, head_dim, state_heads, features, value_rows, rows;
  bool has_state, has_normaliser;
};

UNSPOOL_INLINE MixerShape mixer_shape(const Model& m, const Layer& l) {
  MixerShape s;
  s.heads = m.heads;
  s.kv_heads = m.kv_heads;
  s.group = m.heads / m.kv_heads;
  s.head_dim = m.head_dim;
  s.state_heads = l.state_per_query_head ? m.heads : m.kv_heads;
  s.features = l.features;
  s.has_state = l.join != JOIN_WINDOW;
  s.has_normaliser = l.join == JOIN_DISJOINT;
  s.value_rows = m.head_dim + (s.has_normaliser ? 1 : 0);
  s.rows = l.sinks + l.window + l.bank;
  return s;
}

UNSPOOL_INLINE int64_t ring_row(const Layer& l, int64_t position) {
  return position < l.sinks ? position : l.sinks + (position - l.sinks) % l.window;
}
// Whether a token of this position gives the state something.
UNSPOOL_INLINE bool writes_state(const Layer& l, int64_t position) {
  return l.join == JOIN_MIXED || position - l.window - l.bank >= l.sinks;
}

template <typename T>
UNSPOOL_INLINE void read_row(const T* row, int64_t size, float* out) {
  for (int64_t i = 0; i < size; i += LANES) store(out + i, load(row + i));
}
template <typename T>
UNSPOOL_INLINE void write_row(T* row, int64_t size, const float* values) {
  for (int64_t i = 0; i < size; i += LANES) store(row + i, load(values + i));
}

}  // namespace UNSPOOL_ISA
