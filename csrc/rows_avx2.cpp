// The row kernels for AVX2 with FMA and F16C.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "rows.h"

const ToprKernels *topr_kernels_avx2() { return &kTable; }
#else
#include "kernels.h"

const ToprKernels *topr_kernels_avx2() { return nullptr; }
#endif
