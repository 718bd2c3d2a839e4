// Where everything that passes between the stages of a decoder pass lies, in one piece of the caller's memory.
#pragma once

#include "mixer_shape.h"

namespace UNSPOOL_ISA {

// Takes the workspace apart, 64 bytes aligned.
struct Arena {
  uint8_t* base;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* at = (T*)(base + used);
    used += round_up(count * (int64_t)sizeof(T), 64);
    return at;
  }
};

// Few tokens are normalised by every thread for itself, which costs less than meeting at a barrier.
constexpr int64_t TOKENS_FOR_EACH_THREAD = 2;

struct Workspace {
  float* hidden;       // [tokens, hidden]: the residual stream
  Rows shared;         // activations that one stage makes and the next one reads
  Rows inner;          // of the feed-forward layer
  Rows own;            // [threads], for few tokens
  float* scratch;      // [threads, 2 blocks of all tokens]
  MixerMemory mixer;
  float* inverse;      // [windows, 2, tokens, head_dim / 2]
  int64_t* position;   // [tokens]
  int32_t* sequence;
  int64_t bytes;
};

inline Workspace workspace_at(const Model& m, uint8_t* memory, int64_t tokens, int threads) {
  Arena arena{memory};
  Workspace w;
  const int64_t half = m.head_dim / 2, attention = m.heads * m.head_dim;
  int64_t pieces = 1, features = 0, state_heads = m.kv_heads, banked = 0;
  for (int64_t i = 0; i < m.num_layers; ++i) {
    const MixerShape s = mixer_shape(m, m.layers[i]);
    pieces = most(pieces, ring_pieces(s.rows));
    features = most(features, s.features);
    state_heads = most(state_heads, s.state_heads);
    if (m.layers[i].bank) banked = tokens * m.kv_heads;
  }
  w.hidden = arena.take<float>(tokens * m.hidden);
  const int64_t width = round_up(most(m.hidden, attention), GROUP), inner = round_up(m.intermediate, GROUP);
  w.shared = rows_at(arena.take<uint8_t>(rows_bytes(tokens, width)), tokens, width);
  w.inner = rows_at(arena.take<uint8_t>(rows_bytes(tokens, inner)), tokens, inner);
  const int64_t few = TOKENS_FOR_EACH_THREAD * threads;
  w.own = rows_at(arena.take<uint8_t>(rows_bytes(few, width)), few, width);
  w.scratch = arena.take<float>(threads * tokens * 2 * BLOCK_ROWS);
  MixerMemory& x = w.mixer;
  x.qkv_stride = round_up(attention + 2 * m.kv_heads * m.head_dim, BLOCK_ROWS);
  x.qkv = arena.take<float>(tokens * x.qkv_stride);
  x.rotated_q = arena.take<float>(tokens * attention);
  x.sink_q = arena.take<float>(tokens * attention);
  x.rotated_k = arena.take<float>(tokens * m.kv_heads * m.head_dim);
  x.query_features = arena.take<float>(tokens * m.heads * features);
  x.written_k = arena.take<float>(tokens * state_heads * features);
  x.written_v = arena.take<float>(tokens * m.kv_heads * m.head_dim);
  x.decay = arena.take<float>(tokens * state_heads * features);
  x.ring = arena.take<float>(tokens * m.heads * pieces * (m.head_dim + 2));
  x.far = arena.take<float>(tokens * m.heads * (m.head_dim + 1));
  x.left_k = arena.take<float>(banked * m.head_dim);
  x.left_v = arena.take<float>(banked * m.head_dim);
  x.evicted_k = arena.take<float>(banked * m.head_dim);
  x.bank_row = arena.take<int32_t>(banked);
  float* angles = arena.take<float>(4 * tokens * half);
  x.cosine = angles;
  x.sine = angles + tokens * half;
  x.sink_cosine = angles + 2 * tokens * half;
  x.sink_sine = angles + 3 * tokens * half;
  w.inverse = arena.take<float>(2 * m.num_windows * tokens * half);
  w.position = arena.take<int64_t>(tokens);
  w.sequence = arena.take<int32_t>(tokens);
  w.bytes = arena.used;
  return w;
}

}  // namespace UNSPOOL_ISA
