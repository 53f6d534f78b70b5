#if defined(__x86_64__)
#include <immintrin.h>

#include <utility>

#include "kernels.h"

// Behind the library's headers: nothing of theirs may be compiled for this set.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define ESAPN_ISA avx2
#define ESAPN_BYTES 32
#define ESAPN_REGISTERS 16
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
