// Softmax attention over sinks and a sliding window in one ring of rows per slot. The ring is divided into pieces; each
// gives a shard of the softmax, and a token's shards are merged in order, by whichever thread.
#pragma once

#include "packed_tokens.h"

namespace UNSPOOL_ISA {

constexpr int64_t SHARD_ROWS = 128;
#if defined(UNSPOOL_AVX512)
constexpr int SHARD_QUERIES = 4;  // that share one pass over the rows, as far as registers go
#else
constexpr int SHARD_QUERIES = 1;
#endif
constexpr int CHANNEL_VECTORS = 4;

// Shards of one token and head: for each query and piece the unnormalised output, its mass and its maximum.
struct Shards {
  float* at;
  int64_t pieces, channels;
  float* shard(int64_t query, int64_t piece) const { return at + (query * pieces + piece) * (channels + 2); }
};

// What a token sees of one piece of the ring: `count` rows, the first `sinks` of them sinks.
template <typename T>
struct RingPiece {
  const T* keys;
  const T* values;
  int64_t channels, sinks, count;
};

UNSPOOL_INLINE int64_t shard_pieces(const RingAttentionArguments& a) { return ceil_div(a.rows, SHARD_ROWS); }
UNSPOOL_INLINE int64_t shard_floats(const RingAttentionArguments& a) {
  return a.queries * shard_pieces(a) * (a.channels + 2);
}
UNSPOOL_INLINE Shards shards_at(const RingAttentionArguments& a, int64_t place) {
  return {a.shards + place * shard_floats(a), shard_pieces(a), a.channels};
}

// Scores of ROWS rows from `row` on, of QUERIES queries.
template <int ROWS, int QUERIES, typename T>
UNSPOOL_INLINE void score_rows(const float* q, const RingPiece<T>& ring, int64_t row, float (*scores)[SHARD_ROWS]) {
  F32 acc[QUERIES][ROWS];
  for (int g = 0; g < QUERIES; ++g)
    for (int r = 0; r < ROWS; ++r) acc[g][r] = zero();
  for_lanes(ring.channels, [&](int64_t i, int n) UNSPOOL_BODY {
    F32 key[ROWS];
    for (int r = 0; r < ROWS; ++r) key[r] = load_first(ring.keys + (row + r) * ring.channels + i, n);
    for (int g = 0; g < QUERIES; ++g) {
      const F32 query = load_first(q + g * ring.channels + i, n);
      for (int r = 0; r < ROWS; ++r) acc[g][r] = fma(key[r], query, acc[g][r]);
    }
  });
  for (int g = 0; g < QUERIES; ++g) sums<ROWS>(acc[g], scores[g] + row);
}

template <int QUERIES, typename T>
UNSPOOL_INLINE void score_range(const float* q, const RingPiece<T>& ring, int64_t first, int64_t end,
                                float (*scores)[SHARD_ROWS]) {
  int64_t row = first;
  for (; row + 4 <= end; row += 4) score_rows<4, QUERIES>(q, ring, row, scores);
  for (; row < end; ++row) score_rows<1, QUERIES>(q, ring, row, scores);
}

// Turns `count` scores, unscaled, into weights; returns their mass and maximum.
UNSPOOL_INLINE void weigh_scores(float* scores, int64_t count, float scale, float* mass, float* maximum) {
  const float closed = -__builtin_inff();
  F32 peak = broadcast(closed), total = zero();
  for_lanes(count, [&](int64_t i, int n) UNSPOOL_BODY {
    const F32 score = n == LANES ? load(scores + i) : load_first(scores + i, n, closed);
    peak = max(peak, mul(score, broadcast(scale)));
  });
  *maximum = largest(peak);
  for_vectors(count, [&](int64_t i, int n) UNSPOOL_BODY {
    const F32 score = n == LANES ? load(scores + i) : load_first(scores + i, n, closed);
    const F32 weight = exp(sub(mul(score, broadcast(scale)), broadcast(*maximum)));
    store(scores + i, weight);
    total = add(total, weight);
  });
  *mass = sum(total);
}

// VECTORS vectors of channels, from channel i on, of the weighted sums of the values; n lanes of the last one count.
template <int QUERIES, int VECTORS, typename T>
UNSPOOL_INLINE void weigh_values(const float (*weights)[SHARD_ROWS], const RingPiece<T>& ring, int64_t i, int n,
                                 float* const* out) {
  F32 acc[QUERIES][VECTORS];
  for (int g = 0; g < QUERIES; ++g)
    for (int j = 0; j < VECTORS; ++j) acc[g][j] = zero();
  for (int64_t row = 0; row < ring.count; ++row) {
    F32 value[VECTORS];
    for (int j = 0; j < VECTORS; ++j)
      value[j] = load_first(ring.values + row * ring.channels + i + j * LANES, j + 1 < VECTORS ? LANES : n);
    for (int g = 0; g < QUERIES; ++g) {
      const F32 weight = broadcast(weights[g][row]);
      for (int j = 0; j < VECTORS; ++j) acc[g][j] = fma(value[j], weight, acc[g][j]);
    }
  }
  for (int g = 0; g < QUERIES; ++g)
    for (int j = 0; j < VECTORS; ++j) store_first(out[g] + i + j * LANES, acc[g][j], j + 1 < VECTORS ? LANES : n);
}

// The shards of QUERIES queries of one token, at out[query] [channels + 2].
template <int QUERIES, typename T>
inline void attend_shard(const float* q, const float* sink_q, const RingPiece<T>& ring, float* const* out) {
  float scores[QUERIES][SHARD_ROWS];
  const int64_t channels = ring.channels;
  score_range<QUERIES>(sink_q, ring, 0, ring.sinks, scores);
  score_range<QUERIES>(q, ring, ring.sinks, ring.count, scores);
  const float scale = 1.0f / __builtin_sqrtf((float)channels);
  for (int g = 0; g < QUERIES; ++g)
    weigh_scores(scores[g], ring.count, scale, out[g] + channels, out[g] + channels + 1);
  constexpr int64_t BLOCK = CHANNEL_VECTORS * LANES;
  int64_t i = 0;
  for (; i + BLOCK <= channels; i += BLOCK) weigh_values<QUERIES, CHANNEL_VECTORS>(scores, ring, i, LANES, out);
  for (; i < channels; i += LANES) weigh_values<QUERIES, 1>(scores, ring, i, (int)least(LANES, channels - i), out);
}

// All queries from `query` on: as many at once as there are registers for, then ever fewer.
template <int QUERIES, typename T>
inline void attend_queries(const RingAttentionArguments& a, int64_t at, int64_t query, const RingPiece<T>& ring,
                           const Shards& shards, int64_t piece) {
  for (; query + QUERIES <= a.queries; query += QUERIES) {
    const int64_t offset = (at * a.queries + query) * a.channels;
    float* out[QUERIES];
    for (int g = 0; g < QUERIES; ++g) out[g] = shards.shard(query + g, piece);
    attend_shard<QUERIES>(a.q + offset, a.sink_q + offset, ring, out);
  }
  if constexpr (QUERIES > 1)
    if (query < a.queries) attend_queries<QUERIES / 2>(a, at, query, ring, shards, piece);
}

UNSPOOL_INLINE int64_t row_of_position(const RingAttentionArguments& a, int64_t position) {
  return position < a.sinks ? position : a.sinks + (position - a.sinks) % (a.rows - a.sinks);
}

template <typename T>
UNSPOOL_INLINE void copy_row(const float* x, int64_t channels, T* row) {
  for_lanes(channels, [&](int64_t i, int n) UNSPOOL_BODY { store_first(row + i, load_first(x + i, n), n); });
}

// Writes the token `at` (token times heads + head) of this position if its row is in the piece, and attends to the piece.
template <typename T>
inline void visit_piece(const RingAttentionArguments& a, T* keys, T* values, int64_t at, int64_t position,
                        const Shards& shards, int64_t piece) {
  const int64_t first = piece * SHARD_ROWS, end = least(first + SHARD_ROWS, a.rows), d = a.channels;
  const int64_t row = row_of_position(a, position);
  if (row >= first && row < end) {
    copy_row(a.k + at * d, d, keys + row * d);
    copy_row(a.v + at * d, d, values + row * d);
  }
  const int64_t count = least(position + 1, end) - first;
  if (count > 0) {
    const int64_t sinks = most(0, least(a.sinks - first, count));
    attend_queries<SHARD_QUERIES, T>(a, at, 0, {keys + first * d, values + first * d, d, sinks, count}, shards, piece);
    return;
  }
  for (int64_t g = 0; g < a.queries; ++g) {
    float* shard = shards.shard(g, piece);
    shard[d] = 0.0f;
    shard[d + 1] = -__builtin_inff();
  }
}

inline void merge_query(const RingAttentionArguments& a, int64_t at, int64_t query, const Shards& shards) {
  const int64_t d = a.channels, index = at * a.queries + query;
  float top = -__builtin_inff(), mass = 0.0f;
  for (int64_t p = 0; p < shards.pieces; ++p) {
    const float maximum = shards.shard(query, p)[d + 1];
    top = maximum > top ? maximum : top;
  }
  float* o = a.o + index * d;
  fill_zeros(o, d);
  for (int64_t p = 0; p < shards.pieces; ++p) {
    const float* shard = shards.shard(query, p);
    if (shard[d] == 0.0f) continue;
    const F32 weight = exp(broadcast(shard[d + 1] - top));
    mass += first_lane(weight) * shard[d];
    for_lanes(d, [&](int64_t i, int n) UNSPOOL_BODY {
      store_first(o + i, fma(load_first(shard + i, n), weight, load_first(o + i, n)), n);
    });
  }
  const F32 share = div(broadcast(1.0f), broadcast(mass));
  for_lanes(d, [&](int64_t i, int n) UNSPOOL_BODY { store_first(o + i, mul(load_first(o + i, n), share), n); });
  a.log_mass[index] = top + unspool::logarithm(mass);
  a.row_max[index] = top;
}

inline void clear_tokens(const RingAttentionArguments& a, const Span& span, int64_t head) {
  for (int64_t t = span.first; t < span.end; ++t) {
    const int64_t at = (t * a.heads + head) * a.queries;
    fill_zeros(a.o + at * a.channels, a.queries * a.channels);
    fill_zeros(a.log_mass + at, a.queries);
    fill_zeros(a.row_max + at, a.queries);
  }
}

// Visits pieces [first, end) of one head's ring with all tokens of a sequence; the shards of all pieces are merged at
// once if `merges`, else kept for each token.
template <typename T>
inline void visit_ring(const RingAttentionArguments& a, int64_t sequence, int64_t head, int64_t first, int64_t end,
                       int64_t thread, bool merges) {
  const Span span = span_of(a.sequences, sequence);
  if (span.is_padding()) return;
  T* keys = (T*)a.keys + span.slot * a.keys_stride + head * a.rows * a.channels;
  T* values = (T*)a.values + span.slot * a.values_stride + head * a.rows * a.channels;
  int64_t position = a.positions[sequence];
  for (int64_t t = span.first; t < span.end; ++t, ++position) {
    const int64_t at = t * a.heads + head;
    const Shards shards = shards_at(a, merges ? thread : at);
    for (int64_t piece = first; piece < end; ++piece) visit_piece(a, keys, values, at, position, shards, piece);
    if (merges)
      for (int64_t g = 0; g < a.queries; ++g) merge_query(a, at, g, shards);
  }
}

// Whether threads share the rings' pieces, keeping all shards, because heads alone are few work for them.
UNSPOOL_INLINE bool shares_rings(const RingAttentionArguments& a) { return num_tokens(a.sequences) <= a.sequences.count; }

template <typename T>
inline void attend_rings(const RingAttentionArguments& a, Team& team, int thread) {
  const int64_t heads = a.sequences.count * a.heads, pieces = shard_pieces(a);
  const bool shared = shares_rings(a);
  team.for_each(thread, shared ? heads * pieces : heads, [&](int64_t index) {
    const int64_t pair = shared ? index / pieces : index, piece = shared ? index % pieces : 0;
    visit_ring<T>(a, pair / a.heads, pair % a.heads, piece, shared ? piece + 1 : pieces, thread, !shared);
  });
  team.for_each(thread, heads, [&](int64_t pair) {
    const Span span = span_of(a.sequences, pair / a.heads);
    if (span.is_padding()) return clear_tokens(a, span, pair % a.heads);
    if (!shared) return;
    for (int64_t at = span.first * a.heads + pair % a.heads; at < span.end * a.heads; at += a.heads)
      for (int64_t g = 0; g < a.queries; ++g) merge_query(a, at, g, shards_at(a, at));
  });
}

inline const char* ring_attention(const RingAttentionArguments* a, int threads) {
  const int64_t work = num_tokens(a->sequences) * a->heads * a->queries * a->rows * a->channels;
  run(team_size(work, threads), [&](Team& team, int thread) {
    if (a->state_format == FLOAT16) attend_rings<Half>(*a, team, thread);
    else attend_rings<float>(*a, team, thread);
  });
  return nullptr;
}

inline const char* ring_attention_workspace(const RingAttentionArguments* a, int threads) {
  const int64_t places = shares_rings(*a) ? num_tokens(a->sequences) * a->heads : threads;
  const_cast<RingAttentionArguments*>(a)->workspace = places * shard_floats(*a);
  return nullptr;
}

}  // namespace UNSPOOL_ISA
