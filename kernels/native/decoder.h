// A whole decoder pass in one call: embedding, layers, head. All threads go through the layers together; a stage is a
// set of pieces, and a barrier follows it. Steps and chunks of any number of sequences are the same code.
#pragma once

#include "mixer.h"
#include "packing.h"
#include "workspace.h"

namespace UNSPOOL_ISA {

// Enough to hide a first access to memory, and little beside a cache.
constexpr int64_t FETCHED_BYTES = 1 << 14;

class Decoder {
 public:
  Decoder(const DecodeArguments& a, Team& team, int thread)
      : a_(a), m_(*a.model), team_(team), thread_(thread), tokens_(a.starts[a.sequences]),
        w_(workspace_at(m_, a.workspace, tokens_, team.size())) {}

  void run() {
    locate_tokens();
    for (int64_t i = 0; i < m_.num_layers; ++i) {
      const Layer& l = m_.layers[i];
      const Matrix& next = i + 1 < m_.num_layers ? m_.layers[i + 1].qkv : m_.head;
      select_window(l);
      mix(l);
      feed_forward(l, next);
    }
    predict();
  }

 private:
  // Embeds every token, and finds its sequence, position and rotations.
  void locate_tokens() {
    const int64_t half = m_.head_dim / 2;
    team_.for_each(thread_, tokens_, [&](int64_t t) {
      int64_t s = 0;
      while (a_.starts[s + 1] <= t) ++s;
      const int64_t position = a_.positions[s] + t - a_.starts[s];
      w_.sequence[t] = (int32_t)s;
      w_.position[t] = position;
      for (int64_t i = 0; i < m_.hidden; ++i) w_.hidden[t * m_.hidden + i] = unpack_one(m_.embedding, a_.tokens[t], i);
      const int64_t near_sinks = least(position, m_.position_limit);
      const MixerMemory& x = w_.mixer;
      fill_rotation(m_, position, (float*)x.cosine + t * half, (float*)x.sine + t * half);
      fill_rotation(m_, near_sinks, (float*)x.sink_cosine + t * half, (float*)x.sink_sine + t * half);
      for (int64_t i = 0; i < m_.num_windows; ++i)
        fill_inverse(m_, most(position - m_.windows[i], 0), inverse(i, 0) + t * half, inverse(i, 1) + t * half);
    });
  }

  float* inverse(int64_t window, int64_t part) {
    return w_.inverse + (2 * window + part) * tokens_ * (m_.head_dim / 2);
  }

  void select_window(const Layer& l) {
    w_.mixer.inverse_cosine = inverse(l.inverse_rotation, 0);
    w_.mixer.inverse_sine = inverse(l.inverse_rotation, 1);
  }

  // Makes activations of every token for the products that follow: fill(token, row) writes `width` floats.
  template <typename Fill>
  Rows activate(int64_t count, const Matrix& reader, Fill fill) {
    const bool quantize = is_quantized(reader.format);
    if (count <= TOKENS_FOR_EACH_THREAD) {
      const Rows own = rows_from(w_.own, thread_ * TOKENS_FOR_EACH_THREAD);
      for (int64_t t = 0; t < count; ++t) {
        fill(t, own.values + t * own.width);
        if (quantize) quantize_row(own, t);
      }
      return own;
    }
    team_.for_each(thread_, count, [&](int64_t t) {
      fill(t, w_.shared.values + t * w_.shared.width);
      if (quantize) quantize_row(w_.shared, t);
    });
    return w_.shared;
  }

  // Fetches what this thread will read first of a matrix that is multiplied in `pieces`, so that memory works while
  // threads wait for each other.
  void fetch(const Matrix& matrix, int64_t pieces) {
    const int64_t block = team_.share(thread_, pieces) * (num_blocks(matrix) / pieces);
    const int64_t rest = (num_blocks(matrix) - block) * block_bytes(matrix.columns, matrix.format);
    fetch(block_data(matrix, block), least(FETCHED_BYTES, rest));
  }
  void fetch(const uint8_t* data, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) prefetch(data + i);
  }

  // Likewise the maps that make the features of this thread's share of the heads.
  void fetch_maps(const Layer& l) {
    const int64_t heads = m_.heads + m_.kv_heads;
    if (tokens_ > TOKENS_FOR_EACH_THREAD || l.feature_map != FEATURES_HEDGEHOG) return;
    for (int64_t i = team_.share(thread_, heads); i < team_.share(thread_ + 1, heads); ++i) {
      const Matrix& map = i < m_.heads ? l.query_map : l.key_map;
      const int64_t head = i < m_.heads ? i : i - m_.heads, of = i < m_.heads ? m_.heads : m_.kv_heads;
      fetch(block_data(map, num_blocks(map) / of * head), num_blocks(map) / of * block_bytes(map.columns, map.format));
    }
  }

  // hidden += x W^T + bias.
  template <typename Idle>
  void add_product(const Matrix& matrix, const float* bias, const Rows& x, Idle idle) {
    float* product = w_.scratch + thread_ * tokens_ * 2 * BLOCK_ROWS;
    team_.for_each(thread_, num_blocks(matrix), [&](int64_t block) {
      block_product(matrix, block, x, 0, tokens_, product, BLOCK_ROWS);
      for (int64_t t = 0; t < tokens_; ++t)
        for (int64_t i = 0; i < BLOCK_ROWS; i += LANES) {
          float* at = w_.hidden + t * m_.hidden + block * BLOCK_ROWS + i;
          F32 y = load(product + t * BLOCK_ROWS + i);
          if (bias) y = add(y, load(bias + block * BLOCK_ROWS + i));
          store(at, add(load(at), y));
        }
    }, idle);
  }

  void mix(const Layer& l) {
    const MixerShape s = mixer_shape(m_, l);
    const MixerMemory& x = w_.mixer;
    const Rows normed = activate(tokens_, l.qkv, [&](int64_t t, float* row) {
      rms_norm(w_.hidden + t * m_.hidden, l.input_norm, m_.hidden, (float)m_.norm_eps, row);
    });
    // The heads' banks are spread over the blocks.
    const int64_t blocks = num_blocks(l.qkv), banks = l.bank ? a_.sequences * m_.kv_heads : 0;
    team_.for_each(thread_, blocks, [&](int64_t block) {
      for (int64_t i = banks * block / blocks; i < banks * (block + 1) / blocks; ++i) update_bank(l, i);
      float* y = x.qkv + block * BLOCK_ROWS;
      block_product(l.qkv, block, normed, 0, tokens_, y, x.qkv_stride);
      if (l.qkv_bias)
        for (int64_t t = 0; t < tokens_; ++t)
          for (int64_t i = 0; i < BLOCK_ROWS; i += LANES) {
            float* at = y + t * x.qkv_stride + i;
            store(at, add(load(at), load(l.qkv_bias + block * BLOCK_ROWS + i)));
          }
    }, [&] { fetch_maps(l); });
    const int64_t heads = m_.heads + m_.kv_heads;
    team_.for_each(thread_, tokens_ * heads, [&](int64_t piece) {
      const int64_t t = piece / heads, head = piece % heads, slot = a_.slots[w_.sequence[t]];
      if (head < m_.heads) return prepare_query(m_, l, x, t, head, w_.position[t]);
      if (m_.state_format == FLOAT16) return prepare_key<Half>(m_, l, x, t, head - m_.heads, w_.position[t], slot);
      prepare_key<float>(m_, l, x, t, head - m_.heads, w_.position[t], slot);
    });
    sweep(l, s);
    const Rows mixed = activate(tokens_, l.out, [&](int64_t t, float* row) {
      for (int64_t head = 0; head < m_.heads; ++head)
        merge_shards(m_, l, x, t, head, w_.position[t], row + head * m_.head_dim);
    });
    add_product(l.out, l.out_bias, mixed, [&] { fetch(l.gate_up, num_blocks(l.gate_up) / 2); });
  }

  void update_bank(const Layer& l, int64_t piece) {
    const int64_t sequence = piece / m_.kv_heads, head = piece % m_.kv_heads, first = a_.starts[sequence];
    const int64_t count = a_.starts[sequence + 1] - first, slot = a_.slots[sequence], position = a_.positions[sequence];
    if (m_.state_format == FLOAT16) offer_tokens<Half>(m_, l, w_.mixer, head, slot, first, count, position);
    else offer_tokens<float>(m_, l, w_.mixer, head, slot, first, count, position);
  }

  void sweep(const Layer& l, const MixerShape& s) {
    const int64_t near = s.kv_heads * ring_pieces(s.rows);
    const int64_t far = s.has_state ? s.state_heads * state_pieces(s.value_rows) : 0;
    team_.for_each(thread_, a_.sequences * (near + far), [&](int64_t piece) {
      const int64_t sequence = piece / (near + far), part = piece % (near + far);
      const int64_t first = a_.starts[sequence], count = a_.starts[sequence + 1] - first;
      const int64_t slot = a_.slots[sequence], position = a_.positions[sequence];
      if (m_.state_format == FLOAT16) sweep_part<Half>(l, s, part, near, slot, first, count, position);
      else sweep_part<float>(l, s, part, near, slot, first, count, position);
    }, [&] { fetch(l.out, num_blocks(l.out)); });
  }

  template <typename T>
  void sweep_part(const Layer& l, const MixerShape& s, int64_t part, int64_t near, int64_t slot, int64_t first,
                  int64_t count, int64_t position) {
    const int64_t rings = ring_pieces(s.rows), states = state_pieces(s.value_rows);
    if (part < near) return sweep_ring<T>(m_, l, w_.mixer, part / rings, part % rings, slot, first, count, position);
    sweep_state<T>(m_, l, w_.mixer, (part - near) / states, (part - near) % states, slot, first, count, position);
  }

  void feed_forward(const Layer& l, const Matrix& next) {
    const Rows normed = activate(tokens_, l.gate_up, [&](int64_t t, float* row) {
      rms_norm(w_.hidden + t * m_.hidden, l.post_norm, m_.hidden, (float)m_.norm_eps, row);
    });
    const bool quantize = is_quantized(l.down.format);
    float* gate = w_.scratch + thread_ * tokens_ * 2 * BLOCK_ROWS;
    float* up = gate + tokens_ * BLOCK_ROWS;
    team_.for_each(thread_, num_blocks(l.gate_up) / 2, [&](int64_t block) {
      block_product(l.gate_up, 2 * block, normed, 0, tokens_, gate, BLOCK_ROWS);
      block_product(l.gate_up, 2 * block + 1, normed, 0, tokens_, up, BLOCK_ROWS);
      const float* bias = l.gate_up_bias ? l.gate_up_bias + 2 * block * BLOCK_ROWS : nullptr;
      for (int64_t t = 0; t < tokens_; ++t) {
        for (int64_t i = 0; i < BLOCK_ROWS; i += LANES) {
          F32 g = load(gate + t * BLOCK_ROWS + i), u = load(up + t * BLOCK_ROWS + i);
          if (bias) g = add(g, load(bias + i)), u = add(u, load(bias + BLOCK_ROWS + i));
          store(w_.inner.values + t * w_.inner.width + block * BLOCK_ROWS + i, mul(activation(g), u));
        }
        if (quantize) quantize_group(w_.inner, t, block);
      }
    }, [&] { fetch(l.down, num_blocks(l.down)); });
    add_product(l.down, l.down_bias, w_.inner, [&] { fetch(next, num_blocks(next)); });
  }

  F32 activation(F32 x) {
    switch (m_.activation) {
      case ACTIVATION_GELU_TANH: {
        const F32 inner = mul(x, fma(mul(x, x), broadcast(0.044715f), broadcast(1.0f)));
        const F32 t = tanh(mul(inner, broadcast(0.7978845608028654f)));
        return mul(mul(x, broadcast(0.5f)), add(t, broadcast(1.0f)));
      }
      case ACTIVATION_RELU: return max(x, zero());
      default: return silu(x);
    }
  }

  void predict() {
    if (a_.num_logits == 0) return;
    const Rows normed = activate(a_.num_logits, m_.head, [&](int64_t i, float* row) {
      rms_norm(w_.hidden + a_.logit_tokens[i] * m_.hidden, m_.final_norm, m_.hidden, (float)m_.norm_eps, row);
    });
    team_.for_each(thread_, num_blocks(m_.head), [&](int64_t block) {
      block_product(m_.head, block, normed, 0, a_.num_logits, a_.logits + block * BLOCK_ROWS, a_.logits_stride);
    });
  }

  const DecodeArguments& a_;
  const Model& m_;
  Team& team_;
  const int thread_;
  const int64_t tokens_;
  Workspace w_;
};

inline bool has_our_records(const DecodeArguments& a) {
  return a.record_bytes == (int64_t)(sizeof(Model) + sizeof(Layer));
}

inline const char* decode(const DecodeArguments* a, int threads) {
  if (!has_our_records(*a)) return "model: of another version than this library";
  const int64_t tokens = a->starts[a->sequences];
  if (workspace_at(*a->model, nullptr, tokens, threads).bytes > a->workspace_bytes) return "workspace: too small";
  run(threads, [&](Team& team, int thread) { Decoder(*a, team, thread).run(); });
  return nullptr;
}

inline const char* decode_workspace(const DecodeArguments* a, int threads) {
  if (!has_our_records(*a)) return "model: of another version than this library";
  DecodeArguments* out = const_cast<DecodeArguments*>(a);
  out->workspace_bytes = workspace_at(*a->model, nullptr, a->starts[a->sequences], threads).bytes;
  return nullptr;
}

}  // namespace UNSPOOL_ISA
