// Every operation of simd.h on the same inputs. Compiled once for each instruction set, like the kernels themselves.
#include "simd.h"
#include "simd_results.h"

namespace UNSPOOL_ISA {

constexpr uint32_t VECTORS = 4096;
constexpr uint32_t SPECIAL[] = {0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x3F800000, 0xBF800000, 0x7F800000,
                                0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F7FFFFF, 0x3F000000, 0x40200000, 0x38800000,
                                0x33000000, 0x477FF000};

// Vector i: all special numbers in the first ones, in another order each time; then by turns any bits, and numbers of
// like size, whose sums depend on their order.
UNSPOOL_INLINE F32 input(uint32_t i) {
  float lanes[LANES];
  for (uint32_t j = 0; j < LANES; ++j) {
    uint32_t bits = (i * LANES + j + 1) * 2654435761u;
    bits = (bits ^ bits >> 15) * 2246822519u;
    if (i % 2 == 0) bits = (bits & 0x83FFFFFF) | 0x3C000000;
    lanes[j] = bits_to_float(i < LANES ? SPECIAL[((i + 1) * j % LANES) ^ i] : bits);
  }
  return load(lanes);
}

// Which NaN an operation gives is not part of its meaning; which operand a selection gives is.
UNSPOOL_INLINE void tell_numbers(Results& to, const char* name, F32 x) {
  float lanes[LANES];
  store(lanes, where_nan(x, broadcast(bits_to_float(0x7FC00000)), x));
  to.add(name, lanes, sizeof(lanes));
}
UNSPOOL_INLINE void tell_bits(Results& to, const char* name, F32 x) {
  float lanes[LANES];
  store(lanes, x);
  to.add(name, lanes, sizeof(lanes));
}
UNSPOOL_INLINE void tell_ints(Results& to, const char* name, I32 x) { to.add(name, &x, sizeof(x)); }

inline void tell_arithmetic(Results& to, F32 x, F32 y, F32 z) {
  tell_numbers(to, "add", add(x, y));
  tell_numbers(to, "sub", sub(x, y));
  tell_numbers(to, "mul", mul(x, y));
  tell_numbers(to, "div", div(x, y));
  tell_numbers(to, "fma", fma(x, y, z));
  tell_numbers(to, "sqrt", sqrt(x));
  tell_numbers(to, "round", round(x));
  tell_numbers(to, "round_to_half", round_to_half(x));
  tell_numbers(to, "sum", broadcast(sum(x)));
  float four[LANES] = {};
  sum_four(x, y, z, add(x, y), four);
  tell_numbers(to, "sum_four", load(four));
  tell_numbers(to, "exp", exp(x));
  tell_numbers(to, "sigmoid", sigmoid(x));
  tell_numbers(to, "tanh", tanh(x));
  tell_numbers(to, "silu", silu(x));
}

inline void tell_selections(Results& to, F32 x, F32 y, F32 z) {
  tell_bits(to, "max", max(x, y));
  tell_bits(to, "min", min(x, y));
  tell_bits(to, "largest", broadcast(largest(x)));
  tell_bits(to, "abs", abs(x));
  tell_bits(to, "negative_abs", negative_abs(x));
  tell_bits(to, "copy_sign", copy_sign(x, y));
  tell_bits(to, "where_less", where_less(x, y, z, x));
  tell_bits(to, "where_negative", where_negative(x, y, z));
  tell_bits(to, "where_nan", where_nan(x, y, z));
  tell_bits(to, "first_lane", broadcast(first_lane(x)));
  tell_bits(to, "swap_pairs", swap_pairs(x));
  tell_bits(to, "first_of_pairs", first_of_pairs(x));
  tell_bits(to, "second_of_pairs", second_of_pairs(x));
}

template <typename T>
UNSPOOL_INLINE void tell_parts(Results& to, const char* name, F32 x) {
  T there[LANES];
  store(there, x);
  to.add(name, there, sizeof(there));
  for (int n = 1; n <= LANES; ++n) {
    T written[LANES + 1] = {};
    tell_bits(to, name, load_first(there, n));
    store_first(written, x, n);
    to.add(name, written, sizeof(written));
  }
}

// All numbers of sixteen bits but signalling NaNs, which processors make quiet as they widen them.
inline void tell_widenings(Results& to) {
  for (uint32_t first = 0; first < 65536; first += LANES) {
    Half halves[LANES];
    BFloat16 upper[LANES];
    for (uint32_t j = 0; j < LANES; ++j) {
      const uint16_t bits = (uint16_t)(first + j);
      halves[j].bits = (bits & 0x7C00) == 0x7C00 && (bits & 0x3FF) ? (uint16_t)(bits | 0x200) : bits;
      upper[j].bits = bits;
    }
    tell_bits(to, "load half", load(halves));
    tell_bits(to, "load bfloat16", load(upper));
  }
}

inline void tell_bytes(Results& to, uint32_t i) {
  uint8_t w[64];
  int8_t x[4], bytes[LANES];
  float numbers[LANES];
  for (uint32_t j = 0; j < 64; ++j) w[j] = (uint8_t)((i * 64 + j) * 2654435761u >> 24);
  if (i < 4) std::memset(w, i & 1 ? 255 : 0, sizeof(w));
  for (uint32_t j = 0; j < 4; ++j) x[j] = (int8_t)(i < 4 ? (i & 2 ? 127 : -127) : (int)((i * 4 + j) * 40503u % 255) - 127);
  int32_t four;
  std::memcpy(&four, x, 4);
  const Bytes all = load_bytes(w);
  const int32_t sum_of_x = x[0] + x[1] + x[2] + x[3];
  const I32 start = int_broadcast((int32_t)(i * 7919));
  const I32 product = dot_offset(int_add(start, offset_start(sum_of_x)), all, four);
  tell_ints(to, "dot_offset", product);
  tell_ints(to, "dot_small of low_nibbles", dot_small(start, low_nibbles(all), four));
  tell_ints(to, "dot_small of high_nibbles", dot_small(start, high_nibbles(all), four));
  tell_bits(to, "to_float", to_float(product));
  for (uint32_t j = 0; j < LANES; ++j) numbers[j] = (float)((int)((i * LANES + j) % 509) - 254) * 0.5f;
  store_bytes(bytes, load(numbers));
  to.add("store_bytes", bytes, sizeof(bytes));
}

inline void tell_powers(Results& to) {
  for (int n = -126; n <= 127; ++n) tell_bits(to, "power_of_two", power_of_two(broadcast((float)n)));
}

}  // namespace UNSPOOL_ISA

#define UNSPOOL_JOIN_NAMES(a, b) a##b
#define UNSPOOL_RESULTS(isa) UNSPOOL_JOIN_NAMES(isa, _results)

void UNSPOOL_RESULTS(UNSPOOL_ISA)(Results& to) {
  using namespace UNSPOOL_ISA;
  for (uint32_t i = 0; i < VECTORS; ++i) {
    const F32 x = input(i), y = input(i < LANES ? (i + 5) % LANES : (i * 37 + 11) % VECTORS);
    const F32 z = input(i < LANES ? (i + 9) % LANES : (i * 101 + 3) % VECTORS);
    tell_arithmetic(to, x, y, z);
    tell_selections(to, x, y, z);
    if (i % 16 == 0 || i < LANES) tell_parts<float>(to, "float parts", x), tell_parts<Half>(to, "half parts", x);
    tell_bytes(to, i);
  }
  tell_widenings(to);
  tell_powers(to);
}
