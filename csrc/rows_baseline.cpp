// The row kernels in what every machine of the architecture has.
#include "rows.h"

const ToprKernels *topr_kernels_baseline() { return &kTable; }
