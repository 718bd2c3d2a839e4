// Elman, LSTM, GRU and sLSTM cells: a fused loop over the tokens, with one recurrent matrix per head. A piece is one head
// of a few sequences, whose matrix rows are read once for all of them at every step.
#pragma once

#include "recurrent_matrix.h"

namespace UNSPOOL_ISA {

constexpr int MOST_SEQUENCES = 8;  // in one piece
constexpr int CELL_STATES[] = {1, 2, 1, 4};

// log(sigmoid(x)) = min(x, 0) - log(1 + e) with e = exp(-|x|), and log(1 + e) = 2 artanh(e / (2 + e)).
UNSPOOL_INLINE F32 log_sigmoid(F32 x) {
  const F32 e = exp(negative_abs(x)), s = div(e, add(e, broadcast(2.0f))), square = mul(s, s);
  F32 y = broadcast(1.0f / 17.0f);
  for (int odd = 15; odd >= 1; odd -= 2) y = fma(y, square, broadcast(1.0f / (float)odd));
  return sub(min(x, zero()), mul(add(s, s), y));
}

// New states from x and r = R h + bias, sixteen channels of each gate or state.
UNSPOOL_INLINE void step_elman(const F32* x, const F32* r, F32* s) { s[0] = tanh(add(x[0], r[0])); }
UNSPOOL_INLINE void step_lstm(const F32* x, const F32* r, F32* s) {
  const F32 enter = mul(sigmoid(add(x[0], r[0])), tanh(add(x[2], r[2])));
  s[1] = fma(sigmoid(add(x[1], r[1])), s[1], enter);
  s[0] = mul(sigmoid(add(x[3], r[3])), tanh(s[1]));
}
UNSPOOL_INLINE void step_gru(const F32* x, const F32* r, F32* s) {
  const F32 reset = sigmoid(add(x[0], r[0])), update = sigmoid(add(x[1], r[1]));
  const F32 next = tanh(fma(reset, r[2], x[2]));
  s[0] = fma(update, sub(s[0], next), next);
}
template <typename T>
UNSPOOL_INLINE void step_slstm(const T* state, const F32* x, const F32* r, F32* s) {
  const F32 input = add(x[0], r[0]), kept = add(log_sigmoid(add(x[1], r[1])), s[3]);
  s[3] = stored_maximum(state, kept, input, s[2]);
  const F32 shift = shift_of(s[3]), forget = exp(sub(kept, shift)), enter = exp(sub(input, shift));
  s[1] = fma(forget, s[1], mul(enter, tanh(add(x[2], r[2]))));
  s[2] = fma(forget, s[2], enter);
  s[0] = div(mul(sigmoid(add(x[3], r[3])), s[1]), s[2]);
}

template <int CELL, typename T>
inline void step_lane(const RecurrentCellArguments& a, const T* state, int64_t head, int64_t token, const CellLane& lane) {
  constexpr int gates = CELL_GATES[CELL], states = CELL_STATES[CELL];
  const int64_t d = a.channels, padded = padded_channels(a), at = token * a.heads + head;
  for_vectors(d, [&](int64_t i, int n) UNSPOOL_BODY {
    F32 x[gates], r[gates], s[states];
    for (int j = 0; j < gates; ++j) {
      x[j] = load_first(a.x + (at * gates + j) * d + i, n);
      r[j] = load(lane.activations + j * padded + i);
    }
    for (int j = 0; j < states; ++j) s[j] = load(lane.states + j * padded + i);
    if constexpr (CELL == CELL_ELMAN) step_elman(x, r, s);
    if constexpr (CELL == CELL_LSTM) step_lstm(x, r, s);
    if constexpr (CELL == CELL_GRU) step_gru(x, r, s);
    if constexpr (CELL == CELL_SLSTM) step_slstm(state, x, r, s);
    store_first(a.h + at * d + i, s[0], n);
    for (int j = 0; j < states; ++j) store_first(lane.states + j * padded + i, stored(state, s[j]), n);
  });
}

template <int CELL, typename T>
inline void step_lanes(const RecurrentCellArguments& a, int64_t head, CellLane* lanes, int64_t count) {
  const T* state = (const T*)a.state;
  for (int64_t step = 0; count > 0; ++step) {
    while (count > 0 && lanes[count - 1].tokens <= step) --count;  // the longest come first
    multiply(a, head, lanes, count);
    for (int64_t i = 0; i < count; ++i) step_lane<CELL>(a, state, head, lanes[i].first + step, lanes[i]);
  }
}

// Moves a lane's states out of its slot, or back.
template <typename T>
inline void load_states(const RecurrentCellArguments& a, int64_t head, const CellLane& lane) {
  const int64_t count = CELL_STATES[a.cell], slot = a.sequences.slots[lane.sequence];
  const T* state = (const T*)a.state + slot * a.state_stride + head * count * a.channels;
  for (int64_t j = 0; j < count; ++j)
    for_lanes(a.channels, [&](int64_t i, int n) UNSPOOL_BODY {
      store(lane.states + j * padded_channels(a) + i, load_first(state + j * a.channels + i, n));
    });
}
template <typename T>
inline void store_states(const RecurrentCellArguments& a, int64_t head, const CellLane& lane) {
  const int64_t count = CELL_STATES[a.cell], slot = a.sequences.slots[lane.sequence];
  T* state = (T*)a.state + slot * a.state_stride + head * count * a.channels;
  for (int64_t j = 0; j < count; ++j)
    for_lanes(a.channels, [&](int64_t i, int n) UNSPOOL_BODY {
      store_first(state + j * a.channels + i, load(lane.states + j * padded_channels(a) + i), n);
    });
}

UNSPOOL_INLINE int64_t lane_floats(const RecurrentCellArguments& a) {
  return (CELL_STATES[a.cell] + CELL_GATES[a.cell]) * padded_channels(a);
}

// The sequences [first, end) that have something to do, longest first. Padding ones get their zeros.
inline int64_t collect_lanes(const RecurrentCellArguments& a, int64_t head, int64_t first, int64_t end, float* scratch,
                             CellLane* lanes) {
  int64_t count = 0;
  for (int64_t s = first; s < end; ++s) {
    const Span span = span_of(a.sequences, s);
    if (span.is_padding()) {
      for (int64_t t = span.first; t < span.end; ++t) fill_zeros(a.h + (t * a.heads + head) * a.channels, a.channels);
      continue;
    }
    if (span.first == span.end) continue;
    float* states = scratch + count * lane_floats(a);
    CellLane lane = {s, span.first, span.end - span.first, states, states + CELL_STATES[a.cell] * padded_channels(a)};
    int64_t place = count++;
    for (; place > 0 && lanes[place - 1].tokens < lane.tokens; --place) lanes[place] = lanes[place - 1];
    lanes[place] = lane;
  }
  return count;
}

template <typename T>
inline void run_cells(const RecurrentCellArguments& a, int64_t head, int64_t first, int64_t end, float* scratch) {
  CellLane lanes[MOST_SEQUENCES];
  const int64_t count = collect_lanes(a, head, first, end, scratch, lanes);
  for (int64_t i = 0; i < count; ++i) load_states<T>(a, head, lanes[i]);
  switch (a.cell) {
    case CELL_ELMAN: step_lanes<CELL_ELMAN, T>(a, head, lanes, count); break;
    case CELL_LSTM: step_lanes<CELL_LSTM, T>(a, head, lanes, count); break;
    case CELL_GRU: step_lanes<CELL_GRU, T>(a, head, lanes, count); break;
    default: step_lanes<CELL_SLSTM, T>(a, head, lanes, count); break;
  }
  for (int64_t i = 0; i < count; ++i) store_states<T>(a, head, lanes[i]);
}

inline const char* recurrent_cell(const RecurrentCellArguments* arguments, int threads) {
  const RecurrentCellArguments& a = *arguments;
  const int64_t sequences = a.sequences.count;
  // Sequences share a pass over the matrix only where the heads alone keep the threads busy.
  const int64_t together = most(1, least(MOST_SEQUENCES, sequences * a.heads / (2 * threads)));
  const int64_t groups = ceil_div(sequences, together);
  const int64_t work = num_tokens(a.sequences) * a.heads * CELL_GATES[a.cell] * a.channels * a.channels;
  const int64_t vectors = output_vectors(a);
  run(team_size(work, threads), [&](Team& team, int thread) {
    if (packs_matrix(a))
      team.for_each(thread, a.heads * vectors, [&](int64_t piece) { pack_vector(a, piece / vectors, piece % vectors); });
    team.for_each(thread, a.heads * groups, [&](int64_t piece) {
      const int64_t first = piece % groups * together, end = least(first + together, sequences);
      float* scratch = a.scratch + thread * MOST_SEQUENCES * lane_floats(a);
      if (a.state_format == FLOAT16) run_cells<Half>(a, piece / groups, first, end, scratch);
      else run_cells<float>(a, piece / groups, first, end, scratch);
    });
  });
  return nullptr;
}

inline const char* recurrent_cell_workspace(const RecurrentCellArguments* a, int threads) {
  RecurrentCellArguments* out = const_cast<RecurrentCellArguments*>(a);
  out->scratch_floats = threads * MOST_SEQUENCES * lane_floats(*a);
  out->packed_floats = packed_floats(*a);
  return nullptr;
}

}  // namespace UNSPOOL_ISA
