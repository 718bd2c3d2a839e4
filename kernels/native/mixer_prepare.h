// Stage 1 of the token mixer: each token's heads, one by one.
#pragma once

#include <cmath>

#include "mixer_shape.h"

namespace UNSPOOL_ISA {

// What rotates a head at a position, [head_dim / 2] each; angles are formed in float64.
inline void fill_rotation(const Model& m, int64_t position, float* cosine, float* sine) {
  for (int64_t i = 0; i < m.head_dim / 2; ++i) {
    const double angle = (double)position * m.frequencies[i];
    cosine[i] = (float)(std::cos(angle) * m.rotary_scaling);
    sine[i] = (float)(std::sin(angle) * m.rotary_scaling);
  }
}

// What undoes it.
inline void fill_inverse(const Model& m, int64_t position, float* cosine, float* sine) {
  for (int64_t i = 0; i < m.head_dim / 2; ++i) {
    const double angle = (double)position * m.frequencies[i];
    cosine[i] = (float)(std::cos(angle) / m.rotary_scaling);
    sine[i] = (float)(-std::sin(angle) / m.rotary_scaling);
  }
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

// Stage 1 for one token and one key-value head: among the rest, takes what leaves the near set out of the ring, unless the
// bank has decided about that. That no sequence brings more tokens than the window holds is why it is still there.
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
  if (l.bank) {
    std::memcpy(key, w.evicted_k + at, d * sizeof(float));
  } else if (l.join == JOIN_DISJOINT) {
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

}  // namespace UNSPOOL_ISA
