// Numbers of 16 bits, and of any dtype to the dtype of the sums and back. Inside the namespace of an
// instruction set.

ESAPN_INLINE float from_bits(uint32_t bits) { return load<float>(&bits); }
ESAPN_INLINE uint32_t to_bits(float x) { return load<uint32_t>(&x); }

ESAPN_INLINE float from_bf16(uint16_t h) { return from_bits(uint32_t(h) << 16); }

// To the nearest, ties to even; what is not a number becomes the one that torch writes.
ESAPN_INLINE uint16_t to_bf16(float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

ESAPN_INLINE float from_f16(uint16_t h) {
#if defined(__aarch64__)
  return float(load<__fp16>(&h));
#elif defined(__x86_64__) && ESAPN_BYTES >= 32
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
#else
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return from_bits(sign | ((magnitude << 13) + (112u << 23)));
  // Less than the least normal number: so many times 2^-24.
  const float small = float(magnitude) * 0x1p-24f;
  return sign ? -small : small;
#endif
}

ESAPN_INLINE uint16_t to_f16(float x) {
#if defined(__aarch64__)
  const __fp16 h = __fp16(x);
  return load<uint16_t>(&h);
#elif defined(__x86_64__) && ESAPN_BYTES >= 32
  return uint16_t(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), 0)));
#else
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65,536 or more
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding one half aligns the units of 2^-24 with the last bit, and rounds.
    return uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f)));
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return uint16_t(sign | ((magnitude - (112u << 23) + 0xfffu + odd) >> 13));
#endif
}

// `count` numbers of `dtype` at `from` as A. A is double where dtype is F64, else float may be.
template <class A>
static void widen(A* to, const void* from, int dtype, int64_t count) {
  if (dtype == F32) {
    const float* x = static_cast<const float*>(from);
    for (int64_t i = 0; i < count; i++) to[i] = A(load<float>(x + i));
  } else if (dtype == F64) {
    const double* x = static_cast<const double*>(from);
    for (int64_t i = 0; i < count; i++) to[i] = A(load<double>(x + i));
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(from);
    int64_t i = 0;
    if (dtype == BF16) {
      for (; i < count; i++) to[i] = A(from_bf16(x[i]));
      return;
    }
#if defined(__x86_64__) && ESAPN_BYTES >= 32
    for (; i + 8 <= count; i += 8) {
      const Vec<float, 8> v = (Vec<float, 8>)_mm256_cvtph_ps((__m128i)load<Vec<int64_t, 2>>(x + i));
      store(to + i, __builtin_convertvector(v, Vec<A, 8>));
    }
#endif
    for (; i < count; i++) to[i] = A(from_f16(x[i]));
  }
}

// `count` numbers A as `dtype`, each rounded once (to 16 bits: from fp32, as torch rounds).
template <class A>
static void narrow(void* to, const A* from, int dtype, int64_t count) {
  if (dtype == F32) {
    float* y = static_cast<float*>(to);
    for (int64_t i = 0; i < count; i++) store(y + i, float(from[i]));
  } else if (dtype == F64) {
    double* y = static_cast<double*>(to);
    for (int64_t i = 0; i < count; i++) store(y + i, double(from[i]));
  } else {
    uint16_t* y = static_cast<uint16_t*>(to);
    int64_t i = 0;
    if (dtype == BF16) {
      for (; i < count; i++) y[i] = to_bf16(float(from[i]));
      return;
    }
#if defined(__x86_64__) && ESAPN_BYTES >= 32
    for (; i + 8 <= count; i += 8) {
      const Vec<float, 8> v = __builtin_convertvector(load<Vec<A, 8>>(from + i), Vec<float, 8>);
      store(y + i, (Vec<int64_t, 2>)_mm256_cvtps_ph((__m256)v, 0));
    }
#endif
    for (; i < count; i++) y[i] = to_f16(float(from[i]));
  }
}

template <class A>
constexpr int DTYPE_OF = sizeof(A) == 8 ? F64 : F32;
