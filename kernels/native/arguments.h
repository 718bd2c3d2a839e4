// The arguments of the library's functions, as plain C structures that Python mirrors field by field. Sizes are in
// elements, arrays are row-major, and all memory is the caller's.
#pragma once

#include <cstdint>

namespace unspool {

enum Format : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3, INT4 = 4 };

constexpr int BLOCK_ROWS = 32;  // a packed matrix is a row of blocks of so many output rows
constexpr int GROUP = 32;       // neighbouring columns that share a quantisation scale

// A weight [rows, columns], packed. Block b holds output rows 32 b .. 32 b + 31 (absent ones are zeros) as one stream:
//   float formats: for each column, 32 elements;
//   INT8: for each 32 columns, 32 float16 scales, then for each 4 columns 32 x 4 bytes of w / scale + 128;
//   INT4: for each 32 columns, 32 float16 scales, 32 float16 minima, then for each i < 4 32 x 4 bytes whose low half is
//         (w - minimum) / scale of columns 4 i .. 4 i + 3 and whose high half that of columns 16 + 4 i ...
struct Matrix {
  const uint8_t* data;
  int64_t rows;
  int64_t columns;
  int64_t format;
};

struct PackArguments {
  const float* weight;  // [rows, columns]
  uint8_t* packed;
  int64_t rows;
  int64_t columns;
  int64_t format;
};

struct UnpackArguments {
  Matrix matrix;
  float* weight;  // [rows, columns]
};

struct ProductArguments {
  Matrix matrix;
  const float* x;       // [tokens, columns]
  float* y;             // [tokens, y_stride], y_stride >= rows rounded up to 32
  int64_t tokens;
  int64_t y_stride;
  uint8_t* workspace;   // product_workspace bytes
};

// Reads or updates memory once, to measure what it can do. `sink` keeps the compiler from leaving the reads out.
struct SweepArguments {
  float* memory;
  int64_t count;
  int64_t update;  // 0: streaming read, 1: in-place read-modify-write
  float* sink;     // [threads]
};

enum Join : int32_t { JOIN_DISJOINT = 0, JOIN_MIXED = 1, JOIN_WINDOW = 2 };
enum Gate : int32_t { GATE_SCALAR = 0, GATE_FIXED = 1, GATE_NONE = 2, GATE_LIGER = 3, GATE_HGRN2 = 4 };
enum FeatureMap : int32_t { FEATURES_HEDGEHOG = 0, FEATURES_SOFTMAX = 1, FEATURES_ELU = 2, FEATURES_IDENTITY = 3 };
enum Activation : int32_t { ACTIVATION_SILU = 0, ACTIVATION_GELU_TANH = 1, ACTIVATION_RELU = 2 };

// One decoder layer: its weights, its mixer, and its state in every slot. Absent parts are null.
struct Layer {
  const float* input_norm;   // [hidden]
  Matrix qkv;                // rows: queries, keys, values
  const float* qkv_bias;
  const float* q_norm;       // [head_dim]
  const float* k_norm;
  Matrix out;
  const float* out_bias;
  const float* post_norm;
  Matrix gate_up;            // 32 rows of gate, 32 rows of up, in turns
  const float* gate_up_bias;
  Matrix down;
  const float* down_bias;
  Matrix query_map;          // [heads * padded head_dim, head_dim], transposed; each head padded to whole blocks
  Matrix key_map;            // likewise for the state heads
  const float* gate_weight;  // [state_heads, head_dim]
  const float* gate_bias;    // [state_heads]
  const float* far_bias;     // [heads]
  const float* bank_weight;  // [kv_heads, 4 head_dim]: what a priority makes of k, v, k^2 and v^2
  const float* bank_aging;   // [kv_heads]
  void* near_keys;           // [slots, kv_heads, sinks + window + bank, head_dim]
  void* near_values;
  float* bank_scores;        // [slots, kv_heads, bank]
  int32_t* bank_positions;
  void* far;                 // [slots, state_heads, value rows, features]
  int64_t join, gate, feature_map;
  int64_t window, sinks, bank;
  int64_t state_per_query_head, state_rope, near_row_max;
  int64_t features;          // features of a state key
  int64_t inverse_rotation;  // which of the model's distinct windows this layer's is
  double gate_normalizer, mix;
};

struct Model {
  const Layer* layers;
  Matrix embedding;          // [vocabulary, hidden]
  Matrix head;
  const float* final_norm;
  const double* frequencies; // [head_dim / 2]
  const int64_t* windows;    // [num_windows], the distinct ones
  int64_t num_windows;
  int64_t num_layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary;
  int64_t activation, state_format;  // FLOAT32 or FLOAT16
  int64_t position_limit;
  double rotary_scaling, norm_eps;
};

// One pass over packed tokens. A sequence may bring no more tokens than the smallest window.
struct DecodeArguments {
  const Model* model;
  const int32_t* tokens;      // [starts[sequences]]
  const int32_t* starts;      // [sequences + 1]
  const int32_t* slots;       // [sequences]
  const int64_t* positions;   // [sequences], of each sequence's first token
  const int32_t* logit_tokens;  // [num_logits], ascending
  float* logits;              // [num_logits, logits_stride]
  uint8_t* workspace;
  int64_t sequences, num_logits, logits_stride, workspace_bytes;
  int64_t record_bytes;  // of a Model and a Layer, by which the library can tell that the caller's are these
};

}  // namespace unspool

#include "family_arguments.h"
