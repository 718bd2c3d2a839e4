// The token mixer of one layer in three stages. Stage 1 prepares each token's heads: norms, rotations, features, gates,
// and the token that leaves the near set. Stage 2 sweeps the state: a piece is some rows of one head's ring, or some value
// rows of its matrix state, for all tokens of one sequence in order, so pieces never touch each other's memory and a
// chunk does to it exactly what single steps do. Stage 3 merges a token's pieces. See docs/layer.md for the formulas.
#pragma once

#include "mixer_bank.h"
#include "mixer_prepare.h"
#include "mixer_ring.h"
#include "mixer_state.h"

namespace UNSPOOL_ISA {

// Stage 3: the shards of one token's query head, to y [head_dim].
inline void merge_shards(const Model& m, const Layer& l, const MixerMemory& w, int64_t token, int64_t head,
                         int64_t position, float* y) {
  const MixerShape s = mixer_shape(m, l);
  const int64_t d = m.head_dim, pieces = ring_pieces(s.rows);
  const float* shards = w.ring + (token * m.heads + head) * pieces * (d + 2);
  float top = -__builtin_inff();
  for (int64_t p = 0; p < pieces; ++p) top = shards[p * (d + 2) + d + 1] > top ? shards[p * (d + 2) + d + 1] : top;
  float mass = 0.0f;
  for (int64_t i = 0; i < d; i += LANES) store(y + i, zero());
  for (int64_t p = 0; p < pieces; ++p) {
    const float* shard = shards + p * (d + 2);
    if (shard[d] == 0.0f) continue;
    const F32 weight = exp(broadcast(shard[d + 1] - top));
    mass += first_lane(weight) * shard[d];
    for (int64_t i = 0; i < d; i += LANES) store(y + i, fma(load(shard + i), weight, load(y + i)));
  }
  const F32 near_share = div(broadcast(1.0f), broadcast(mass));
  for (int64_t i = 0; i < d; i += LANES) store(y + i, mul(load(y + i), near_share));
  if (l.join == JOIN_WINDOW || !writes_state(l, position)) return;
  const float* far = w.far + (token * m.heads + head) * s.value_rows;
  if (l.join == JOIN_MIXED) {
    const F32 near_weight = broadcast((float)l.mix), far_weight = broadcast((float)(1.0 - l.mix));
    for (int64_t i = 0; i < d; i += LANES) store(y + i, fma(near_weight, load(y + i), mul(far_weight, load(far + i))));
    return;
  }
  const float far_mass = far[d] > 1e-30f ? far[d] : 1e-30f;
  const float far_log_mass = unspool::logarithm(far_mass) + l.far_bias[head];
  const float near_log_mass = unspool::logarithm(mass) + (l.near_row_max ? 0.0f : top);
  const F32 share = sigmoid(broadcast(far_log_mass - near_log_mass));
  const F32 inverse = div(broadcast(1.0f), broadcast(far_mass));
  for (int64_t i = 0; i < d; i += LANES) {
    const F32 near = load(y + i), difference = sub(mul(load(far + i), inverse), near);
    store(y + i, fma(share, difference, near));
  }
}

}  // namespace UNSPOOL_ISA
