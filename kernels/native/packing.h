// Packs float weights into the formats of `packed_matrix.h`, and reads them back.
#pragma once

#include "packed_matrix.h"

namespace UNSPOOL_ISA {

UNSPOOL_INLINE float through_half(float x) { Half h; store_one(&h, x); return load_one(&h); }
UNSPOOL_INLINE float nearest_level(float x, float levels) {
  const float rounded = __builtin_rintf(x);
  return rounded < 0.0f ? 0.0f : rounded > levels ? levels : rounded;
}

// One group of 32 weights of one row as a byte each; writes the scale. w = scale * (byte - 128).
inline void quantize_int8(const float* w, int64_t count, uint8_t* bytes, Half* scale) {
  float peak = 0.0f;
  for (int64_t i = 0; i < count; ++i) peak = __builtin_fabsf(w[i]) > peak ? __builtin_fabsf(w[i]) : peak;
  store_one(scale, peak / 127.0f);
  const float stored = load_one(scale), inverse = stored > 0.0f ? 1.0f / stored : 0.0f;
  for (int64_t i = 0; i < GROUP; ++i)
    bytes[i] = i < count ? (uint8_t)(nearest_level(w[i] * inverse + 127.0f, 254.0f) + 1.0f) : 128;
}

// One group as 4-bit levels: w = minimum + scale * level. Of several shrunken ranges, that of least squared error.
inline void quantize_int4(const float* w, int64_t count, uint8_t* levels, Half* scale, Half* minimum) {
  float low = 0.0f, high = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    low = i == 0 || w[i] < low ? w[i] : low;
    high = i == 0 || w[i] > high ? w[i] : high;
  }
  float best = -1.0f;
  for (int shrink = 0; shrink <= 6; ++shrink) {
    const float cut = 0.025f * (float)shrink * (high - low) * 0.5f;
    const float start = through_half(low + cut);
    const float step = through_half((high - low - 2.0f * cut) / 15.0f);
    const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
    float error = 0.0f;
    uint8_t candidate[GROUP] = {};
    for (int64_t i = 0; i < count; ++i) {
      const float level = nearest_level((w[i] - start) * inverse, 15.0f);
      const float difference = w[i] - (start + step * level);
      candidate[i] = (uint8_t)level;
      error += difference * difference;
    }
    if (best < 0.0f || error < best) {
      best = error;
      std::memcpy(levels, candidate, GROUP);
      store_one(scale, step);
      store_one(minimum, start);
    }
  }
}

template <typename T>
UNSPOOL_INLINE void pack_float_block(const PackArguments& a, int64_t block, T* out) {
  for (int64_t k = 0; k < a.columns; ++k)
    for (int64_t r = 0; r < BLOCK_ROWS; ++r) {
      const int64_t row = block * BLOCK_ROWS + r;
      store_one(out + k * BLOCK_ROWS + r, row < a.rows ? a.weight[row * a.columns + k] : 0.0f);
    }
}
// bfloat16 is only ever packed here: round to nearest, ties to even.
UNSPOOL_INLINE void store_one(BFloat16* p, float x) {
  const uint32_t bits = float_to_bits(x);
  p->bits = x != x ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline void pack_quantized_block(const PackArguments& a, int64_t block, uint8_t* out) {
  const bool eight = a.format == INT8;
  for (int64_t g = 0; g < ceil_div(a.columns, GROUP); ++g, out += eight ? INT8_GROUP_BYTES : INT4_GROUP_BYTES) {
    Half* scales = (Half*)out;
    uint8_t* bytes = out + (eight ? 2 : 4) * BLOCK_ROWS;
    const int64_t count = least(GROUP, a.columns - g * GROUP);
    for (int64_t r = 0; r < BLOCK_ROWS; ++r) {
      const int64_t row = block * BLOCK_ROWS + r;
      const float absent[GROUP] = {};
      const float* w = row < a.rows ? a.weight + row * a.columns + g * GROUP : absent;
      uint8_t levels[GROUP] = {};
      if (eight) quantize_int8(w, count, levels, scales + r);
      else quantize_int4(w, count, levels, scales + r, scales + BLOCK_ROWS + r);
      for (int64_t i = 0; i < GROUP; ++i) {
        const int64_t quad = i / 4, lane = r * 4 + i % 4;
        if (eight) bytes[quad * 128 + lane] = levels[i];
        else if (quad < 4) bytes[quad * 128 + lane] = levels[i];
        else bytes[(quad - 4) * 128 + lane] |= (uint8_t)(levels[i] << 4);
      }
    }
  }
}

inline const char* pack(const PackArguments* a, int threads) {
  if (a->format < FLOAT32 || a->format > INT4) return "format: unknown";
  run(threads, [&](Team& team, int thread) {
    team.for_each(thread, ceil_div(a->rows, BLOCK_ROWS), [&](int64_t block) {
      uint8_t* out = a->packed + block * block_bytes(a->columns, a->format);
      switch (a->format) {
        case FLOAT32: return pack_float_block(*a, block, (float*)out);
        case BFLOAT16: return pack_float_block(*a, block, (BFloat16*)out);
        case FLOAT16: return pack_float_block(*a, block, (Half*)out);
        default: return pack_quantized_block(*a, block, out);
      }
    });
  });
  return nullptr;
}

// Column k of the row, as a product would use it.
inline float unpack_one(const Matrix& m, int64_t row, int64_t k) {
  const uint8_t* data = block_data(m, row / BLOCK_ROWS);
  const int64_t r = row % BLOCK_ROWS;
  switch (m.format) {
    case FLOAT32: return ((const float*)data)[k * BLOCK_ROWS + r];
    case BFLOAT16: return bits_to_float((uint32_t)((const BFloat16*)data)[k * BLOCK_ROWS + r].bits << 16);
    case FLOAT16: return load_one((const Half*)data + k * BLOCK_ROWS + r);
    default: break;
  }
  const int64_t i = k % GROUP, quad = i / 4, lane = r * 4 + i % 4;
  data += k / GROUP * (m.format == INT8 ? INT8_GROUP_BYTES : INT4_GROUP_BYTES);
  const Half* scales = (const Half*)data;
  const float scale = load_one(scales + r);
  if (m.format == INT8) return scale * (float)((int)data[2 * BLOCK_ROWS + quad * 128 + lane] - 128);
  const uint8_t both = data[4 * BLOCK_ROWS + quad % 4 * 128 + lane];
  return load_one(scales + BLOCK_ROWS + r) + scale * (float)(quad < 4 ? both & 15 : both >> 4);
}

inline const char* unpack(const UnpackArguments* a, int threads) {
  run(threads, [&](Team& team, int thread) {
    team.for_each(thread, a->matrix.rows, [&](int64_t row) {
      for (int64_t k = 0; k < a->matrix.columns; ++k)
        a->weight[row * a->matrix.columns + k] = unpack_one(a->matrix, row, k);
    });
  });
  return nullptr;
}

// y = x W^T for float x: the packed product alone.
inline const char* product(const ProductArguments* a, int threads) {
  const int64_t width = round_up(a->matrix.columns, GROUP);
  const Rows rows = rows_at(a->workspace, a->tokens, width);
  run(threads, [&](Team& team, int thread) {
    team.for_each(thread, a->tokens, [&](int64_t token) {
      float* values = rows.values + token * width;
      std::memcpy(values, a->x + token * a->matrix.columns, a->matrix.columns * 4);
      std::memset(values + a->matrix.columns, 0, (width - a->matrix.columns) * 4);
      if (is_quantized(a->matrix.format)) quantize_row(rows, token);
    });
    team.for_each(thread, num_blocks(a->matrix), [&](int64_t block) {
      block_product(a->matrix, block, rows, 0, a->tokens, a->y + block * BLOCK_ROWS, a->y_stride);
    });
  });
  return nullptr;
}

}  // namespace UNSPOOL_ISA
