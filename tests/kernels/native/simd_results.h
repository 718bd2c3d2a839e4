// Where the operations of an instruction set leave their results, by name.
#pragma once

#include <cstdint>

struct Results {
  virtual void add(const char* name, const void* bytes, int64_t count) = 0;
};

void scalar_results(Results& to);
void neon_results(Results& to);
void neon_dotprod_results(Results& to);
