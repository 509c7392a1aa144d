// The row kernels for AVX-512 F, BW, DQ and VL.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "rows.h"

const ToprKernels *topr_kernels_avx512() { return &kTable; }
#else
#include "kernels.h"

const ToprKernels *topr_kernels_avx512() { return nullptr; }
#endif
