// The row kernels of one instruction set; params are checked before they get here.
#ifndef TOPR_KERNEL_TABLE_H
#define TOPR_KERNEL_TABLE_H

#include "topr_kernels.h"

struct ToprKernels {
  void (*log_prob)(const topr_params &);
  void (*gradient)(const topr_params &);
  void (*rows)(const topr_params &);
  void (*columns)(const topr_params &);
  void (*gather)(const topr_params &);
  void (*exp)(const topr_params &);
};

// Null where the compiler was not told to use the instruction set.
const ToprKernels *topr_kernels_baseline();
const ToprKernels *topr_kernels_avx2();
const ToprKernels *topr_kernels_avx512();

void topr_sequences_f32(const topr_params &p);
void topr_sequences_f64(const topr_params &p);

#endif
