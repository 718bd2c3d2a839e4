// The bank of one layer: which tokens that left the window stay exact. A token that leaves the window takes the next free
// row, or that of the entry of least priority if its own is higher; what does not stay is evicted, which the state is
// given. A decision waits for those before it, so one head of one sequence is one piece of work. It reads what earlier
// passes left in memory and nothing of this one, so it may run beside the projections.
#pragma once

#include "mixer_prepare.h"

namespace UNSPOOL_ISA {

constexpr int64_t FETCHED_ENTRIES = 256;  // of a bank, before the token's own score is known

// One key-value head's bank in one slot.
template <typename T>
struct Bank {
  const T* keys;        // [bank, head_dim], rotated
  const T* values;
  float* scores;        // [bank]
  int32_t* positions;
  const float* weight;  // [4 head_dim], of k, v, k^2 and v^2
  double aging;

  double priority(float score, int64_t position) const { return (double)score + aging * (double)position; }
};

template <typename T>
UNSPOOL_INLINE Bank<T> bank_at(const Model& m, const Layer& l, int64_t slot, int64_t head) {
  const int64_t d = m.head_dim, pair = slot * m.kv_heads + head;
  const int64_t row = pair * mixer_shape(m, l).rows + l.sinks + l.window;
  return {(const T*)l.near_keys + row * d, (const T*)l.near_values + row * d, l.bank_scores + pair * l.bank,
          l.bank_positions + pair * l.bank, l.bank_weight + head * 4 * d, (double)l.bank_aging[head]};
}

// The part of a priority that does not depend on the position, k unrotated: summed in float64 and rounded once, because a
// bit more or less can change who stays.
UNSPOOL_INLINE float bank_score(const float* weight, const float* k, const float* v, int64_t head_dim) {
  double sums[LANES] = {};
  for (int64_t i = 0; i < head_dim; i += LANES)
    for (int j = 0; j < LANES; ++j) {
      const float* w = weight + i + j;
      const float key = k[i + j], value = v[i + j];
      sums[j] += (double)w[0] * (double)key + (double)w[head_dim] * (double)value;
      sums[j] += (double)w[2 * head_dim] * (double)(key * key) + (double)w[3 * head_dim] * (double)(value * value);
    }
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  return (float)sums[0];
}

struct Weakest { int64_t row; double priority; };

// The entry of a full bank that gives way first: the first that stands at `too_old` or before, else the first of least
// priority.
template <typename T>
UNSPOOL_INLINE Weakest weakest_entry(const Bank<T>& bank, int64_t size, int64_t too_old) {
  Weakest found{0, (double)__builtin_inff()};
  for (int64_t row = 0; row < size; ++row) {
    if (bank.positions[row] <= too_old) return {row, -(double)__builtin_inff()};
    const double priority = bank.priority(bank.scores[row], bank.positions[row]);
    if (priority < found.priority) found = {row, priority};
  }
  return found;
}

// Which tokens of a pass, from `first` to `token`, one head is about.
struct Offer {
  int64_t head, first, token, leaving;  // `leaving` is the position that leaves the window at `token`
};

// Evicts an entry at o.token. Stage 2 writes the rows of a pass, so an entry that came in with this one is still found
// among what left the window.
template <typename T>
inline void evict_entry(const Model& m, const Layer& l, const MixerMemory& w, const Bank<T>& bank, const Offer& o,
                        int64_t row) {
  const int64_t d = m.head_dim, at = (o.token * m.kv_heads + o.head) * d, position = bank.positions[row];
  float *key = w.evicted_k + at, *value = w.written_v + at;
  const int64_t entered = o.token - (o.leaving - position);
  if (entered >= o.first) {
    const int64_t source = (entered * m.kv_heads + o.head) * d;
    std::memcpy(key, w.left_k + source, d * sizeof(float));
    std::memcpy(value, w.left_v + source, d * sizeof(float));
  } else {
    read_row(bank.keys + row * d, d, key);
    read_row(bank.values + row * d, d, value);
  }
  if (l.state_rope) return;
  float cosine[MOST_CHANNELS / 2], sine[MOST_CHANNELS / 2];
  fill_inverse(m, position, cosine, sine);
  rotate(key, cosine, sine, d, key);
}

// Decides about the token that leaves the window at o.token: its row in the bank, or -1. That no sequence brings more
// tokens than the window holds is why it is still in the ring.
template <typename T>
inline int64_t offer_token(const Model& m, const Layer& l, const MixerMemory& w, const Bank<T>& bank, const Offer& o,
                           const T* left_key, const T* left_value) {
  const int64_t d = m.head_dim, half = d / 2, at = (o.token * m.kv_heads + o.head) * d;
  float *k = w.left_k + at, *v = w.left_v + at, key[MOST_CHANNELS];
  read_row(left_key, d, k);
  read_row(left_value, d, v);
  rotate(k, w.inverse_cosine + o.token * half, w.inverse_sine + o.token * half, d, key);
  const float score = bank_score(bank.weight, key, v, d);
  int64_t row = o.leaving - l.sinks;
  if (row >= l.bank) {
    const Weakest weakest = weakest_entry(bank, l.bank, o.leaving + l.window - m.position_limit - 1);
    if (bank.priority(score, o.leaving) > weakest.priority) {
      row = weakest.row;
      evict_entry(m, l, w, bank, o, row);
    } else {
      std::memcpy(w.evicted_k + at, l.state_rope ? k : key, d * sizeof(float));
      std::memcpy(w.written_v + at, v, d * sizeof(float));
      return -1;
    }
  }
  bank.scores[row] = score;
  bank.positions[row] = (int32_t)o.leaving;
  return row;
}

// All tokens of one sequence, for one key-value head.
template <typename T>
inline void offer_tokens(const Model& m, const Layer& l, const MixerMemory& w, int64_t head, int64_t slot,
                         int64_t first_token, int64_t tokens, int64_t position) {
  const Bank<T> bank = bank_at<T>(m, l, slot, head);
  for (int64_t i = 0; i < least(l.bank, FETCHED_ENTRIES); i += LANES) {
    prefetch(bank.scores + i);
    prefetch(bank.positions + i);
  }
  const int64_t d = m.head_dim, ring = (slot * m.kv_heads + head) * mixer_shape(m, l).rows;
  for (int64_t t = first_token; t < first_token + tokens; ++t, ++position) {
    const Offer offer{head, first_token, t, position - l.window};
    const int64_t at = (ring + ring_row(l, position)) * d;
    w.bank_row[t * m.kv_heads + head] =
        offer.leaving < l.sinks
            ? -1
            : (int32_t)offer_token(m, l, w, bank, offer, (const T*)l.near_keys + at, (const T*)l.near_values + at);
  }
}

}  // namespace UNSPOOL_ISA
