// The operators, once for every instruction set; the one that this machine runs is chosen at load.
#pragma once
#include "group.h"
#include "parallel.h"
#include "resize.h"
#include "table.h"

namespace esapn {

// Sums in float and in double: the index is 0 and 1.
struct Kernels {
  const char* name;
  int (*lookup_fwd[2])(const Table&, const Ids&, const void* storage, int dtype, const void* composed,
                       void* out, int out_dtype, int threads);
  int (*lookup_bwd[2])(const Table&, const Ids&, const void* grad, int grad_dtype, void* storage, int dtype,
                       const void* composed, void* grad_composed, const Update&, int64_t padding, int threads);
  int (*step_rows[2])(const Table&, const Ids&, const int8_t* level, const int64_t* place, const void* values,
                      void* storage, int dtype, const Update&, int threads);
  int (*compose[2])(const int64_t* sizes, int n, bool tails, const void* chain, int dtype,
                    void* composed);
  int (*compose_bwd[2])(const int64_t* sizes, int n, bool tails, const void* grad_composed, const void* chain,
                        int dtype, const void* composed, void* grad_chain);
  int (*move_rows[2])(const Resize&);
};

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

// Those that this machine runs, the widest first; ends with null.
const Kernels* const* available();

}  // namespace esapn
