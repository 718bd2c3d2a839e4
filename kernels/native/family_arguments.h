// The arguments of the kernel families' functions, as `arguments.h` has those of the decoder. Inputs and outputs are
// float32; a state has a row for every slot, `state_stride` elements apart, and is FLOAT32 or FLOAT16 (`state_format`).
#pragma once

#include <cstdint>

namespace unspool {

// Packed tokens: sequence s owns tokens starts[s] .. starts[s + 1] - 1 and the state in slot slots[s]; -1: padding.
struct Sequences {
  const int32_t* slots;   // [count]
  const int32_t* starts;  // [count + 1]
  int64_t count;
};

enum RowGate : int32_t { ROW_GATE_NONE = 0, ROW_GATE_CONSTANT = 1, ROW_GATE_SCALAR = 2, ROW_GATE_KEY = 3, ROW_GATE_VALUE = 4 };
enum RowErase : int32_t { ROW_ERASE_NONE = 0, ROW_ERASE_PARALLEL = 1, ROW_ERASE_GENERAL = 2 };

// A piece of work is `value_rows` rows of one head's state; `row_block` (1 or 4) of them are visited at once. Neither
// changes a result. Absent options are null.
struct RowStateArguments {
  Sequences sequences;
  const float* q;            // [tokens, heads, queries, keys]
  const float* k;            // [tokens, heads, keys]
  const float* v;            // [tokens, heads, values]
  const float* log_decay;    // [heads], [tokens, heads], or that with keys or values, as the gate has it
  const float* erase_read;   // [tokens, heads, keys]
  const float* erase_write;  // [tokens, heads, keys]
  const float* beta;         // [tokens, heads]
  const float* bonus;        // [heads, keys]
  const float* log_input;    // [tokens, heads]
  void* state;               // [heads, rows, keys] in a slot; a row beyond `values` is written with v = 1
  float* max_state;          // [heads] in a slot
  float* o;                  // [tokens, heads, queries, rows]
  float* m;                  // [tokens, heads]
  float* scalars;            // workspace [tokens, heads, 2], for any gate
  float* decay;              // workspace as log_decay, for gates of keys or values
  float* decayed_key;        // workspace [tokens, heads, keys], for a parallel erase with a gate of keys
  float* bonus_weight;       // workspace [tokens, heads, queries], for a bonus
  int64_t heads, queries, keys, values, rows;
  int64_t state_stride, max_stride, state_format;
  int64_t gate, erase, read_before;
  int64_t row_block, value_rows;
};

// h = decay h + x for each of `features` numbers of a channel; complex ones are pairs and count as two features.
struct DiagonalScanArguments {
  Sequences sequences;
  const float* x;      // [tokens, channels, features]
  const float* decay;  // [channels, features], for each token `decay_stride` further on
  const float* read;   // null, or [features], `read_token` further on for each token and `read_channel` for each channel
  void* state;         // [channels, features] in a slot
  float* y;            // as x, or with `read` [tokens, channels]
  int64_t channels, features, complex;
  int64_t decay_stride, read_token, read_channel;
  int64_t state_stride, state_format;
};

struct ExponentialScanArguments {
  Sequences sequences;
  const float* k;      // [tokens, channels]
  const float* v;
  const float* decay;  // [channels], a logarithm
  const float* bonus;  // [channels]
  void* state;         // [channels, 3] in a slot: numerator, denominator, maximum
  float* y;            // [tokens, channels]
  int64_t channels;
  int64_t state_stride, state_format;
};

struct SoftmaxScanArguments {
  Sequences sequences;
  const float* scores;  // [tokens, heads]
  const float* v;       // [tokens, heads, values]
  void* state;          // [heads, values + 2] in a slot: maximum, mass, weighted sum
  float* o;             // [tokens, heads, values]
  float* log_mass;      // [tokens, heads]
  int64_t heads, values;
  int64_t state_stride, state_format;
};

struct RingAttentionArguments {
  Sequences sequences;
  const int32_t* positions;  // [sequences], of each sequence's first token
  const float* q;            // [tokens, heads, queries, channels]
  const float* sink_q;
  const float* k;            // [tokens, heads, channels]
  const float* v;
  void* keys;                // [heads, rows, channels] in a slot
  void* values;
  float* o;                  // [tokens, heads, queries, channels]
  float* log_mass;           // [tokens, heads, queries]
  float* row_max;
  float* shards;             // workspace, `ring_attention_shards` floats
  int64_t heads, queries, channels, rows, sinks;
  int64_t keys_stride, values_stride, state_format;
  int64_t workspace;         // set by ring_attention_workspace: floats that `shards` must have
};

enum RecurrentCell : int32_t { CELL_ELMAN = 0, CELL_LSTM = 1, CELL_GRU = 2, CELL_SLSTM = 3 };

struct RecurrentCellArguments {
  Sequences sequences;
  const float* x;       // [tokens, heads, gates, channels]
  const float* weight;  // [heads, gates, channels out, channels in]
  const float* bias;    // null, or [heads, gates, channels]
  void* state;          // [heads, states, channels] in a slot
  float* h;             // [tokens, heads, channels]
  float* scratch;       // workspace
  float* packed;        // workspace
  int64_t heads, channels, cell;
  int64_t state_stride, state_format;
  int64_t scratch_floats, packed_floats;  // set by recurrent_cell_workspace: what these must have
};

struct ShortConvArguments {
  Sequences sequences;
  const float* x;       // [tokens, channels]
  const float* taps;    // [depth + 1, channels], oldest first
  const float* bias;    // null, or [channels]
  void* state;          // [depth, channels] in a slot, a ring
  int32_t* cursor;      // [slots]: the ring's oldest row
  float* y;             // [tokens, channels]
  int64_t channels, depth, silu;
  int64_t state_stride, cursor_stride, state_format;
};

struct TokenShiftArguments {
  Sequences sequences;
  const float* x;  // [tokens, channels]
  void* state;     // [channels] in a slot
  float* y;        // [tokens, channels]
  int64_t channels;
  int64_t state_stride, state_format;
};

// y = weight x / sqrt(sum(x^2) / divisor + eps)
struct NormalizeArguments {
  const float* x;       // [tokens, channels]
  const float* weight;  // null, or [channels]
  float* y;
  int64_t tokens, channels;
  double divisor, eps;
};

// Rotates the pairs (x_i, x_{i + channels / 2}).
struct RotaryArguments {
  const float* x;       // [tokens, heads, channels]
  const float* cosine;  // [tokens, channels / 2]
  const float* sine;
  float* y;
  int64_t tokens, heads, channels;
};

}  // namespace unspool
