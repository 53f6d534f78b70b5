#include "kernels.h"

namespace esapn {
namespace {

struct Sets {
  const Kernels* found[4] = {};

  Sets() {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
      found[n++] = &avx512::kernels;
    if (has_avx2) found[n++] = &avx2::kernels;
#endif
    found[n] = &baseline::kernels;
  }
};

// When the module is loaded: a static of a function has a guard, which is libstdc++'s.
const Sets sets;

}  // namespace

const Kernels* const* available() { return sets.found; }

}  // namespace esapn
