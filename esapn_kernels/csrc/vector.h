// Vectors of one instruction set. Included by isa_*.cpp inside the namespace of that set, which
// defines ESAPN_BYTES (of a register) and ESAPN_REGISTERS.

#if defined(__clang__)
#define ESAPN_UNROLL _Pragma("unroll")
#else
#define ESAPN_UNROLL _Pragma("GCC unroll 16")
#endif

template <class A, int N>
struct VectorOf {
  typedef A type __attribute__((vector_size(sizeof(A) * N)));
};
template <class A, int N>
using Vec = typename VectorOf<A, N>::type;

template <class A>
constexpr int LANES = ESAPN_BYTES / int(sizeof(A));
// Of a register half as wide, where there is one.
template <class A>
constexpr int HALF_LANES = ESAPN_BYTES > 16 ? LANES<A> / 2 : LANES<A>;

// By memcpy: rows begin at any element, and attributes of alignment do not outlive templates.
template <class V>
ESAPN_INLINE V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
ESAPN_INLINE void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// Past the caches, where what is written is larger than they are; `to` is aligned.
template <class A>
ESAPN_INLINE void stream(A* to, Vec<A, LANES<A>> v) {
#if defined(__x86_64__) && ESAPN_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
#elif defined(__x86_64__) && ESAPN_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v);
#elif defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)v);
#else
  store(to, v);
#endif
}

// Orders streamed stores before what this thread does next.
ESAPN_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

ESAPN_INLINE float root(float x) { return __builtin_sqrtf(x); }
ESAPN_INLINE double root(double x) { return __builtin_sqrt(x); }
#if defined(__x86_64__)
ESAPN_INLINE Vec<float, 4> root(Vec<float, 4> v) { return (Vec<float, 4>)_mm_sqrt_ps((__m128)v); }
ESAPN_INLINE Vec<double, 2> root(Vec<double, 2> v) { return (Vec<double, 2>)_mm_sqrt_pd((__m128d)v); }
#elif defined(__aarch64__)
ESAPN_INLINE Vec<float, 4> root(Vec<float, 4> v) { return (Vec<float, 4>)vsqrtq_f32((float32x4_t)v); }
ESAPN_INLINE Vec<double, 2> root(Vec<double, 2> v) { return (Vec<double, 2>)vsqrtq_f64((float64x2_t)v); }
#else
template <class V>
ESAPN_INLINE V root(V v) {
  for (unsigned i = 0; i < sizeof v / sizeof v[0]; i++) v[i] = root(v[i]);
  return v;
}
#endif
#if defined(__x86_64__) && ESAPN_BYTES >= 32
ESAPN_INLINE Vec<float, 8> root(Vec<float, 8> v) { return (Vec<float, 8>)_mm256_sqrt_ps((__m256)v); }
ESAPN_INLINE Vec<double, 4> root(Vec<double, 4> v) { return (Vec<double, 4>)_mm256_sqrt_pd((__m256d)v); }
#endif
#if defined(__x86_64__) && ESAPN_BYTES >= 64
ESAPN_INLINE Vec<float, 16> root(Vec<float, 16> v) { return (Vec<float, 16>)_mm512_sqrt_ps((__m512)v); }
ESAPN_INLINE Vec<double, 8> root(Vec<double, 8> v) { return (Vec<double, 8>)_mm512_sqrt_pd((__m512d)v); }
#endif

// W vectors of W lanes as a matrix, transposed: ever smaller blocks off the diagonal change places.
template <class V, int W, int BLOCK = W / 2>
struct Transpose {
  template <int... LANE>
  static ESAPN_INLINE void pair(V& a, V& b, std::integer_sequence<int, LANE...>) {
    const V low = __builtin_shufflevector(a, b, ((LANE & BLOCK) ? W + LANE - BLOCK : LANE)...);
    b = __builtin_shufflevector(a, b, ((LANE & BLOCK) ? W + LANE : LANE + BLOCK)...);
    a = low;
  }
  static ESAPN_INLINE void run(V* v) {
    ESAPN_UNROLL
    for (int i = 0; i < W; i++)
      if (!(i & BLOCK)) pair(v[i], v[i + BLOCK], std::make_integer_sequence<int, W>{});
    Transpose<V, W, BLOCK / 2>::run(v);
  }
};
template <class V, int W>
struct Transpose<V, W, 0> {
  static ESAPN_INLINE void run(V*) {}
};

ESAPN_INLINE void prefetch(const void* from, int64_t bytes) {
  const char* line = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(from) & ~uintptr_t(63));
  for (; line < static_cast<const char*>(from) + bytes; line += 64) __builtin_prefetch(line, 0, 2);
}
