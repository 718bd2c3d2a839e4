// Compiled once for each instruction set; UNSPOOL_ISA names the namespace.
#include "bandwidth.h"
#include "decoder.h"
#include "library.h"
#include "packing.h"

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
