/* The native CPU kernels of topr_kernels behind a plain C ABI.
 *
 * One params struct is the whole interface: set `size`, the fields that the function names, and leave
 * the others zero. Every function returns an error code and never throws; outputs are written only when the
 * code is 0. Nothing is allocated but what OpenMP's runtime needs for its threads. Nothing here knows torch: one binary serves all of its versions.
 *
 * Arithmetic: fp32 for fp32, bf16 and fp16 logits, fp64 for fp64. `real` below is that type, float or
 * double. Sizes and strides are in elements. Results do not depend on the number of threads.
 */
#ifndef TOPR_KERNELS_H
#define TOPR_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define TOPR_API __declspec(dllexport)
#else
#define TOPR_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Label of a position that is not scored. */
#define TOPR_IGNORE_INDEX (-100)
/* Most groups of rows topr_columns takes at once. */
#define TOPR_MAX_GROUPS 64

enum topr_dtype { TOPR_F32 = 0, TOPR_BF16 = 1, TOPR_F16 = 2, TOPR_F64 = 3 };
enum topr_ratio { TOPR_SEQUENCE = 0, TOPR_GEOMETRIC = 1, TOPR_TOKEN = 2 };
enum topr_reduction { TOPR_SEQUENCE_MEAN = 0, TOPR_TOKEN_MEAN = 1, TOPR_SUM = 2 };
/* Instruction sets; AUTO is the best one this machine has. */
enum topr_isa { TOPR_ISA_AUTO = 0, TOPR_ISA_BASELINE = 1, TOPR_ISA_AVX2 = 2, TOPR_ISA_AVX512 = 3 };

enum topr_error {
  TOPR_OK = 0,
  TOPR_BAD_SIZE = 1,    /* params->size: the caller was built against another version */
  TOPR_BAD_DTYPE = 2,   /* dtype or behavior_dtype is none of topr_dtype that the function takes */
  TOPR_BAD_SHAPE = 3,   /* a negative size, no vocabulary, offsets or columns out of range, too many groups */
  TOPR_BAD_OPTION = 4,  /* threads, isa, ratio, reduction, temperature, softcap or logit_scale */
  TOPR_NULL_POINTER = 5 /* a pointer that the function needs is null */
};

typedef struct topr_params {
  int64_t size;    /* sizeof(topr_params) */
  int32_t threads; /* at least 1; serial in a build without OpenMP */
  int32_t isa;     /* topr_isa; one that the machine lacks is TOPR_BAD_OPTION */
  int32_t dtype;   /* topr_dtype of logits, gradient and gathered */

  int32_t shift;   /* row t predicts the label at t + 1 */
  int32_t entropy; /* also compute it; NaN otherwise */
  int32_t grad;    /* topr_rows: leave behind what the kernels of the backward read */

  int32_t ratio;     /* topr_ratio */
  int32_t reduction; /* topr_reduction */
  int32_t behavior_dtype;        /* TOPR_F32 or TOPR_F64 */
  int32_t behavior_per_sequence; /* [sequences] instead of [outer * time] */

  double logit_scale, softcap, temperature; /* z = softcap tanh(scale x / softcap) / temperature; softcap 0: none */

  /* logits [outer, time, vocab] with any strides */
  int64_t outer, time, vocab;
  int64_t stride_outer, stride_time, stride_vocab;
  const void *logits;
  /* gradient [outer, time, vocab]; the same memory as logits, or none of it */
  int64_t gradient_stride_outer, gradient_stride_time, gradient_stride_vocab;
  void *gradient;

  /* labels [outer * time]; offsets [sequences + 1] of the sequences in it, not decreasing. With `shift` the
   * first label of a sequence is not scored, nor is the first of one of the `outer` rows. */
  const int64_t *labels;
  const int64_t *offsets;
  int64_t sequences;

  /* real [outer * time], aligned with the labels: outputs of topr_log_prob, inputs of the others */
  void *log_prob, *lse, *lse_low, *row_entropy;
  /* real [outer * time]: output of topr_sequences, input of topr_gradient */
  void *d_log_prob;
  /* real, one number each, or null: inputs of topr_gradient */
  const void *d_loss, *loss_denominator;

  /* topr_sequences: behavior_dtype; real [sequences], baseline subtracted; one real or null */
  const void *behavior_log_prob;
  const void *reward;
  const void *normalizer;
  double log_pos_min, log_pos_max, log_neg_min, log_neg_max;
  /* its outputs: one real each; real [outer * time]; real [sequences]; int64 [sequences] */
  void *loss, *denominator;
  void *token_log_ratio;
  void *log_ratio, *weight, *objective;
  int64_t *length;

  /* Tiles: outer = 1, time rows of fp32 or fp64 logits, stride_vocab = 1; see the functions. */
  void *factor, *total;
  const void *coefficient, *groups;
  int64_t group_count;
  void *energy, *sums;
  const int64_t *columns;
  int64_t column_count;
  void *gathered, *gathered_sums;
} topr_params;

/* log pi of each label, log-sum-exp and the rest of it that rounding took, entropy of its row.
 * Reads logits, labels, offsets, shift, entropy, transforms; writes log_prob, lse, lse_low, row_entropy:
 * 0 where nothing is scored. A label outside the vocabulary has log_prob NaN. Each scored row of logits
 * is read once from memory, the others not at all. */
TOPR_API int topr_log_prob(const topr_params *p);

/* d_log_prob (onehot - softmax), through softcap and temperature, for every row of the logits; rows whose
 * coefficient is 0 are zero-filled and their logits not read. The coefficient of a token is d_log_prob,
 * times d_loss / loss_denominator where those are given. Reads what topr_log_prob reads and its outputs
 * log_prob, lse, lse_low; writes gradient. Where that is large and not the logits, the system is asked for
 * large pages (madvise). */
TOPR_API int topr_gradient(const topr_params *p);

/* Log-ratios, tapered weights (Eq. 3), objective and loss (Eq. 6) of arXiv 2503.14286 and the gradient of
 * the loss by each log-prob, to be divided by the denominator. Reads log_prob, labels, offsets, shift,
 * behavior_log_prob, reward, normalizer, limits, ratio, reduction (dtype: TOPR_F64 for double, any other
 * for float); writes loss, denominator, token_log_ratio, log_ratio, weight, objective, length, d_log_prob.
 * Sums over tokens run in fp64 in the order of the tokens. */
TOPR_API int topr_sequences(const topr_params *p);

/* Statistics of the rows of a tile, [time, vocab] with stride_time, given as `gradient`; and with `grad`, in
 * its place, E = exp(z - max z), whose entry at the label is total expm1(log_prob), times the slope of the
 * softcap: factor E is then the gradient of log_prob by what was there. Without `grad` the tile stays as it
 * is, and all statistics are the same to the bit. Reads the transforms, entropy and labels [time], one per row (no shift): TOPR_IGNORE_INDEX
 * gives log_prob 0, one outside the vocabulary NaN. Writes log_prob, lse, lse_low, row_entropy, factor and
 * total, each real [time]; total are the row sums of E, 0 but for a softcap. */
TOPR_API int topr_rows(const topr_params *p);

/* Column statistics of a tile left by topr_rows: energy[v] = sum_t (coefficient_t factor_t E_tv)^2 and
 * sums[k, v] = sum_t groups[k, t] factor_t E_tv. groups [group_count, time], sums [group_count, vocab]. */
TOPR_API int topr_columns(const topr_params *p);

/* E[:, columns] -> gathered [time, column_count], and its row sums. `columns` are in [0, vocab). */
TOPR_API int topr_gather(const topr_params *p);

/* exp of `time` floats from logits to gradient: for the test of its error, at most 2 ulp. */
TOPR_API int topr_exp(const topr_params *p);

/* sizeof(topr_params) of this binary; the instruction set AUTO stands for; whether it has threads. */
TOPR_API int64_t topr_params_size(void);
TOPR_API int topr_isa_available(void);
TOPR_API int topr_parallel(void);
/* What an error code means, in words. */
TOPR_API const char *topr_error_message(int code);

#ifdef __cplusplus
}
#endif
#endif
