// Compiled once for each instruction set; UNSPOOL_ISA names the namespace.
#include "bandwidth.h"
#include "decoder.h"
#include "library.h"
#include "norms.h"
#include "packing.h"
#include "recurrent_cell.h"
#include "ring_attention.h"
#include "row_state.h"
#include "scans.h"
#include "short_conv.h"

#define UNSPOOL_JOIN_NAMES(a, b) a##b
#define UNSPOOL_TABLE(isa) UNSPOOL_JOIN_NAMES(isa, _functions)

namespace unspool {

const Functions* UNSPOOL_TABLE(UNSPOOL_ISA)() {
  static const Functions table = {
#define UNSPOOL_FUNCTION(name, Arguments) UNSPOOL_ISA::name,
#include "functions.inc"
#undef UNSPOOL_FUNCTION
  };
  return &table;
}

}  // namespace unspool
