// Products with packed weights. Every output is one chain of sums over the columns, whatever the number of tokens, so
// a token's result has the same bits alone and in any batch.
#pragma once

#include "library.h"
#include "simd.h"

namespace UNSPOOL_ISA {

using namespace unspool;

#if defined(UNSPOOL_AVX512)
constexpr int FLOAT_TILE = 12, INT8_TILE = 3, INT4_TILE = 6;
#elif defined(UNSPOOL_AVX2)
constexpr int FLOAT_TILE = 3, INT8_TILE = 1, INT4_TILE = 2;
#elif defined(UNSPOOL_NEON)
constexpr int FLOAT_TILE = 2, INT8_TILE = 1, INT4_TILE = 1;
#else
constexpr int FLOAT_TILE = 4, INT8_TILE = 2, INT4_TILE = 2;
#endif

UNSPOOL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
UNSPOOL_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
UNSPOOL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
UNSPOOL_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int64_t INT8_GROUP_BYTES = 2 * BLOCK_ROWS + BLOCK_ROWS * GROUP;
constexpr int64_t INT4_GROUP_BYTES = 4 * BLOCK_ROWS + BLOCK_ROWS * GROUP / 2;

UNSPOOL_INLINE int64_t block_bytes(int64_t columns, int64_t format) {
  switch (format) {
    case FLOAT32: return columns * BLOCK_ROWS * 4;
    case INT8: return ceil_div(columns, GROUP) * INT8_GROUP_BYTES;
    case INT4: return ceil_div(columns, GROUP) * INT4_GROUP_BYTES;
    default: return columns * BLOCK_ROWS * 2;
  }
}
UNSPOOL_INLINE int64_t num_blocks(const Matrix& m) { return ceil_div(m.rows, BLOCK_ROWS); }
UNSPOOL_INLINE const uint8_t* block_data(const Matrix& m, int64_t block) {
  return m.data + block * block_bytes(m.columns, m.format);
}
UNSPOOL_INLINE bool is_quantized(int64_t format) { return format == INT8 || format == INT4; }

// Activations [tokens, width] as products read them: floats, and for quantised weights also bytes with one scale for
// each group of columns, x = scale (byte + fine byte / 254). int8 weights read both bytes: rounding activations to
// eight bits would cost more quality than rounding the weights did. int4 weights read the first one.
// `width` is a multiple of 32, absent columns are zeros.
struct Rows {
  float* values;
  int8_t *bytes, *fine;
  float* scales;              // [tokens, width / 32]
  int32_t *sums, *fine_sums;  // of the bytes of a group
  int64_t width;
};
constexpr float FINE_STEPS = 254.0f;

UNSPOOL_INLINE int64_t rows_bytes(int64_t tokens, int64_t width) {
  return round_up(tokens * (width * 6 + width / GROUP * 12), 64);
}
UNSPOOL_INLINE Rows rows_at(uint8_t* memory, int64_t tokens, int64_t width) {
  const int64_t groups = tokens * (width / GROUP);
  Rows rows;
  rows.width = width;
  rows.values = (float*)memory;
  rows.scales = rows.values + tokens * width;
  rows.sums = (int32_t*)(rows.scales + groups);
  rows.fine_sums = rows.sums + groups;
  rows.bytes = (int8_t*)(rows.fine_sums + groups);
  rows.fine = rows.bytes + tokens * width;
  return rows;
}
// The same rows from another token on.
UNSPOOL_INLINE Rows rows_from(const Rows& rows, int64_t token) {
  const int64_t at = token * rows.width, group = token * (rows.width / GROUP);
  Rows rest = rows;
  rest.values += at, rest.bytes += at, rest.fine += at;
  rest.scales += group, rest.sums += group, rest.fine_sums += group;
  return rest;
}

// Symmetric: the largest magnitude of 32 columns becomes 127.
UNSPOOL_INLINE void quantize_group(const Rows& rows, int64_t token, int64_t group) {
  const int64_t at = token * rows.width + group * GROUP, index = token * (rows.width / GROUP) + group;
  const F32 a = load(rows.values + at), b = load(rows.values + at + LANES);
  const float peak = largest(max(abs(a), abs(b)));
  const F32 inverse = broadcast(peak > 0.0f ? 127.0f / peak : 0.0f);
  F32 coarse = zero(), fine = zero();  // sums of whole numbers below 2^24: exact
  for (int i = 0; i < GROUP; i += LANES) {
    const F32 x = mul(i ? b : a, inverse), q = round(x);
    const F32 rest = round(mul(sub(x, q), broadcast(FINE_STEPS)));
    store_bytes(rows.bytes + at + i, q);
    store_bytes(rows.fine + at + i, rest);
    coarse = add(coarse, q);
    fine = add(fine, rest);
  }
  rows.scales[index] = peak / 127.0f;
  rows.sums[index] = (int32_t)sum(coarse);
  rows.fine_sums[index] = (int32_t)sum(fine);
}
UNSPOOL_INLINE void quantize_row(const Rows& rows, int64_t token) {
  for (int64_t group = 0; group < rows.width / GROUP; ++group) quantize_group(rows, token, group);
}

template <typename T, int TOKENS>
UNSPOOL_INLINE void float_tile(const uint8_t* data, int64_t columns, const Rows& x, int64_t first, float* y,
                               int64_t stride) {
  const T* w = (const T*)data;
  const float* rows = x.values + first * x.width;
  F32 acc[TOKENS][2];
  for (int t = 0; t < TOKENS; ++t) acc[t][0] = acc[t][1] = zero();
  for (int64_t k = 0; k < columns; ++k, w += BLOCK_ROWS) {
    const F32 w0 = load(w), w1 = load(w + LANES);
    for (int t = 0; t < TOKENS; ++t) {
      const F32 value = broadcast(rows[t * x.width + k]);
      acc[t][0] = fma(w0, value, acc[t][0]);
      acc[t][1] = fma(w1, value, acc[t][1]);
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    store(y + t * stride, acc[t][0]);
    store(y + t * stride + LANES, acc[t][1]);
  }
}

UNSPOOL_INLINE int32_t four_bytes(const int8_t* p) { int32_t x; std::memcpy(&x, p, 4); return x; }

template <int TOKENS>
UNSPOOL_INLINE void int8_tile(const uint8_t* data, int64_t columns, const Rows& x, int64_t first, float* y,
                              int64_t stride) {
  const int64_t groups = ceil_div(columns, GROUP), x_groups = x.width / GROUP;
  F32 acc[TOKENS][2];
  for (int t = 0; t < TOKENS; ++t) acc[t][0] = acc[t][1] = zero();
  for (int64_t g = 0; g < groups; ++g, data += INT8_GROUP_BYTES) {
    I32 dot[TOKENS][2], fine[TOKENS][2];
    for (int t = 0; t < TOKENS; ++t) {
      const int64_t index = (first + t) * x_groups + g;
      dot[t][0] = dot[t][1] = offset_start(x.sums[index]);
      fine[t][0] = fine[t][1] = offset_start(x.fine_sums[index]);
    }
    const uint8_t* w = data + 2 * BLOCK_ROWS;
    for (int quad = 0; quad < GROUP / 4; ++quad, w += 128) {
      const Bytes w0 = load_bytes(w), w1 = load_bytes(w + 64);
      for (int t = 0; t < TOKENS; ++t) {
        const int64_t at = (first + t) * x.width + g * GROUP + 4 * quad;
        const int32_t four = four_bytes(x.bytes + at), fine_four = four_bytes(x.fine + at);
        dot[t][0] = dot_offset(dot[t][0], w0, four);
        dot[t][1] = dot_offset(dot[t][1], w1, four);
        fine[t][0] = dot_offset(fine[t][0], w0, fine_four);
        fine[t][1] = dot_offset(fine[t][1], w1, fine_four);
      }
    }
    const F32 fine_step = broadcast(1.0f / FINE_STEPS);
    for (int i = 0; i < 2; ++i) {
      const F32 scale = load((const Half*)data + i * LANES);
      for (int t = 0; t < TOKENS; ++t) {
        const F32 x_scale = broadcast(x.scales[(first + t) * x_groups + g]);
        const F32 both = fma(to_float(fine[t][i]), fine_step, to_float(dot[t][i]));
        acc[t][i] = fma(both, mul(scale, x_scale), acc[t][i]);
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    store(y + t * stride, acc[t][0]);
    store(y + t * stride + LANES, acc[t][1]);
  }
}

template <int TOKENS>
UNSPOOL_INLINE void int4_tile(const uint8_t* data, int64_t columns, const Rows& x, int64_t first, float* y,
                              int64_t stride) {
  const int64_t groups = ceil_div(columns, GROUP), x_groups = x.width / GROUP;
  const int8_t* bytes = x.bytes + first * x.width;
  F32 acc[TOKENS][2];
  for (int t = 0; t < TOKENS; ++t) acc[t][0] = acc[t][1] = zero();
  for (int64_t g = 0; g < groups; ++g, data += INT4_GROUP_BYTES) {
    I32 dot[TOKENS][2];
    for (int t = 0; t < TOKENS; ++t) dot[t][0] = dot[t][1] = int_broadcast(0);
    const uint8_t* w = data + 4 * BLOCK_ROWS;
    for (int i = 0; i < GROUP / 8; ++i, w += 128) {
      const Bytes w0 = load_bytes(w), w1 = load_bytes(w + 64);
      const Bytes low0 = low_nibbles(w0), low1 = low_nibbles(w1);
      const Bytes high0 = high_nibbles(w0), high1 = high_nibbles(w1);
      for (int t = 0; t < TOKENS; ++t) {
        const int8_t* quad = bytes + t * x.width + g * GROUP + 4 * i;
        const int32_t low = four_bytes(quad), high = four_bytes(quad + GROUP / 2);
        dot[t][0] = dot_small(dot_small(dot[t][0], low0, low), high0, high);
        dot[t][1] = dot_small(dot_small(dot[t][1], low1, low), high1, high);
      }
    }
    const Half* scales = (const Half*)data;
    const F32 scale0 = load(scales), scale1 = load(scales + LANES);
    const F32 minimum0 = load(scales + BLOCK_ROWS), minimum1 = load(scales + BLOCK_ROWS + LANES);
    for (int t = 0; t < TOKENS; ++t) {
      const int64_t index = (first + t) * x_groups + g;
      const F32 x_scale = broadcast(x.scales[index]);
      const F32 x_sum = broadcast(x.scales[index] * (float)x.sums[index]);
      acc[t][0] = fma(to_float(dot[t][0]), mul(scale0, x_scale), fma(minimum0, x_sum, acc[t][0]));
      acc[t][1] = fma(to_float(dot[t][1]), mul(scale1, x_scale), fma(minimum1, x_sum, acc[t][1]));
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    store(y + t * stride, acc[t][0]);
    store(y + t * stride + LANES, acc[t][1]);
  }
}

constexpr int smaller_tile(int tokens) { return tokens > 8 ? 8 : tokens > 4 ? 4 : tokens > 2 ? 2 : 1; }

// y[t, 0..31] = x[first + t] . block for t < tokens: whole tiles first, then ever smaller ones.
#define UNSPOOL_TILES(name, call)                                                                               \
  template <int TOKENS>                                                                                         \
  inline void name(const uint8_t* data, int64_t columns, const Rows& x, int64_t first, int64_t tokens, float* y, \
                   int64_t stride) {                                                                            \
    for (; tokens >= TOKENS; tokens -= TOKENS, first += TOKENS, y += TOKENS * stride)                            \
      call<TOKENS>(data, columns, x, first, y, stride);                                                         \
    if constexpr (TOKENS > 1)                                                                                   \
      if (tokens > 0) name<smaller_tile(TOKENS)>(data, columns, x, first, tokens, y, stride);           \
  }
template <int TOKENS>
UNSPOOL_INLINE void float32_tile(const uint8_t* d, int64_t c, const Rows& x, int64_t f, float* y, int64_t s) {
  float_tile<float, TOKENS>(d, c, x, f, y, s);
}
template <int TOKENS>
UNSPOOL_INLINE void bfloat16_tile(const uint8_t* d, int64_t c, const Rows& x, int64_t f, float* y, int64_t s) {
  float_tile<BFloat16, TOKENS>(d, c, x, f, y, s);
}
template <int TOKENS>
UNSPOOL_INLINE void float16_tile(const uint8_t* d, int64_t c, const Rows& x, int64_t f, float* y, int64_t s) {
  float_tile<Half, TOKENS>(d, c, x, f, y, s);
}
UNSPOOL_TILES(float32_tiles, float32_tile)
UNSPOOL_TILES(bfloat16_tiles, bfloat16_tile)
UNSPOOL_TILES(float16_tiles, float16_tile)
UNSPOOL_TILES(int8_tiles, int8_tile)
UNSPOOL_TILES(int4_tiles, int4_tile)
#undef UNSPOOL_TILES

inline void block_product(const Matrix& m, int64_t block, const Rows& x, int64_t first, int64_t tokens, float* y,
                          int64_t stride) {
  const uint8_t* data = block_data(m, block);
  switch (m.format) {
    case FLOAT32: return float32_tiles<FLOAT_TILE>(data, m.columns, x, first, tokens, y, stride);
    case BFLOAT16: return bfloat16_tiles<FLOAT_TILE>(data, m.columns, x, first, tokens, y, stride);
    case FLOAT16: return float16_tiles<FLOAT_TILE>(data, m.columns, x, first, tokens, y, stride);
    case INT8: return int8_tiles<INT8_TILE>(data, m.columns, x, first, tokens, y, stride);
    case INT4: return int4_tiles<INT4_TILE>(data, m.columns, x, first, tokens, y, stride);
  }
}

}  // namespace UNSPOOL_ISA
