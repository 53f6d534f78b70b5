#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own header starts registers from themselves.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

#include <utility>

#include "kernels.h"

// Behind the library's headers: nothing of theirs may be compiled for this set.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")
#endif

#define ESAPN_ISA avx512
#define ESAPN_BYTES 64
#define ESAPN_REGISTERS 32
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
