// What the parts of the library share: each instruction set fills one table of functions, and one table is chosen when
// the library is loaded. A function returns null, or a message that says what was wrong with its arguments.
#pragma once

#include "arguments.h"
#include "threads.h"

#define UNSPOOL_API extern "C" __attribute__((visibility("default")))

namespace unspool {

struct Functions {
#define UNSPOOL_FUNCTION(name, Arguments) const char* (*name)(const Arguments*, int threads);
#include "functions.inc"
#undef UNSPOOL_FUNCTION
};

// Null where the compiler did not know the instruction set.
const Functions* scalar_functions();
const Functions* avx2_functions();
const Functions* avx512_functions();
const Functions* neon_functions();
const Functions* neon_dotprod_functions();

// The one logarithm of all instruction sets.
float logarithm(float x);

}  // namespace unspool
