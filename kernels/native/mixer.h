// The token mixer of one layer in three stages. Stage 1 prepares each token's heads: norms, rotations, features, gates,
// and the token that leaves the window. Stage 2 sweeps the state: a piece is some rows of one head's ring, or some value
// rows of its matrix state, for all tokens of one sequence in order, so pieces never touch each other's memory and a
// chunk does to it exactly what single steps do. Stage 3 merges a token's pieces. See docs/layer.md for the formulas.
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
  s.rows = l.sinks + l.window;
  return s;
}

UNSPOOL_INLINE int64_t ring_row(const Layer& l, int64_t position) {
  return position < l.sinks ? position : l.sinks + (position - l.sinks) % l.window;
}
// Whether a token of this position gives the state something.
UNSPOOL_INLINE bool writes_state(const Layer& l, int64_t position) {
  return l.join == JOIN_MIXED || position - l.window >= l.sinks;
}

UNSPOOL_INLINE void rotate(const float* x, const float* cosine, const float* sine, int64_t head_dim, float* y) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; i += LANES) {
    const int n = (int)least(LANES, half - i);
    const F32 a = load_first(x + i, n), b = load_first(x + half + i, n);
    const F32 c = load_first(cosine + i, n), s = load_first(sine + i, n);
    store_first(y + i, fma(a, c, mul(b, mul(s, broadcast(-1.0f)))), n);
    store_first(y + half + i, fma(b, c, mul(a, s)), n);
  }
}

UNSPOOL_INLINE void rms_norm(const float* x, const float* weight, int64_t size, float eps, float* y) {
  F32 squares = zero();
  for (int64_t i = 0; i < size; i += LANES) squares = fma(load(x + i), load(x + i), squares);
  const float mean = sum(squares) / (float)size;
  const F32 scale = div(broadcast(1.0f), sqrt(broadcast(mean + eps)));
  for (int64_t i = 0; i < size; i += LANES) store(y + i, mul(load(weight + i), mul(load(x + i), scale)));
}

UNSPOOL_INLINE float dot(const float* a, const float* b, int64_t size) {
  F32 acc = zero();
  for (int64_t i = 0; i < size; i += LANES) acc = fma(load(a + i), load(b + i), acc);
  return sum(acc);
}

// softmax(sign * x), and not below `floor`.
UNSPOOL_INLINE void softmax(const float* x, float sign, int64_t size, float floor, float* y) {
  F32 peak = broadcast(-__builtin_inff());
  for (int64_t i = 0; i < size; i += LANES) peak = max(peak, mul(load(x + i), broadcast(sign)));
  const F32 shift = broadcast(largest(peak));
  F32 mass = zero();
  for (int64_t i = 0; i < size; i += LANES) {
    const F32 e = exp(sub(mul(load(x + i), broadcast(sign)), shift));
    store(y + i, e);
    mass = add(mass, e);
  }
  const F32 share = div(broadcast(1.0f), broadcast(sum(mass)));
  for (int64_t i = 0; i < size; i += LANES) store(y + i, max(mul(load(y + i), share), broadcast(floor)));
}

UNSPOOL_INLINE float log_sigmoid(float x) {
  const float e = first_lane(exp(negative_abs(broadcast(x))));
  return (x < 0.0f ? x : 0.0f) - unspool::logarithm(1.0f + e);
}

constexpr int64_t MOST_CHANNELS = 512;  // of one head

// x [head_dim] through one head's map and feature function, to y [features].
inline void features(const Model& m, const Layer& l, const Matrix& map, int64_t head, const float* x, float* y) {
  const int64_t channels = m.head_dim;
  switch (l.feature_map) {
    case FEATURES_HEDGEHOG: {
      const int64_t blocks = ceil_div(channels, BLOCK_ROWS);
      float projected[MOST_CHANNELS + BLOCK_ROWS];
      Rows rows{};
      rows.values = const_cast<float*>(x);
      rows.width = channels;
      for (int64_t b = 0; b < blocks; ++b)
        block_product(map, head * blocks + b, rows, 0, 1, projected + b * BLOCK_ROWS, 0);
      softmax(projected, 1.0f, channels, 1e-12f, y);
      softmax(projected, -1.0f, channels, 1e-12f, y + channels);
      return;
    }
    case FEATURES_SOFTMAX: return softmax(x, 1.0f, channels, 0.0f, y);
    case FEATURES_ELU:
      for (int64_t i = 0; i < channels; i += LANES) {
        const F32 value = load(x + i);
        store(y + i, where_negative(value, exp(value), add(value, broadcast(1.0f))));
      }
      return;
    default: std::memcpy(y, x, channels * sizeof(float)); return;
  }
}

// The decay of one state head [features], from the token's own key.
inline void decays(const Model& m, const Layer& l, int64_t head, const float* k, float* decay) {
  const int64_t channels = m.head_dim;
  if (l.gate == GATE_LIGER || l.gate == GATE_HGRN2) {
    const float scale = l.gate == GATE_LIGER ? (float)(1.0 / l.gate_normalizer) : 1.0f;
    for (int64_t i = 0; i < l.features; ++i)  // both halves of a hedgehog map have the channel's gate
      decay[i] = first_lane(exp(broadcast(log_sigmoid(k[i % channels]) * scale)));
    return;
  }
  float log_decay = 0.0f;
  if (l.gate == GATE_FIXED) log_decay = log_sigmoid(l.gate_bias[head]);
  if (l.gate == GATE_SCALAR) log_decay = log_sigmoid(dot(k, l.gate_weight + head * channels, channels) + l.gate_bias[head]);
  const F32 value = exp(broadcast(log_decay));
  for (int64_t i = 0; i < l.features; i += LANES) store(decay + i, value);
}

template <typename T>
UNSPOOL_INLINE void read_row(const T* row, int64_t size, float* out) {
  for (int64_t i = 0; i < size; i += LANES) store(out + i, load(row + i));
}
template <typename T>
UNSPOOL_INLINE void write_row(T* row, int64_t size, const float* values) {
  for (int64_t i = 0; i < size; i += LANES) store(row + i, load(values + i));
}

// Stage 1 for one token and one query head.
inline void prepare_query(const Model& m, const Layer& l, const MixerMemory& w, int64_t token, int64_t head,
                          int64_t position) {
  const int64_t d = m.head_dim, at = (token * m.heads + head) * d;
  float* q = w.qkv + token * w.qkv_stride + head * d;
  if (l.q_norm) rms_norm(q, l.q_norm, d, (float)m.norm_eps, q);
  const int64_t half = d / 2;
  rotate(q, w.cosine + token * half, w.sine + token * half, d, w.rotated_q + at);
  rotate(q, w.sink_cosine + token * half, w.sink_sine + token * half, d, w.sink_q + at);
  if (l.join != JOIN_WINDOW && writes_state(l, position)) {
    const float* source = l.state_rope ? w.rotated_q + at : q;
    features(m, l, l.query_map, head, source, w.query_features + (token * m.heads + head) * l.features);
  }
}

// Stage 1 for one token and one key-value head: among the rest, takes what leaves the window out of the ring. That no
// sequence brings more tokens than the window holds is why it is still there.
template <typename T>
inline void prepare_key(const Model& m, const Layer& l, const MixerMemory& w, int64_t token, int64_t head,
                        int64_t position, int64_t slot) {
  const MixerShape s = mixer_shape(m, l);
  const int64_t d = m.head_dim, half = d / 2, at = (token * m.kv_heads + head) * d;
  float* k = w.qkv + token * w.qkv_stride + (m.heads + head) * d;
  const float* v = w.qkv + token * w.qkv_stride + (m.heads + m.kv_heads + head) * d;
  if (l.k_norm) rms_norm(k, l.k_norm, d, (float)m.norm_eps, k);
  rotate(k, w.cosine + token * half, w.sine + token * half, d, w.rotated_k + at);
  if (!s.has_state || !writes_state(l, position)) return;
  float key[MOST_CHANNELS];
  if (l.join == JOIN_DISJOINT) {
    const int64_t row = ((slot * m.kv_heads + head) * s.rows + ring_row(l, position)) * d;
    read_row((const T*)l.near_keys + row, d, key);
    if (!l.state_rope) rotate(key, w.inverse_cosine + token * half, w.inverse_sine + token * half, d, key);
    read_row((const T*)l.near_values + row, d, w.written_v + at);
  } else {
    std::memcpy(key, l.state_rope ? w.rotated_k + at : k, d * sizeof(float));
    std::memcpy(w.written_v + at, v, d * sizeof(float));
  }
  const int64_t per_head = s.state_heads / m.kv_heads;
  for (int64_t i = 0; i < per_head; ++i) {
    const int64_t state_head = head * per_head + i;
    float* written = w.written_k + (token * s.state_heads + state_head) * l.features;
    if (l.gate == GATE_HGRN2) {
      for (int64_t c = 0; c < d; c += LANES) store(written + c, sigmoid(mul(load(key + c), broadcast(-1.0f))));
    } else {
      features(m, l, l.key_map, state_head, key, written);
    }
    decays(m, l, state_head, k, w.decay + (token * s.state_heads + state_head) * l.features);
  }
}

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
  for (int64_t t = first_token; t < first_token + tokens; ++t, ++position) {
    const int64_t row = ring_row(l, position);
    if (row >= first_row && row < end_row) {
      write_row(keys + (row - first_row) * d, d, w.rotated_k + (t * m.kv_heads + head) * d);
      const float* v = w.qkv + t * w.qkv_stride + (m.heads + m.kv_heads + head) * d;
      write_row(values + (row - first_row) * d, d, v);
    }
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

// Stage 3: the shards of one token's query head, to y [head_dim].
inline void merge_shards(const Model& m, const Layer& l, const MixerMemory& w, int64_t token, int64_t head,
                         int64_t position, float* y) {
  const MixerShape s = mixer_shape(m, l);
  const int64_t d = m.head_dim, pieces = ring_pieces(s.rows);
  const float* shards = w.ring + (token * m.heads + head) * pieces * (d + 2);
  float top = -__builtin_inff();
  for (int64_t p = 0; p < pieces; ++p) top = shards[p * (d + 2) + d + 1] > top ? shards[p * (d + 2) + d + 1] : top;
  float mass = 0.0f;
  for (int64_t i = 0; i < d; i += LANES) store(y + i, zero());
  for (int64_t p = 0; p < pieces; ++p) {
    const float* shard = shards + p * (d + 2);
    if (shard[d] == 0.0f) continue;
    const F32 weight = exp(broadcast(shard[d + 1] - top));
    mass += first_lane(weight) * shard[d];
    for (int64_t i = 0; i < d; i += LANES) store(y + i, fma(load(shard + i), weight, load(y + i)));
  }
  const F32 near_share = div(broadcast(1.0f), broadcast(mass));
  for (int64_t i = 0; i < d; i += LANES) store(y + i, mul(load(y + i), near_share));
  if (l.join == JOIN_WINDOW || !writes_state(l, position)) return;
  const float* far = w.far + (token * m.heads + head) * s.value_rows;
  if (l.join == JOIN_MIXED) {
    const F32 near_weight = broadcast((float)l.mix), far_weight = broadcast((float)(1.0 - l.mix));
    for (int64_t i = 0; i < d; i += LANES) store(y + i, fma(near_weight, load(y + i), mul(far_weight, load(far + i))));
    return;
  }
  const float far_mass = far[d] > 1e-30f ? far[d] : 1e-30f;
  const float far_log_mass = unspool::logarithm(far_mass) + l.far_bias[head];
  const float near_log_mass = unspool::logarithm(mass) + (l.near_row_max ? 0.0f : top);
  const F32 share = sigmoid(broadcast(far_log_mass - near_log_mass));
  const F32 inverse = div(broadcast(1.0f), broadcast(far_mass));
  for (int64_t i = 0; i < d; i += LANES) {
    const F32 near = load(y + i), difference = sub(mul(load(far + i), inverse), near);
    store(y + i, fma(share, difference, near));
  }
}

}  // namespace UNSPOOL_ISA
