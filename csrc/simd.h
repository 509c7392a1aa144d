// Vectors of fp32 in the instruction set of the translation unit, and fp64 one at a time.
//
// select(a, b, ...) and the minimum and maximum are written so that NaN goes where the comment says:
// the instructions return their second operand when either one is NaN.
#ifndef TOPR_SIMD_H
#define TOPR_SIMD_H

#include <math.h>
#include <stdint.h>

#include "elements.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define TOPR_SIMD_AVX512
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define TOPR_SIMD_AVX2
#include <immintrin.h>
#endif

namespace {

#if defined(TOPR_SIMD_AVX512)

struct Floats {
  using real = float;
  static constexpr int width = 16;
  __m512 v;

  static Floats all(float x) { return {_mm512_set1_ps(x)}; }
  static Floats load(const float *p) { return {_mm512_loadu_ps(p)}; }
  static Floats load(const Bf16 *p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static Floats load(const F16 *p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)))};
  }
  void store(float *p) const { _mm512_storeu_ps(p, v); }
  void store(Bf16 *p) const { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), bf16()); }
  void store(F16 *p) const { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), f16()); }
  // Past the caches, to memory aligned to what is written.
  void stream(float *p) const { _mm512_stream_ps(p, v); }
  void stream(Bf16 *p) const { _mm256_stream_si256(reinterpret_cast<__m256i *>(p), bf16()); }
  void stream(F16 *p) const { _mm256_stream_si256(reinterpret_cast<__m256i *>(p), f16()); }

  // Rounded to bf16, in the upper half of each lane. A NaN whose low half is not full of ones stays one.
  __m512i rounded() const {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)), u);
  }
  __m256i bf16() const { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(), 16)); }
  __m256i f16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand where either is NaN.
inline Floats maximum(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats minimum(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
// b where a is 0, else c.
inline Floats where_zero(Floats a, Floats b, Floats c) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_EQ_OQ), c.v, b.v)};
}
// c where x < y, else d.
inline Floats where_less(Floats x, Floats y, Floats c, Floats d) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), d.v, c.v)};
}
inline Floats absolute(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Floats with_sign_of(Floats magnitude, Floats sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(magnitude.v, _mm512_and_ps(bit, sign.v))};
}
inline Floats nearest(Floats a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a 2^n for whole n; one rounding, also to subnormals.
inline Floats scale(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }

inline void store_pair(Bf16 *p, Floats a, Floats b) {
  // The odd words of both: one shuffle instead of two narrowings.
  alignas(64) static constexpr uint16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                   23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                   45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i words = _mm512_permutex2var_epi16(a.rounded(), _mm512_load_si512(odd), b.rounded());
  _mm512_storeu_si512(p, words);
}

#elif defined(TOPR_SIMD_AVX2)

struct Floats {
  using real = float;
  static constexpr int width = 8;
  __m256 v;

  static Floats all(float x) { return {_mm256_set1_ps(x)}; }
  static Floats load(const float *p) { return {_mm256_loadu_ps(p)}; }
  static Floats load(const Bf16 *p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static Floats load(const F16 *p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)))};
  }
  void store(float *p) const { _mm256_storeu_ps(p, v); }
  void store(Bf16 *p) const { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), bf16()); }
  void store(F16 *p) const { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), f16()); }
  void stream(float *p) const { _mm256_stream_ps(p, v); }
  void stream(Bf16 *p) const { _mm_stream_si128(reinterpret_cast<__m128i *>(p), bf16()); }
  void stream(F16 *p) const { _mm_stream_si128(reinterpret_cast<__m128i *>(p), f16()); }

  __m128i bf16() const {
    const __m256i u = _mm256_castps_si256(v), high = _mm256_srli_epi32(u, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    // Packs within each half; the permutation puts the two halves together.
    const __m256i packed = _mm256_packus_epi32(rounded, rounded);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
  __m128i f16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats maximum(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Floats minimum(Floats a, Floats b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Floats where_zero(Floats a, Floats b, Floats c) {
  return {_mm256_blendv_ps(c.v, b.v, _mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_EQ_OQ))};
}
inline Floats where_less(Floats x, Floats y, Floats c, Floats d) {
  return {_mm256_blendv_ps(d.v, c.v, _mm256_cmp_ps(x.v, y.v, _CMP_LT_OQ))};
}
inline Floats absolute(Floats a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Floats with_sign_of(Floats magnitude, Floats sign) {
  return {_mm256_or_ps(magnitude.v, _mm256_and_ps(_mm256_set1_ps(-0.0f), sign.v))};
}
inline Floats nearest(Floats a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Floats scale(Floats a, Floats n) {
  // In two steps, the first of which is exact: 2^n itself may be out of range.
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127), rest = _mm256_sub_epi32(whole, half);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, first), second)};
}

#else  // plain C++, in loops that compilers turn into whatever vectors the target always has

struct Floats {
  using real = float;
  static constexpr int width = 8;
  float v[width];

  static Floats all(float x) {
    Floats r;
    for (int i = 0; i < width; ++i) r.v[i] = x;
    return r;
  }
  template <class T>
  static Floats load(const T *p) {
    Floats r;
    for (int i = 0; i < width; ++i) r.v[i] = read(p[i]);
    return r;
  }
  template <class T>
  void store(T *p) const {
    for (int i = 0; i < width; ++i) write(p + i, v[i]);
  }
  template <class T>
  void stream(T *p) const {
    store(p);
  }
};

#define TOPR_EACH(expression)                                \
  Floats r;                                                  \
  for (int i = 0; i < Floats::width; ++i) r.v[i] = expression; \
  return r
inline Floats operator+(Floats a, Floats b) { TOPR_EACH(a.v[i] + b.v[i]); }
inline Floats operator-(Floats a, Floats b) { TOPR_EACH(a.v[i] - b.v[i]); }
inline Floats operator*(Floats a, Floats b) { TOPR_EACH(a.v[i] * b.v[i]); }
inline Floats operator/(Floats a, Floats b) { TOPR_EACH(a.v[i] / b.v[i]); }
#if defined(__FP_FAST_FMAF)
inline Floats fma(Floats a, Floats b, Floats c) { TOPR_EACH(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
#else
inline Floats fma(Floats a, Floats b, Floats c) { TOPR_EACH(a.v[i] * b.v[i] + c.v[i]); }
#endif
inline Floats maximum(Floats a, Floats b) { TOPR_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Floats minimum(Floats a, Floats b) { TOPR_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline Floats where_zero(Floats a, Floats b, Floats c) { TOPR_EACH(a.v[i] == 0 ? b.v[i] : c.v[i]); }
inline Floats where_less(Floats x, Floats y, Floats c, Floats d) {
  TOPR_EACH(x.v[i] < y.v[i] ? c.v[i] : d.v[i]);
}
inline Floats absolute(Floats a) { TOPR_EACH(float_of(bits_of(a.v[i]) & 0x7fffffff)); }
inline Floats with_sign_of(Floats m, Floats s) {
  TOPR_EACH(float_of(bits_of(m.v[i]) | (bits_of(s.v[i]) & 0x80000000)));
}
// Adding 1.5 2^23 leaves no bits for a fraction; for |a| < 2^22.
inline Floats nearest(Floats a) { TOPR_EACH((a.v[i] + 0x1.8p23f) - 0x1.8p23f); }
inline Floats scale(Floats a, Floats n) {
  Floats r;
  for (int i = 0; i < Floats::width; ++i) {
    // The low bits of n + 1.5 2^23 are n, also where a conversion of NaN would be undefined.
    const int32_t whole = static_cast<int32_t>(bits_of(n.v[i] + 0x1.8p23f) - bits_of(0x1.8p23f));
    const int32_t bounded = whole < -160 ? -160 : whole > 160 ? 160 : whole;
    const int32_t half = bounded >> 1;
    r.v[i] = a.v[i] * float_of(static_cast<uint32_t>(half + 127) << 23) *
             float_of(static_cast<uint32_t>(bounded - half + 127) << 23);
  }
  return r;
}
#undef TOPR_EACH

#endif

struct Doubles {
  using real = double;
  static constexpr int width = 1;
  double v;

  static Doubles all(double x) { return {x}; }
  static Doubles load(const double *p) { return {*p}; }
  void store(double *p) const { *p = v; }
  void stream(double *p) const { *p = v; }
};

inline Doubles operator+(Doubles a, Doubles b) { return {a.v + b.v}; }
inline Doubles operator-(Doubles a, Doubles b) { return {a.v - b.v}; }
inline Doubles operator*(Doubles a, Doubles b) { return {a.v * b.v}; }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return {a.v * b.v + c.v}; }
inline Doubles maximum(Doubles a, Doubles b) { return {a.v > b.v ? a.v : b.v}; }
inline Doubles where_zero(Doubles a, Doubles b, Doubles c) { return a.v == 0 ? b : c; }

inline Doubles exponential(Doubles x) { return {::exp(x.v)}; }
inline Doubles hyperbolic_tangent(Doubles x) { return {::tanh(x.v)}; }

// e^x to 2 ulp for x below 89: subnormal results, 0; NaN stays NaN. What a softmax needs.
// x = n ln 2 + r with |r| <= ln(2) / 2, e^r = 1 + r (1 + r q(r)) with a minimax q of degree 4, 0.05 ulp.
inline Floats exponential(Floats x) {
  // Below, the result is 0 anyway; NaN passes, as the second operand.
  x = maximum(Floats::all(-104.0f), x);
  const Floats n = nearest(x * Floats::all(1.44269504f));
  // ln 2 in two parts, the first with so few bits that its product with n is exact.
  Floats r = fma(n, Floats::all(-0.693359375f), x);
  r = fma(n, Floats::all(2.1219444e-4f), r);
  Floats q = Floats::all(1.381459851e-3f);
  q = fma(q, r, Floats::all(8.368716884e-3f));
  q = fma(q, r, Floats::all(4.166838805e-2f));
  q = fma(q, r, Floats::all(1.666652063e-1f));
  q = fma(q, r, Floats::all(4.999999345e-1f));
  const Floats one = Floats::all(1.0f);
  return scale(fma(fma(q, r, one), r, one), n);
}

// The same for every x: beyond 89 the result is inf anyway.
inline Floats exponential_of_any(Floats x) { return exponential(minimum(Floats::all(89.0f), x)); }

// tanh to 2 ulp: x + x^3 q(x^2) with a minimax q of degree 4 below 0.625; above, 1 less a small quotient of
// t = e^(-2|x|), whose errors count for little beside 1.
inline Floats hyperbolic_tangent(Floats x) {
  const Floats magnitude = absolute(x), y = x * x;
  Floats q = Floats::all(-5.704986925e-3f);
  q = fma(q, y, Floats::all(2.063908716e-2f));
  q = fma(q, y, Floats::all(-5.373971505e-2f));
  q = fma(q, y, Floats::all(1.333144220e-1f));
  q = fma(q, y, Floats::all(-3.333328194e-1f));
  const Floats one = Floats::all(1.0f), t = exponential(magnitude * Floats::all(-2.0f));
  const Floats far = with_sign_of(one - (t + t) / (one + t), x);
  return where_less(magnitude, Floats::all(0.625f), fma(q * y, x, x), far);
}

// Two vectors, the second behind the first.
template <class V, class T>
void store_pair(T *p, V a, V b) {
  a.store(p);
  b.store(p + V::width);
}

// Sum and maximum over the lanes, in one order.
template <class V>
double lane_sum(V a) {
  typename V::real lanes[V::width];
  a.store(lanes);
  double sum = 0;
  for (int i = 0; i < V::width; ++i) sum += lanes[i];
  return sum;
}
template <class V>
typename V::real lane_maximum(V a) {
  typename V::real lanes[V::width], top = -INFINITY;
  a.store(lanes);
  for (int i = 0; i < V::width; ++i) top = lanes[i] > top ? lanes[i] : top;
  return top;
}

}  // namespace

#endif
