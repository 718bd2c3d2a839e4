// The row kernel over V-first matrix states: S_t = S_{t-1} (diag(a) + p b^T) + v k^T and o = S q. Stage 1 finds each
// token's decays and, with a stabilizer, its maximum. Stage 2 takes some rows of one head's state through all tokens of a
// sequence in order. Rows know nothing of each other, so neither threads nor blocks change a result.
#pragma once

#include "packed_tokens.h"

namespace UNSPOOL_ISA {

#if defined(UNSPOOL_SCALAR)
constexpr bool ROWS_ARE_BLOCKED = false;
#else
constexpr bool ROWS_ARE_BLOCKED = true;  // four rows at once pay where vectors have registers
#endif

// States that are larger than a core's cache are fetched this much ahead of the rows that are visited: a processor that
// also waits for sums does not look so far ahead by itself.
constexpr int64_t CACHED_BYTES = 1 << 20;
constexpr int64_t FETCH_AHEAD = 16384;
// Narrow rows that an erase reads are kept in float32 until they change, so that they are converted once. So many keys
// at most: the copies belong into L1.
constexpr int64_t MOST_COPIED_KEYS = 256;

// One token of one head, as its rows need it.
struct RowToken {
  const float* q;      // [queries, keys]
  const float* k;
  const float* v;      // [values]
  const float* p;      // what an erase reads,
  const float* b;      // and along what it writes
  const float* decay;  // [keys] or [values], as the gate has it
  const float* bonus_weight;
  float keep;          // a, where one number is the decay
  float read_scale;    // of p
  float strength;      // beta
  float enter;         // what scales v
};

inline void prepare_stabilizer(const RowStateArguments& a, const Span& span, int64_t head) {
  float* state = a.max_state + span.slot * a.max_stride + head;
  for (int64_t t = span.first; t < span.end; ++t) {
    const int64_t at = t * a.heads + head;
    const float kept = a.log_decay[at] + *state, input = a.log_input[at];
    const float maximum = kept > input ? kept : input;
    const F32 shift = shift_of(broadcast(maximum));
    a.scalars[2 * at] = first_lane(exp(sub(broadcast(kept), shift)));
    a.scalars[2 * at + 1] = first_lane(exp(sub(broadcast(input), shift)));
    a.m[at] = *state = maximum;
  }
}

UNSPOOL_INLINE void exponentials(const float* x, int64_t size, float* y) {
  for_vectors(size, [&](int64_t i, int n) UNSPOOL_BODY { store_first(y + i, exp(load_first(x + i, n)), n); });
}

inline void prepare_decay(const RowStateArguments& a, int64_t at, int64_t head) {
  float keep = 1.0f;
  switch (a.gate) {
    case ROW_GATE_CONSTANT: keep = first_lane(exp(broadcast(a.log_decay[head]))); break;
    case ROW_GATE_SCALAR: keep = first_lane(exp(broadcast(a.log_decay[at]))); break;
    case ROW_GATE_KEY: exponentials(a.log_decay + at * a.keys, a.keys, a.decay + at * a.keys); break;
    case ROW_GATE_VALUE: exponentials(a.log_decay + at * a.values, a.values, a.decay + at * a.values); break;
  }
  a.scalars[2 * at] = keep;
  a.scalars[2 * at + 1] = 1.0f;
}

inline void prepare_bonus(const RowStateArguments& a, int64_t at, int64_t head) {
  const float *k = a.k + at * a.keys, *bonus = a.bonus + head * a.keys;
  for (int64_t g = 0; g < a.queries; ++g) {
    const float* q = a.q + (at * a.queries + g) * a.keys;
    F32 acc = zero();
    for_lanes(a.keys, [&](int64_t i, int n) UNSPOOL_BODY {
      acc = fma(load_first(q + i, n), mul(load_first(bonus + i, n), load_first(k + i, n)), acc);
    });
    a.bonus_weight[at * a.queries + g] = sum(acc);
  }
}

// Stage 1 for all tokens of one sequence and one head.
inline void prepare_row_tokens(const RowStateArguments& a, const Span& span, int64_t head) {
  if (span.is_padding()) return;
  if (a.log_input) return prepare_stabilizer(a, span, head);
  for (int64_t t = span.first; t < span.end; ++t) {
    const int64_t at = t * a.heads + head, row = at * a.keys;
    if (a.gate != ROW_GATE_NONE) prepare_decay(a, at, head);
    if (a.bonus) prepare_bonus(a, at, head);
    if (a.decayed_key)
      for_lanes(a.keys, [&](int64_t i, int n) UNSPOOL_BODY {
        store_first(a.decayed_key + row + i, mul(load_first(a.decay + row + i, n), load_first(a.k + row + i, n)), n);
      });
  }
}

UNSPOOL_INLINE RowToken row_token(const RowStateArguments& a, int64_t at) {
  const bool parallel = a.erase == ROW_ERASE_PARALLEL;
  RowToken t;
  t.q = a.q + at * a.queries * a.keys;
  t.k = a.k + at * a.keys;
  t.v = a.v + at * a.values;
  t.p = parallel && !a.decayed_key ? t.k : at_offset(parallel ? a.decayed_key : a.erase_read, at * a.keys);
  t.b = at_offset(a.erase_write, at * a.keys);
  t.decay = at_offset(a.decay, at * (a.gate == ROW_GATE_KEY ? a.keys : a.values));
  t.bonus_weight = at_offset(a.bonus_weight, at * a.queries);
  t.keep = a.scalars ? a.scalars[2 * at] : 1.0f;
  t.enter = a.scalars ? a.scalars[2 * at + 1] : 1.0f;
  t.read_scale = a.decayed_key ? 1.0f : t.keep;
  t.strength = parallel ? a.beta[at] : 1.0f;
  return t;
}

// ROWS dot products with x; with `copy` the rows are also left there.
template <typename T, int ROWS, bool COPY = false>
UNSPOOL_INLINE void dot_rows(const T* state, int64_t keys, const float* x, float* out, float* copy = nullptr) {
  F32 acc[ROWS];
  for (int r = 0; r < ROWS; ++r) acc[r] = zero();
  for_lanes(keys, [&](int64_t i, int n) UNSPOOL_BODY {
    const F32 part = load_first(x + i, n);
    for (int r = 0; r < ROWS; ++r) {
      const F32 s = load_first(state + r * keys + i, n);
      if constexpr (COPY) store_first(copy + r * keys + i, s, n);
      acc[r] = fma(s, part, acc[r]);
    }
  });
  sums<ROWS>(acc, out);
}

// What an erase has read of ROWS rows before they change, s . p, and with COPIES the rows themselves in float32.
template <int ROWS, bool COPIES>
struct RowsRead {
  float erased[ROWS];
  alignas(64) float copy[COPIES ? ROWS * MOST_COPIED_KEYS : 1];
};

template <typename T, int ROWS, int ERASE, bool COPIES>
UNSPOOL_INLINE void read_rows(const T* state, int64_t keys, const RowToken& t, RowsRead<ROWS, COPIES>& out) {
  if constexpr (ERASE != ROW_ERASE_NONE) dot_rows<T, ROWS, COPIES>(state, keys, t.p, out.erased, out.copy);
}

// Folds the token into ROWS rows, and with READ reads them with its first query: value is what enters, `rows`
// what the state holds. The query meets the rows as they are before the state rounds them.
template <typename T, int ROWS, int ERASE, bool KEY_GATE, bool READ, typename S>
UNSPOOL_INLINE void fold_rows(T* state, const S* rows, int64_t keys, const RowToken& t, const float* value,
                              const float* keep, const float* erased, float* out) {
  F32 v[ROWS], kept[ROWS], e[ROWS], acc[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    v[r] = broadcast(value[r]);
    kept[r] = broadcast(keep[r]);
    if constexpr (ERASE == ROW_ERASE_GENERAL) e[r] = broadcast(erased[r]);
    acc[r] = zero();
  }
  for_lanes(keys, [&](int64_t i, int n) UNSPOOL_BODY {
    const F32 k = load_first(t.k + i, n);
    F32 decay, b, q;
    if constexpr (KEY_GATE) decay = load_first(t.decay + i, n);
    if constexpr (ERASE == ROW_ERASE_GENERAL) b = load_first(t.b + i, n);
    if constexpr (READ) q = load_first(t.q + i, n);
    for (int r = 0; r < ROWS; ++r) {
      F32 s = load_first(rows + r * keys + i, n);
      if constexpr (KEY_GATE) s = mul(s, decay);
      else s = mul(s, kept[r]);
      if constexpr (ERASE == ROW_ERASE_GENERAL) s = fma(e[r], b, s);
      s = fma(v[r], k, s);
      store_first(state + r * keys + i, s, n);
      if constexpr (READ) acc[r] = fma(s, q, acc[r]);
    }
  });
  if constexpr (READ) sums<ROWS>(acc, out);
}

// One token and ROWS rows from `row` on; `state` is where these begin and `o` the output of the first of them.
template <typename T, int ROWS, int ERASE, bool KEY_GATE, bool COPIES>
UNSPOOL_INLINE void change_rows(const RowStateArguments& a, const RowToken& t, const RowsRead<ROWS, COPIES>& read,
                                T* state, int64_t row, float* o) {
  float v[ROWS], value[ROWS], keep[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    v[r] = row + r < a.values ? t.v[row + r] : 1.0f;
    keep[r] = a.gate == ROW_GATE_VALUE ? t.decay[row + r] : t.keep;
    value[r] = v[r] * t.enter;
    if constexpr (ERASE == ROW_ERASE_PARALLEL) value[r] = t.strength * (v[r] - t.read_scale * read.erased[r]);
  }
  const auto rows = [&]() UNSPOOL_BODY {
    if constexpr (COPIES) return (const float*)read.copy;
    else return (const T*)state;
  }();
  if (!a.read_before) {
    fold_rows<T, ROWS, ERASE, KEY_GATE, true>(state, rows, a.keys, t, value, keep, read.erased, o);
    for (int64_t g = 1; g < a.queries; ++g) dot_rows<T, ROWS>(state, a.keys, t.q + g * a.keys, o + g * a.rows);
    return;
  }
  for (int64_t g = 0; g < a.queries; ++g) {
    dot_rows<T, ROWS>(state, a.keys, t.q + g * a.keys, o + g * a.rows);
    if (a.bonus)
      for (int r = 0; r < ROWS; ++r) o[g * a.rows + r] += t.bonus_weight[g] * v[r];
  }
  fold_rows<T, ROWS, ERASE, KEY_GATE, false>(state, rows, a.keys, t, value, keep, read.erased, o);
}

UNSPOOL_INLINE void fetch_ahead(const void* rows, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch((const char*)rows + FETCH_AHEAD + i);
}

// A piece of stage 2: some rows of one head, and whether they come from memory.
struct RowPiece {
  int64_t head, first_row, end_row;
  bool fetches;
};

// One token and the rows [first, end), a multiple of ROWS. What an erase reads is read one step early, so
// that the processor folds some rows while it waits for the sums of the next ones.
template <typename T, int ROWS, int ERASE, bool KEY_GATE, bool COPIES>
UNSPOOL_INLINE void visit_rows(const RowStateArguments& a, const RowToken& t, T* state, int64_t first, int64_t end,
                               bool fetches, float* o) {
  if (first == end) return;
  RowsRead<ROWS, COPIES> read[2];
  int turn = 0;
  read_rows<T, ROWS, ERASE>(state + first * a.keys, a.keys, t, read[turn]);
  for (int64_t row = first; row < end; row += ROWS, turn ^= 1) {
    T* at = state + row * a.keys;
    if (fetches) fetch_ahead(at, ROWS * a.keys * (int64_t)sizeof(T));
    if (row + ROWS < end) read_rows<T, ROWS, ERASE>(at + ROWS * a.keys, a.keys, t, read[turn ^ 1]);
    change_rows<T, ROWS, ERASE, KEY_GATE>(a, t, read[turn], at, row, o + row);
  }
}

// Stage 2: takes a piece through all tokens of a sequence.
template <typename T, int ROWS, int ERASE, bool KEY_GATE, bool COPIES>
void sweep_rows(const RowStateArguments& a, const Span& span, const RowPiece& piece) {
  T* state = (T*)a.state + span.slot * a.state_stride + piece.head * a.rows * a.keys;
  const int64_t blocked = piece.first_row + (piece.end_row - piece.first_row) / ROWS * ROWS;
  for (int64_t t = span.first; t < span.end; ++t) {
    const int64_t at = t * a.heads + piece.head;
    const RowToken token = row_token(a, at);
    const bool fetches = piece.fetches && t == span.first;
    float* o = a.o + at * a.queries * a.rows;
    visit_rows<T, ROWS, ERASE, KEY_GATE, COPIES>(a, token, state, piece.first_row, blocked, fetches, o);
    if constexpr (ROWS > 1)
      visit_rows<T, 1, ERASE, KEY_GATE, COPIES>(a, token, state, blocked, piece.end_row, fetches, o);
  }
}

using RowSweep = void (*)(const RowStateArguments&, const Span&, const RowPiece&);

template <typename T, int ROWS, int ERASE>
UNSPOOL_INLINE RowSweep choose_by_gate(const RowStateArguments& a) {
  if constexpr (ERASE != ROW_ERASE_NONE && sizeof(T) < sizeof(float))
    if (a.keys <= MOST_COPIED_KEYS)
      return a.gate == ROW_GATE_KEY ? sweep_rows<T, ROWS, ERASE, true, true> : sweep_rows<T, ROWS, ERASE, false, true>;
  return a.gate == ROW_GATE_KEY ? sweep_rows<T, ROWS, ERASE, true, false> : sweep_rows<T, ROWS, ERASE, false, false>;
}
template <typename T, int ROWS>
UNSPOOL_INLINE RowSweep choose_by_erase(const RowStateArguments& a) {
  switch (a.erase) {
    case ROW_ERASE_NONE: return choose_by_gate<T, ROWS, ROW_ERASE_NONE>(a);
    case ROW_ERASE_PARALLEL: return choose_by_gate<T, ROWS, ROW_ERASE_PARALLEL>(a);
    default: return choose_by_gate<T, ROWS, ROW_ERASE_GENERAL>(a);
  }
}
template <typename T>
UNSPOOL_INLINE RowSweep choose_row_sweep(const RowStateArguments& a) {
  if constexpr (ROWS_ARE_BLOCKED)
    if (a.row_block == 4) return choose_by_erase<T, 4>(a);
  return choose_by_erase<T, 1>(a);
}

inline const char* row_state(const RowStateArguments* arguments, int threads) {
  const RowStateArguments& a = *arguments;
  if ((a.row_block != 1 && a.row_block != 4) || a.value_rows < 1) return "tile: row_block 1 or 4, value_rows positive";
  const RowSweep sweep_piece = a.state_format == FLOAT16 ? choose_row_sweep<Half>(a) : choose_row_sweep<float>(a);
  const int64_t blocks = ceil_div(a.rows, a.value_rows), token_outputs = a.heads * a.queries * a.rows;
  const int64_t state_bytes = a.sequences.count * a.heads * a.rows * a.keys * (a.state_format == FLOAT16 ? 2 : 4);
  const bool prepares = a.gate != ROW_GATE_NONE || a.bonus;
  run(team_size(num_tokens(a.sequences) * a.heads * a.rows * a.keys, threads), [&](Team& team, int thread) {
    if (prepares)
      team.for_each(thread, a.sequences.count * a.heads, [&](int64_t piece) {
        prepare_row_tokens(a, span_of(a.sequences, piece / a.heads), piece % a.heads);
      });
    team.for_each(thread, a.sequences.count * a.heads * blocks, [&](int64_t piece) {
      const Span span = span_of(a.sequences, piece / (a.heads * blocks));
      const int64_t head = piece / blocks % a.heads, row = piece % blocks * a.value_rows;
      if (!span.is_padding())
        return sweep_piece(a, span, {head, row, least(row + a.value_rows, a.rows), state_bytes > CACHED_BYTES});
      if (piece % (a.heads * blocks) != 0) return;
      fill_zeros(a.o + span.first * token_outputs, (span.end - span.first) * token_outputs);
      if (a.m) fill_zeros(a.m + span.first * a.heads, (span.end - span.first) * a.heads);
    });
  });
  return nullptr;
}

}  // namespace UNSPOOL_ISA
