// The taper of TOPR in log space (arXiv 2503.14286, Eq. 3 and 6): the C++ leaf of topr_kernels/taper.py.
#ifndef TOPR_TAPER_H
#define TOPR_TAPER_H

#include <math.h>

namespace {

template <class R>
struct Taper {
  R value, weight;
};

template <class R>
Taper<R> taper(R log_ratio, R log_min, R log_max) {
  // Compare and select: NaN stays NaN.
  R c = log_ratio < log_min ? log_min : log_ratio;
  c = c > log_max ? log_max : c;
  const R weight = exp(c);
  // Inside the limits the excess is exactly 0, also at +inf, where inf - inf is NaN.
  const R excess = log_ratio == c ? R(0) : log_ratio - c;
  const R value = weight == 0 ? R(0) : weight * (1 + excess);
  return {value, weight};
}

}  // namespace

#endif
