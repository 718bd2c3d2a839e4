// An instruction set's table with the functions that neon_against_scalar.cpp calls: all of them would take minutes to build.
#include "library.h"
#include "packing.h"
#include "ring_attention.h"
#include "row_state.h"
#include "scans.h"

#define UNSPOOL_JOIN_NAMES(a, b) a##b
#define UNSPOOL_TABLE(isa) UNSPOOL_JOIN_NAMES(isa, _functions)

namespace unspool {

const Functions* UNSPOOL_TABLE(UNSPOOL_ISA)() {
  static const Functions table = [] {
    Functions some{};
    some.pack = UNSPOOL_ISA::pack;
    some.unpack = UNSPOOL_ISA::unpack;
    some.product = UNSPOOL_ISA::product;
    some.row_state = UNSPOOL_ISA::row_state;
    some.ring_attention = UNSPOOL_ISA::ring_attention;
    some.ring_attention_workspace = UNSPOOL_ISA::ring_attention_workspace;
    some.diagonal_scan = UNSPOOL_ISA::diagonal_scan;
    some.exponential_scan = UNSPOOL_ISA::exponential_scan;
    some.softmax_scan = UNSPOOL_ISA::softmax_scan;
    return some;
  }();
  return &table;
}

}  // namespace unspool
