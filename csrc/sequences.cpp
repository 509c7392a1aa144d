// The sequence stage: one pass over the tokens of every sequence. C++ form of topr_kernels/sequence.py.
#include <math.h>
#include <stdint.h>

#include "kernels.h"
#include "taper.h"

namespace {

template <class R>
struct Limits {
  R log_min, log_max;
};

template <class R>
void sequences(const topr_params &p) {
  const auto *log_prob = static_cast<const R *>(p.log_prob);
  const auto *reward = static_cast<const R *>(p.reward);
  auto *const token_log_ratio = static_cast<R *>(p.token_log_ratio);
  auto *const d_log_prob = static_cast<R *>(p.d_log_prob);
  const auto behavior = [&p](int64_t i) {
    return p.behavior_dtype == TOPR_F64 ? static_cast<const double *>(p.behavior_log_prob)[i]
                                        : static_cast<const float *>(p.behavior_log_prob)[i];
  };
  const bool per_token = !p.behavior_per_sequence, by_token = p.ratio == TOPR_TOKEN;
  const Limits<R> positive = {static_cast<R>(p.log_pos_min), static_cast<R>(p.log_pos_max)};
  const Limits<R> negative = {static_cast<R>(p.log_neg_min), static_cast<R>(p.log_neg_max)};

  for (int64_t i = 0; i < p.outer * p.time; ++i) {
    token_log_ratio[i] = per_token ? R(0) : R(NAN);
    d_log_prob[i] = 0;
  }
  double sum = 0;
  int64_t scored_sequences = 0, scored_tokens = 0;
  for (int64_t s = 0; s < p.sequences; ++s) {
    const int64_t begin = p.offsets[s], end = p.offsets[s + 1];
    const auto scored = [&](int64_t i) {
      return p.labels[i] != TOPR_IGNORE_INDEX && !(p.shift && (i == begin || i % p.time == 0));
    };
    // NaN takes the positive branch and poisons below.
    const Limits<R> limits = reward[s] < 0 ? negative : positive;
    double log_ratio = 0, token_value = 0, token_weight = 0;
    int64_t length = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (!scored(i)) continue;
      ++length;
      if (!per_token) {
        log_ratio += log_prob[i];
        continue;
      }
      const double difference = static_cast<double>(log_prob[i]) - behavior(i);
      log_ratio += difference;
      token_log_ratio[i] = static_cast<R>(difference);
      if (by_token) {
        const Taper<R> token = taper(token_log_ratio[i], limits.log_min, limits.log_max);
        token_value += token.value;
        token_weight += token.weight;
        d_log_prob[i] = token.weight;
      }
    }
    // A sequence without a scored token has nothing to subtract from.
    if (!per_token && length > 0) log_ratio -= behavior(s);

    const R tokens = static_cast<R>(length > 0 ? length : 1);
    R objective, weight;
    if (by_token) {
      objective = static_cast<R>(token_value);
      weight = static_cast<R>(token_weight / tokens);
    } else {
      const double scale = p.ratio == TOPR_GEOMETRIC ? static_cast<double>(tokens) : 1.0;
      const Taper<R> whole = taper(static_cast<R>(log_ratio / scale), limits.log_min, limits.log_max);
      objective = static_cast<R>(whole.value * scale);
      weight = whole.weight;
    }
    const R share = p.reduction == TOPR_SEQUENCE_MEAN ? -reward[s] / tokens : -reward[s];
    for (int64_t i = begin; i < end; ++i) {
      if (!scored(i)) continue;
      const R w = by_token ? d_log_prob[i] : weight;
      // Selected, not multiplied: a reward of 0 cancels an infinite weight, never a NaN.
      d_log_prob[i] = reward[s] == 0 && !isnan(w) ? R(0) : share * w;
    }
    if (length > 0) {
      ++scored_sequences;
      scored_tokens += length;
      if (!(reward[s] == 0 && !isnan(objective))) sum += static_cast<double>(share * objective);
    }
    static_cast<R *>(p.log_ratio)[s] = static_cast<R>(log_ratio);
    static_cast<R *>(p.weight)[s] = length == 0 ? R(0) : isnan(reward[s]) ? R(NAN) : weight;
    static_cast<R *>(p.objective)[s] = length == 0 ? R(0) : objective;
    p.length[s] = length;
  }

  R denominator = 1;
  if (p.normalizer) {
    denominator = *static_cast<const R *>(p.normalizer);
  } else if (p.reduction != TOPR_SUM) {
    const int64_t units = p.reduction == TOPR_SEQUENCE_MEAN ? scored_sequences : scored_tokens;
    denominator = static_cast<R>(units > 0 ? units : 1);
  }
  *static_cast<R *>(p.denominator) = denominator;
  // A counted denominator is 0 when nothing is scored anywhere: that loss is a plain 0.
  *static_cast<R *>(p.loss) =
      scored_sequences == 0 ? R(0) : static_cast<R>(sum / static_cast<double>(denominator));
}

}  // namespace

void topr_sequences_f32(const topr_params &p) { sequences<float>(p); }
void topr_sequences_f64(const topr_params &p) { sequences<double>(p); }
