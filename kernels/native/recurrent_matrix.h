// The product R h of recurrent cells, for the states h of several sequences, in two forms that give the same bits. Every
// output is sixteen sums, over the inputs of the same place in each sixteen, added up as `sum` does it. Where they are
// lanes, R is read as it is; where the outputs are lanes, R has been packed before, which pays for many tokens.
#pragma once

#include "packed_tokens.h"

namespace UNSPOOL_ISA {

constexpr int CELL_GATES[] = {1, 4, 3, 4};  // by cell
constexpr int64_t PACKING_TOKENS = 64;      // from which on a packed matrix pays
constexpr int64_t MATRIX_BLOCK = 1 << 12;   // numbers of the matrix that stay in L1 while sequences take turns
#if defined(UNSPOOL_SCALAR)
constexpr bool PACKS_MATRICES = false;
#else
constexpr bool PACKS_MATRICES = true;
#endif
#if defined(UNSPOOL_AVX512)
constexpr int TILE_VECTORS = 2;
#else
constexpr int TILE_VECTORS = 1;
#endif
constexpr int TILE_LANES = 4;

// One sequence of a piece: its states and pre-activations, padded with zeros to whole vectors.
struct CellLane {
  int64_t sequence, first, tokens;
  float* states;       // [states, padded channels]; the first is h
  float* activations;  // [gates, padded channels]: R h + bias
};

UNSPOOL_INLINE int64_t padded_channels(const RecurrentCellArguments& a) { return round_up(a.channels, LANES); }
UNSPOOL_INLINE int64_t output_vectors(const RecurrentCellArguments& a) {
  return CELL_GATES[a.cell] * padded_channels(a) / LANES;
}
UNSPOOL_INLINE bool packs_matrix(const RecurrentCellArguments& a) {
  return PACKS_MATRICES && num_tokens(a.sequences) >= PACKING_TOKENS;
}
UNSPOOL_INLINE int64_t packed_floats(const RecurrentCellArguments& a) {
  return packs_matrix(a) ? a.heads * output_vectors(a) * padded_channels(a) * LANES : 0;
}

template <int ROWS>
UNSPOOL_INLINE void multiply_rows(const float* weight, int64_t channels, const float* h, const float* bias, float* out) {
  F32 acc[ROWS];
  for (int r = 0; r < ROWS; ++r) acc[r] = zero();
  for_lanes(channels, [&](int64_t i, int n) UNSPOOL_BODY {
    const F32 part = load(h + i);
    for (int r = 0; r < ROWS; ++r) acc[r] = fma(load_first(weight + r * channels + i, n), part, acc[r]);
  });
  sums<ROWS>(acc, out);
  if (bias)
    for (int r = 0; r < ROWS; ++r) out[r] += bias[r];
}

// Rows [first, end) of one gate for one lane.
UNSPOOL_INLINE void multiply_range(const RecurrentCellArguments& a, int64_t head, int64_t gate, int64_t first,
                                   int64_t end, const CellLane& lane) {
  const int64_t d = a.channels, at = (head * CELL_GATES[a.cell] + gate) * d;
  const float *weight = a.weight + at * d, *bias = at_offset(a.bias, at);
  float* out = lane.activations + gate * padded_channels(a);
  int64_t row = first;
  for (; row + 4 <= end; row += 4)
    multiply_rows<4>(weight + row * d, d, lane.states, at_offset(bias, row), out + row);
  for (; row < end; ++row) multiply_rows<1>(weight + row * d, d, lane.states, at_offset(bias, row), out + row);
}

inline void multiply_as_it_is(const RecurrentCellArguments& a, int64_t head, const CellLane* lanes, int64_t count) {
  const int64_t rows = most(round_up(MATRIX_BLOCK / a.channels, 4), 4);
  for (int64_t gate = 0; gate < CELL_GATES[a.cell]; ++gate)
    for (int64_t row = 0; row < a.channels; row += rows)
      for (int64_t i = 0; i < count; ++i)
        multiply_range(a, head, gate, row, least(row + rows, a.channels), lanes[i]);
}

// A packed matrix has, for each vector of outputs, all inputs of place 0, then of place 8, and so on: the order in which
// the sixteen sums are added up.
constexpr int PLACES[] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};

inline void pack_vector(const RecurrentCellArguments& a, int64_t head, int64_t vector) {
  const int64_t d = a.channels, padded = padded_channels(a), blocks = padded / LANES;
  const int64_t gate = vector / blocks, row = vector % blocks * LANES;
  const float* weight = a.weight + ((head * CELL_GATES[a.cell] + gate) * d + row) * d;
  float* out = a.packed + (head * output_vectors(a) + vector) * padded * LANES;
  for (int place : PLACES)
    for (int64_t in = place; in < padded; in += LANES, out += LANES)
      for (int64_t r = 0; r < LANES; ++r) out[r] = in < d && row + r < d ? weight[r * d + in] : 0.0f;
}

// VECTORS vectors of outputs for COUNT lanes.
template <int VECTORS, int COUNT>
struct MatrixTile {
  const float* packed;  // of the first vector
  int64_t padded;       // channels
  const CellLane* lanes;

  struct Sums { F32 at[VECTORS][COUNT]; };

  // The sum over SPAN neighbours in PLACES, from place i on.
  template <int SPAN>
  UNSPOOL_INLINE Sums total(int i) const {
    Sums y;
    if constexpr (SPAN == 1) {
      y = place(i);
    } else {
      const Sums first = total<SPAN / 2>(i), second = total<SPAN / 2>(i + SPAN / 2);
      for (int v = 0; v < VECTORS; ++v)
        for (int c = 0; c < COUNT; ++c) y.at[v][c] = add(first.at[v][c], second.at[v][c]);
    }
    return y;
  }
  UNSPOOL_INLINE Sums place(int i) const {
    Sums y;
    for (int v = 0; v < VECTORS; ++v)
      for (int c = 0; c < COUNT; ++c) y.at[v][c] = zero();
    const float* weight = packed + i * padded;
    for (int64_t in = PLACES[i]; in < padded; in += LANES, weight += LANES) {
      F32 h[COUNT];
      for (int c = 0; c < COUNT; ++c) h[c] = broadcast(lanes[c].states[in]);
      for (int v = 0; v < VECTORS; ++v) {
        const F32 w = load(weight + v * padded * LANES);
        for (int c = 0; c < COUNT; ++c) y.at[v][c] = fma(w, h[c], y.at[v][c]);
      }
    }
    return y;
  }
};

template <int VECTORS, int COUNT>
inline void multiply_tile(const RecurrentCellArguments& a, int64_t head, int64_t vector, const CellLane* lanes) {
  const int64_t padded = padded_channels(a), blocks = padded / LANES;
  const float* packed = a.packed + (head * output_vectors(a) + vector) * padded * LANES;
  const auto sums = MatrixTile<VECTORS, COUNT>{packed, padded, lanes}.template total<LANES>(0);
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t gate = (vector + v) / blocks, row = (vector + v) % blocks * LANES;
    F32 bias;
    if (a.bias)
      bias = load_first(a.bias + (head * CELL_GATES[a.cell] + gate) * a.channels + row, (int)least(LANES, a.channels - row));
    for (int c = 0; c < COUNT; ++c)
      store(lanes[c].activations + (vector + v) * LANES, a.bias ? add(sums.at[v][c], bias) : sums.at[v][c]);
  }
}

template <int VECTORS>
inline void multiply_vectors(const RecurrentCellArguments& a, int64_t head, int64_t vector, const CellLane* lanes,
                             int64_t count) {
  int64_t i = 0;
  for (; i + TILE_LANES <= count; i += TILE_LANES) multiply_tile<VECTORS, TILE_LANES>(a, head, vector, lanes + i);
  for (; i < count; ++i) multiply_tile<VECTORS, 1>(a, head, vector, lanes + i);
}

inline void multiply_packed(const RecurrentCellArguments& a, int64_t head, const CellLane* lanes, int64_t count) {
  const int64_t vectors = output_vectors(a);
  int64_t vector = 0;
  for (; vector + TILE_VECTORS <= vectors; vector += TILE_VECTORS)
    multiply_vectors<TILE_VECTORS>(a, head, vector, lanes, count);
  for (; vector < vectors; ++vector) multiply_vectors<1>(a, head, vector, lanes, count);
}

// The activations of all lanes.
inline void multiply(const RecurrentCellArguments& a, int64_t head, const CellLane* lanes, int64_t count) {
  if constexpr (PACKS_MATRICES)
    if (packs_matrix(a)) return multiply_packed(a, head, lanes, count);
  multiply_as_it_is(a, head, lanes, count);
}

}  // namespace UNSPOOL_ISA
