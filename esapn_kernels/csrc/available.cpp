#include "kernels.h"

namespace esapn {

const Kernels* const* available() {
  static const Kernels* found[4] = {};
  static const bool filled = [] {
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
    return true;
  }();
  (void)filled;
  return found;
}

}  // namespace esapn
