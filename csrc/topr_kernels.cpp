// The C ABI: checks params, then hands them to the kernels of the best instruction set.
#include "topr_kernels.h"

#include <math.h>

#include <initializer_list>

#include "kernels.h"

namespace {

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx2() {
  // F16C has no name there in older compilers; every machine with AVX2 has it.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#else
bool has_avx512() { return false; }
bool has_avx2() { return false; }
#endif

const ToprKernels *kernels_of(int32_t isa) {
  const ToprKernels *const wide = has_avx512() ? topr_kernels_avx512() : nullptr;
  const ToprKernels *const middle = has_avx2() ? topr_kernels_avx2() : nullptr;
  switch (isa) {
    case TOPR_ISA_AUTO: return wide ? wide : middle ? middle : topr_kernels_baseline();
    case TOPR_ISA_BASELINE: return topr_kernels_baseline();
    case TOPR_ISA_AVX2: return middle;
    case TOPR_ISA_AVX512: return wide;
    default: return nullptr;
  }
}

int check_common(const topr_params *p) {
  if (!p) return TOPR_NULL_POINTER;
  if (p->size != static_cast<int64_t>(sizeof(topr_params))) return TOPR_BAD_SIZE;
  if (p->dtype < TOPR_F32 || p->dtype > TOPR_F64) return TOPR_BAD_DTYPE;
  if (p->outer < 0 || p->time < 0) return TOPR_BAD_SHAPE;
  if (p->threads < 1 || !kernels_of(p->isa)) return TOPR_BAD_OPTION;
  return TOPR_OK;
}

int check_logits(const topr_params *p) {
  if (const int code = check_common(p)) return code;
  if (p->vocab < 1) return TOPR_BAD_SHAPE;
  if (!(p->temperature > 0) || isinf(p->temperature)) return TOPR_BAD_OPTION;
  if (!(p->softcap >= 0) || isinf(p->softcap)) return TOPR_BAD_OPTION;
  if (!(p->logit_scale > 0) || isinf(p->logit_scale)) return TOPR_BAD_OPTION;
  return TOPR_OK;
}

int check_sequences(const topr_params *p) {
  const int64_t positions = p->outer * p->time;
  if (p->sequences < 0) return TOPR_BAD_SHAPE;
  if (!p->offsets || (positions && !p->labels)) return TOPR_NULL_POINTER;
  // So that nothing is ever read out of bounds.
  int64_t last = 0;
  for (int64_t s = 0; s <= p->sequences; ++s) {
    if (p->offsets[s] < last || p->offsets[s] > positions) return TOPR_BAD_SHAPE;
    last = p->offsets[s];
  }
  return TOPR_OK;
}

// Tiles are fp32 or fp64, with the vocabulary contiguous.
int check_tile(const topr_params *p) {
  if (const int code = check_common(p)) return code;
  if (p->dtype != TOPR_F32 && p->dtype != TOPR_F64) return TOPR_BAD_DTYPE;
  if (p->outer != 1 || p->vocab < 1 || p->stride_vocab != 1) return TOPR_BAD_SHAPE;
  return TOPR_OK;
}

bool any_null(std::initializer_list<const void *> pointers) {
  for (const void *pointer : pointers) {
    if (!pointer) return true;
  }
  return false;
}

}  // namespace

int topr_log_prob(const topr_params *p) {
  if (const int code = check_logits(p)) return code;
  if (const int code = check_sequences(p)) return code;
  if (p->outer * p->time == 0) return TOPR_OK;
  if (any_null({p->logits, p->log_prob, p->lse, p->lse_low, p->row_entropy})) return TOPR_NULL_POINTER;
  kernels_of(p->isa)->log_prob(*p);
  return TOPR_OK;
}

int topr_gradient(const topr_params *p) {
  if (const int code = check_logits(p)) return code;
  if (const int code = check_sequences(p)) return code;
  if (p->outer * p->time == 0) return TOPR_OK;
  if (any_null({p->logits, p->gradient, p->log_prob, p->lse, p->lse_low, p->d_log_prob})) {
    return TOPR_NULL_POINTER;
  }
  if (!p->d_loss != !p->loss_denominator) return TOPR_NULL_POINTER;
  kernels_of(p->isa)->gradient(*p);
  return TOPR_OK;
}

int topr_sequences(const topr_params *p) {
  if (const int code = check_common(p)) return code;
  if (p->behavior_dtype != TOPR_F32 && p->behavior_dtype != TOPR_F64) return TOPR_BAD_DTYPE;
  if (p->ratio < TOPR_SEQUENCE || p->ratio > TOPR_TOKEN) return TOPR_BAD_OPTION;
  if (p->reduction < TOPR_SEQUENCE_MEAN || p->reduction > TOPR_SUM) return TOPR_BAD_OPTION;
  // A sum over the sequence cannot be clipped token by token.
  if (p->ratio == TOPR_TOKEN && p->behavior_per_sequence) return TOPR_BAD_OPTION;
  if (const int code = check_sequences(p)) return code;
  if (any_null({p->loss, p->denominator})) return TOPR_NULL_POINTER;
  if (p->outer * p->time > 0 && any_null({p->log_prob, p->token_log_ratio, p->d_log_prob})) {
    return TOPR_NULL_POINTER;
  }
  if (p->sequences && any_null({p->reward, p->log_ratio, p->weight, p->objective, p->length})) {
    return TOPR_NULL_POINTER;
  }
  const int64_t behaviors = p->behavior_per_sequence ? p->sequences : p->outer * p->time;
  if (behaviors && !p->behavior_log_prob) return TOPR_NULL_POINTER;
  p->dtype == TOPR_F64 ? topr_sequences_f64(*p) : topr_sequences_f32(*p);
  return TOPR_OK;
}

int topr_rows(const topr_params *p) {
  if (const int code = check_logits(p)) return code;
  if (const int code = check_tile(p)) return code;
  if (p->time == 0) return TOPR_OK;
  if (any_null({p->gradient, p->labels, p->log_prob, p->lse, p->lse_low, p->row_entropy, p->factor, p->total})) {
    return TOPR_NULL_POINTER;
  }
  kernels_of(p->isa)->rows(*p);
  return TOPR_OK;
}

int topr_columns(const topr_params *p) {
  if (const int code = check_tile(p)) return code;
  if (p->group_count < 0 || p->group_count > TOPR_MAX_GROUPS) return TOPR_BAD_SHAPE;
  if (!p->energy || (p->group_count && !p->sums)) return TOPR_NULL_POINTER;
  if (p->time && any_null({p->logits, p->factor, p->coefficient})) return TOPR_NULL_POINTER;
  if (p->time && p->group_count && !p->groups) return TOPR_NULL_POINTER;
  kernels_of(p->isa)->columns(*p);
  return TOPR_OK;
}

int topr_gather(const topr_params *p) {
  if (const int code = check_tile(p)) return code;
  if (p->column_count < 0) return TOPR_BAD_SHAPE;
  if (p->time == 0) return TOPR_OK;
  if (!p->gathered_sums || !p->logits) return TOPR_NULL_POINTER;
  if (p->column_count && any_null({p->columns, p->gathered})) return TOPR_NULL_POINTER;
  for (int64_t k = 0; k < p->column_count; ++k) {
    if (p->columns[k] < 0 || p->columns[k] >= p->vocab) return TOPR_BAD_SHAPE;
  }
  kernels_of(p->isa)->gather(*p);
  return TOPR_OK;
}

int topr_exp(const topr_params *p) {
  if (const int code = check_common(p)) return code;
  if (p->dtype != TOPR_F32) return TOPR_BAD_DTYPE;
  if (p->time && any_null({p->logits, p->gradient})) return TOPR_NULL_POINTER;
  kernels_of(p->isa)->exp(*p);
  return TOPR_OK;
}

int64_t topr_params_size(void) { return sizeof(topr_params); }

int topr_isa_available(void) {
  if (kernels_of(TOPR_ISA_AVX512)) return TOPR_ISA_AVX512;
  return kernels_of(TOPR_ISA_AVX2) ? TOPR_ISA_AVX2 : TOPR_ISA_BASELINE;
}

int topr_parallel(void) {
#if defined(TOPR_STD_THREADS) || defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

const char *topr_error_message(int code) {
  switch (code) {
    case TOPR_OK: return "no error";
    case TOPR_BAD_SIZE: return "params.size: the library was built from another version of the package";
    case TOPR_BAD_DTYPE: return "dtype: not one that this function takes";
    case TOPR_BAD_SHAPE: return "shape: a size, an offset or a column is out of range";
    case TOPR_BAD_OPTION: return "option: threads, isa, ratio, reduction or a transform is out of range";
    case TOPR_NULL_POINTER: return "pointer: one that this function needs is null";
    default: return "unknown error code";
  }
}
