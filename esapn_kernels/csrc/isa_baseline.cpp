// What every machine of the architecture has: SSE2 on x86-64, NEON on aarch64, 16 bytes elsewhere.
#include <utility>

#include "kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define ESAPN_ISA baseline
#define ESAPN_BYTES 16
#if defined(__aarch64__)
#define ESAPN_REGISTERS 32
#else
#define ESAPN_REGISTERS 16
#endif
#include "isa.h"
