// Runs operations and kernels with NEON and with plain C++, and fails where a single bit differs. The processor decides
// which of the two forms of NEON the library takes.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include <asm/hwcap.h>
#include <sys/auxv.h>

#include "arguments.h"
#include "simd_results.h"

#define UNSPOOL_FUNCTION(name, Arguments) extern "C" const char* unspool_##name(const unspool::Arguments*, int threads);
#include "functions.inc"
#undef UNSPOOL_FUNCTION
extern "C" int unspool_choose(const char* name);
extern "C" const char* unspool_instruction_set();

using namespace unspool;

namespace {

using Bytes = std::vector<uint8_t>;
constexpr int THREADS = 1;  // their number changes no bit, and one is the easiest for an emulator
int failures = 0, comparisons = 0;

void compare(const std::string& name, const Bytes& expected, const Bytes& found) {
  ++comparisons;
  size_t i = 0;
  while (i < expected.size() && i < found.size() && expected[i] == found[i]) ++i;
  if (i == expected.size() && i == found.size() && i > 0) return;
  ++failures;
  std::printf("%s: differs at byte %zu of %zu\n", name.c_str(), i, expected.size());
}

struct Collected : Results {
  std::map<std::string, Bytes> by_name;
  void add(const char* name, const void* bytes, int64_t count) override {
    Bytes& all = by_name[name];
    all.insert(all.end(), (const uint8_t*)bytes, (const uint8_t*)bytes + count);
  }
};

void compare_operations(const char* form, void (*results)(Results&)) {
  Collected expected, found;
  scalar_results(expected);
  results(found);
  for (const auto& [name, bytes] : expected.by_name) compare(std::string(form) + " " + name, bytes, found.by_name[name]);
}

// The same numbers for every run: uniform in [low, high).
struct Numbers {
  uint64_t state = 1;
  std::vector<float> operator()(int64_t count, float low = -1.0f, float high = 1.0f) {
    std::vector<float> y(count);
    for (float& x : y) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      x = low + (high - low) * (float)(state >> 40) * 0x1p-24f;
    }
    return y;
  }
};

template <typename T>
void append(Bytes& to, const std::vector<T>& from) {
  to.insert(to.end(), (const uint8_t*)from.data(), (const uint8_t*)(from.data() + from.size()));
}

void require(const char* message) {
  if (!message) return;
  std::printf("%s\n", message);
  std::exit(2);
}

template <typename Case>
void compare_case(const std::string& name, Case results) {
  Bytes of[2];
  for (int i = 0; i < 2; ++i) {
    if (!unspool_choose(i ? "neon" : "scalar")) require("an instruction set is missing");
    results(of[i]);
    for (size_t at = 0; at + 4 <= of[i].size(); at += 4) {
      float x;
      std::memcpy(&x, &of[i][at], 4);
      if (x != 0.0f) break;
      if (at + 8 > of[i].size()) require((name + ": all results are zeros").c_str());
    }
  }
  compare(name, of[0], of[1]);
}

void product_case(int64_t format, int64_t rows, int64_t columns, int64_t tokens, Bytes& out) {
  Numbers numbers;
  const int64_t padded = (rows + 31) / 32 * 32, width = (columns + 31) / 32 * 32;
  const auto weight = numbers(rows * columns), x = numbers(tokens * columns, -3.0f, 3.0f);
  std::vector<uint8_t> packed(padded * width * 4), workspace(tokens * width * 8 + 64);
  std::vector<float> y(tokens * padded), unpacked(rows * columns);
  const PackArguments pack{weight.data(), packed.data(), rows, columns, format};
  const Matrix matrix{packed.data(), rows, columns, format};
  require(unspool_pack(&pack, THREADS));
  const UnpackArguments unpack{matrix, unpacked.data()};
  require(unspool_unpack(&unpack, THREADS));
  const ProductArguments product{matrix, x.data(), y.data(), tokens, padded, workspace.data()};
  require(unspool_product(&product, THREADS));
  append(out, y), append(out, unpacked), append(out, packed);
}

// Three sequences, of which the second is padding.
const int32_t SLOTS[] = {1, -1, 0}, STARTS[] = {0, 5, 7, 10}, POSITIONS[] = {0, 0, 140};
const Sequences SEQUENCES = {SLOTS, STARTS, 3};
constexpr int64_t TOKENS = 10, NUM_SLOTS = 2;

// A state of either format; float16 ones start from numbers below one.
std::vector<uint16_t> initial_state(Numbers& numbers, int64_t count, int64_t format) {
  std::vector<uint16_t> state(format == FLOAT16 ? count : 2 * count);
  const auto x = numbers(count);
  if (format == FLOAT32) std::memcpy(state.data(), x.data(), count * 4);
  else
    for (int64_t i = 0; i < count; ++i) state[i] = (uint16_t)(std::fabs(x[i]) * 14336.0f) | (x[i] < 0 ? 0x8000 : 0);
  return state;
}

struct RowCase { int64_t gate, erase, read_before, block, format, keys; };

void row_case(const RowCase& c, Bytes& out) {
  Numbers numbers;
  const int64_t heads = 2, queries = 2, values = 7, rows = values, pairs = TOKENS * heads;
  const auto q = numbers(pairs * queries * c.keys), k = numbers(pairs * c.keys, -0.4f, 0.4f), v = numbers(pairs * values);
  const auto log_decay = numbers(pairs * c.keys, -0.5f, 0.0f), read = numbers(pairs * c.keys, -0.3f, 0.3f);
  const auto write = numbers(pairs * c.keys, -0.3f, 0.3f), beta = numbers(pairs, 0.0f, 1.0f), bonus = numbers(heads * c.keys);
  auto state = initial_state(numbers, NUM_SLOTS * heads * rows * c.keys, c.format);
  std::vector<float> o(pairs * queries * rows), scalars(pairs * 2), decay(pairs * c.keys), decayed(pairs * c.keys);
  std::vector<float> bonus_weight(pairs * queries);
  RowStateArguments a{};
  a.sequences = SEQUENCES;
  a.q = q.data(), a.k = k.data(), a.v = v.data(), a.state = state.data(), a.o = o.data();
  if (c.gate != ROW_GATE_NONE) a.log_decay = log_decay.data(), a.scalars = scalars.data();
  if (c.gate == ROW_GATE_KEY || c.gate == ROW_GATE_VALUE) a.decay = decay.data();
  if (c.erase == ROW_ERASE_GENERAL) a.erase_read = read.data(), a.erase_write = write.data();
  if (c.erase == ROW_ERASE_PARALLEL) a.beta = beta.data();
  if (c.erase == ROW_ERASE_PARALLEL && c.gate == ROW_GATE_KEY) a.decayed_key = decayed.data();
  if (c.read_before) a.bonus = bonus.data(), a.bonus_weight = bonus_weight.data();
  a.heads = heads, a.queries = queries, a.keys = c.keys, a.values = values, a.rows = rows;
  a.state_stride = heads * rows * c.keys, a.state_format = c.format;
  a.gate = c.gate, a.erase = c.erase, a.read_before = c.read_before, a.row_block = c.block, a.value_rows = 4;
  require(unspool_row_state(&a, THREADS));
  append(out, o), append(out, state);
}

void ring_case(int64_t format, int64_t channels, Bytes& out) {
  Numbers numbers;
  const int64_t heads = 2, queries = 3, rows = 150, sinks = 3, pairs = TOKENS * heads;
  const auto q = numbers(pairs * queries * channels, -4.0f, 4.0f), sink_q = numbers(pairs * queries * channels, -4.0f, 4.0f);
  const auto k = numbers(pairs * channels), v = numbers(pairs * channels);
  auto keys = initial_state(numbers, NUM_SLOTS * heads * rows * channels, format), values = keys;
  std::vector<float> o(pairs * queries * channels), log_mass(pairs * queries), row_max(pairs * queries);
  RingAttentionArguments a{};
  a.sequences = SEQUENCES, a.positions = POSITIONS;
  a.q = q.data(), a.sink_q = sink_q.data(), a.k = k.data(), a.v = v.data(), a.keys = keys.data(), a.values = values.data();
  a.o = o.data(), a.log_mass = log_mass.data(), a.row_max = row_max.data();
  a.heads = heads, a.queries = queries, a.channels = channels, a.rows = rows, a.sinks = sinks;
  a.keys_stride = a.values_stride = heads * rows * channels, a.state_format = format;
  require(unspool_ring_attention_workspace(&a, THREADS));
  std::vector<float> shards(a.workspace);
  a.shards = shards.data();
  require(unspool_ring_attention(&a, THREADS));
  append(out, o), append(out, log_mass), append(out, row_max), append(out, keys), append(out, values);
}

void diagonal_case(int64_t format, int64_t complex, bool reads, Bytes& out) {
  Numbers numbers;
  const int64_t channels = 11, features = 10, count = channels * features;
  const auto x = numbers(TOKENS * count), decay = numbers(TOKENS * count, 0.5f, 0.7f), read = numbers(TOKENS * features);
  auto state = initial_state(numbers, NUM_SLOTS * count, format);
  std::vector<float> y(TOKENS * (reads ? channels : count));
  DiagonalScanArguments a{SEQUENCES, x.data(), decay.data(), reads ? read.data() : nullptr, state.data(), y.data(),
                          channels, features, complex, count, features, 0, count, format};
  require(unspool_diagonal_scan(&a, THREADS));
  append(out, y), append(out, state);
}

void exponential_case(int64_t format, Bytes& out) {
  Numbers numbers;
  const int64_t channels = 37;
  const auto k = numbers(TOKENS * channels, -6.0f, 6.0f), v = numbers(TOKENS * channels);
  const auto decay = numbers(channels, -2.0f, 0.0f), bonus = numbers(channels);
  auto state = initial_state(numbers, NUM_SLOTS * channels * 3, format);
  std::vector<float> y(TOKENS * channels);
  ExponentialScanArguments a{SEQUENCES, k.data(), v.data(), decay.data(), bonus.data(), state.data(), y.data(), channels,
                             3 * channels, format};
  require(unspool_exponential_scan(&a, THREADS));
  append(out, y), append(out, state);
}

void softmax_case(int64_t format, Bytes& out) {
  Numbers numbers;
  const int64_t heads = 3, values = 21, stride = heads * (values + 2);
  const auto scores = numbers(TOKENS * heads, -6.0f, 6.0f), v = numbers(TOKENS * heads * values);
  std::vector<uint16_t> state(NUM_SLOTS * stride * (format == FLOAT16 ? 1 : 2));  // nothing came in yet
  std::vector<float> o(TOKENS * heads * values), log_mass(TOKENS * heads);
  SoftmaxScanArguments a{SEQUENCES, scores.data(), v.data(), state.data(), o.data(), log_mass.data(), heads, values,
                         stride, format};
  require(unspool_softmax_scan(&a, THREADS));
  append(out, o), append(out, log_mass), append(out, state);
}

void compare_products() {
  const char* names[] = {"float32", "bfloat16", "float16", "int8", "int4"};
  for (int64_t format = FLOAT32; format <= INT4; ++format)
    for (int64_t tokens : {1, 2, 3, 5, 13})
      for (int64_t columns : {32, 77})
        compare_case(std::string("product ") + names[format] + " of " + std::to_string(tokens) + " tokens",
                     [&](Bytes& out) { product_case(format, 70, columns, tokens, out); });
}

void compare_states(int64_t format) {
  const std::string kept = format == FLOAT16 ? " in float16" : " in float32";
  for (int64_t gate = ROW_GATE_NONE; gate <= ROW_GATE_VALUE; ++gate)
    for (int64_t erase = ROW_ERASE_NONE; erase <= ROW_ERASE_GENERAL; ++erase)
      for (int64_t block : {1, 4})
        for (int64_t before : {0, 1})
          compare_case("row_state gate " + std::to_string(gate) + " erase " + std::to_string(erase) + kept,
                       [&](Bytes& out) { row_case({gate, erase, before, block, format, before ? 32 : 43}, out); });
  for (int64_t channels : {16, 43, 80})
    compare_case("ring_attention" + kept, [&](Bytes& out) { ring_case(format, channels, out); });
  for (int64_t complex : {0, 1})
    for (bool reads : {false, true})
      compare_case("diagonal_scan" + kept, [&](Bytes& out) { diagonal_case(format, complex, reads, out); });
  compare_case("exponential_scan" + kept, [&](Bytes& out) { exponential_case(format, out); });
  compare_case("softmax_scan" + kept, [&](Bytes& out) { softmax_case(format, out); });
}

}  // namespace

int main() {
  if (std::strcmp(unspool_instruction_set(), "neon")) require("the library did not choose neon by itself");
  const bool dot_products = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
  compare_operations("neon", neon_results);
  if (dot_products) compare_operations("neon with dot products", neon_dotprod_results);
  compare_products();
  compare_states(FLOAT32);
  compare_states(FLOAT16);
  std::printf("dot products: %d, comparisons: %d, failures: %d\n", dot_products, comparisons, failures);
  return failures != 0;
}
