// Types of logits in memory, one at a time. bf16 and fp16 are rounded to nearest even; NaN stays NaN.
#ifndef TOPR_ELEMENTS_H
#define TOPR_ELEMENTS_H

#include <stdint.h>
#include <string.h>

namespace {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

inline float read(float x) { return x; }
inline double read(double x) { return x; }
inline float read(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float read(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, low = x.bits & 0x7fff;
  if (low >= 0x7c00) return float_of(sign | 0x7f800000 | (low & 0x3ff) << 13);
  if (low < 0x400) {  // subnormal: a whole number of 2^-24
    const float magnitude = static_cast<float>(low) * 0x1p-24f;
    return float_of(sign | bits_of(magnitude));
  }
  return float_of(sign | ((low << 13) + (112u << 23)));
}

inline void write(float *to, float x) { *to = x; }
inline void write(double *to, double x) { *to = x; }
inline void write(Bf16 *to, float x) {
  const uint32_t u = bits_of(x);
  to->bits = static_cast<uint16_t>(x != x ? (u >> 16 | 0x40) : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void write(F16 *to, float x) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000) {
    h = 0x7e00 | (magnitude >> 13 & 0x3ff);
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 and beyond
    h = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds to a whole number of 2^-24
    h = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  } else {
    h = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | h);
}

}  // namespace

#endif
