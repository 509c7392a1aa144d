// Row and tile kernels, compiled once per instruction set. Everything here is in an unnamed namespace, and
// nothing inline of the standard library is used, not even isnan: the linker keeps one copy of such a function,
// and it must not be the one with instructions that another machine lacks.
//
// A row is read in chunks that stay in the first-level cache: transformed into a buffer, reduced there,
// and, where something is written, written from there. fp32 and fp64 chunks that need no transform are used
// where they lie. Sums run in fp32 lanes within a chunk and in fp64 over chunks.
#ifndef TOPR_ROWS_H
#define TOPR_ROWS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace {

constexpr int64_t kChunk = 2048;
// Elements one thread takes at a time; less work than this is not worth waking a thread.
constexpr int64_t kGrain = 1 << 14;
// Gradients larger than this do not fit a cache and are written past it.
constexpr int64_t kStreamBytes = 64 << 20;
// A gradient in fresh memory of this size is worth asking for large pages.
constexpr int64_t kLargePageBytes = 4 << 20;

template <class R>
bool is_nan(R x) {
  return x != x;
}
template <class R>
bool is_finite(R x) {
  return x - x == 0;
}
inline int64_t at_least_one(int64_t x) { return x > 0 ? x : 1; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Runs body(i) for i in [0, n), each about `cost` elements of work.
template <class Body>
void for_each(const topr_params &p, int64_t n, int64_t cost, const Body &body) {
  const int64_t step = at_least_one(kGrain / at_least_one(cost));
  const int64_t blocks = (n + step - 1) / step;
  parallel(p.threads, blocks, [&](int64_t b) {
    const int64_t end = smaller(n, (b + 1) * step);
    for (int64_t i = b * step; i < end; ++i) body(i);
  });
}

// z = softcap tanh(scale x / softcap) / temperature.
template <class V>
struct Transform {
  using real = typename V::real;
  bool capped, plain;
  real inner, outer;

  explicit Transform(const topr_params &p)
      : capped(p.softcap > 0),
        inner(static_cast<real>(capped ? p.logit_scale / p.softcap : p.logit_scale / p.temperature)),
        outer(static_cast<real>(capped ? p.softcap / p.temperature : 1.0)) {
    plain = !capped && inner == 1;
  }
};

// One row of logits in memory.
template <class T>
struct Row {
  const T *x;
  int64_t stride, vocab;
};

// Reads chunks of a row, transformed.
template <class V, class T>
struct Chunks {
  using real = typename V::real;
  const Transform<V> &transform;
  const bool want_slope;
  alignas(64) real buffer[kChunk];
  alignas(64) real slopes[kChunk];  // d z / d (scale x / temperature), where there is a softcap

  Chunks(const Transform<V> &t, bool slope) : transform(t), want_slope(slope && t.capped) {}

  // n logits from v on; padded to whole vectors with `pad`. May point into the row itself.
  const real *load(const Row<T> &row, int64_t v, int64_t n, real pad) {
    const T *x = row.x + v * row.stride;
    if (row.stride == 1 && transform.plain && n % V::width == 0) {
      if (const real *direct = same_type(x)) return direct;
    }
    int64_t i = 0;
    if (row.stride == 1) {
      for (; i + V::width <= n; i += V::width) put(i, V::load(x + i));
    }
    if (i < n) {
      const int64_t first = i, end = (n + V::width - 1) / V::width * V::width;
      for (; i < n; ++i) buffer[i] = read(x[i * row.stride]);
      for (; i < end; ++i) buffer[i] = 0;
      for (int64_t k = first; k < end; k += V::width) put(k, V::load(buffer + k));
      for (i = n; i < end; ++i) buffer[i] = pad;
    }
    return buffer;
  }

 private:
  static const real *same_type(const real *x) { return x; }
  template <class U>
  static const real *same_type(const U *) {
    return nullptr;
  }

  void put(int64_t i, V x) {
    if (transform.capped) {
      const V u = hyperbolic_tangent(x * V::all(transform.inner));
      if (want_slope) (V::all(1) - u * u).store(slopes + i);
      (u * V::all(transform.outer)).store(buffer + i);
    } else {
      (transform.plain ? x : x * V::all(transform.inner)).store(buffer + i);
    }
  }
};

// Four accumulators hide the latency of one.
template <class V>
typename V::real chunk_maximum(const typename V::real *z, int64_t n) {
  V top[4];
  for (V &t : top) t = V::all(-INFINITY);
  int64_t i = 0;
  // NaN is dropped here; it comes back with the sum.
  for (; i + 4 * V::width <= n; i += 4 * V::width) {
    for (int k = 0; k < 4; ++k) top[k] = maximum(V::load(z + i + k * V::width), top[k]);
  }
  for (; i < n; i += V::width) top[0] = maximum(V::load(z + i), top[0]);
  return lane_maximum(maximum(maximum(top[0], top[1]), maximum(top[2], top[3])));
}

struct Sums {
  double total, surprise;  // sum exp(z - m), sum exp(z - m) (z - m)
};

// Sums a chunk; with Write also leaves exp(z - m), times the slopes if there are any, at `to`.
template <class V, bool Entropy, bool Write>
Sums chunk_sums(const typename V::real *z, int64_t n, typename V::real m, typename V::real *to) {
  V total[4], surprise[4];
  for (int k = 0; k < 4; ++k) total[k] = surprise[k] = V::all(0);
  const V shift = V::all(m);
  const auto one = [&](int64_t i, int k) {
    const V d = V::load(z + i) - shift, p = exponential(d);
    total[k] = total[k] + p;
    // 0 (-inf) is NaN: by selection.
    if (Entropy) surprise[k] = surprise[k] + where_zero(p, V::all(0), p * d);
    if (Write) p.store(to + i);
  };
  int64_t i = 0;
  for (; i + 4 * V::width <= n; i += 4 * V::width) {
    for (int k = 0; k < 4; ++k) one(i + k * V::width, k);
  }
  for (; i < n; i += V::width) one(i, 0);
  Sums s = {lane_sum((total[0] + total[1]) + (total[2] + total[3])), 0};
  if (Entropy) s.surprise = lane_sum((surprise[0] + surprise[1]) + (surprise[2] + surprise[3]));
  return s;
}

// What a row of logits is to its label.
template <class R>
struct RowResult {
  R log_prob, lse, lse_low, entropy;
};

// m: maximum, 0 for a row of -inf alone; z_label in the units of m; label outside the row: NaN.
template <class R>
RowResult<R> finish(R m, double total, double surprise, R z_label, bool inside, bool entropy) {
  const double log_total = ::log(total), sum = static_cast<double>(m) + log_total;
  RowResult<R> r;
  r.lse = static_cast<R>(sum);
  // What rounding took; for fp64 by Knuth's two-sum, for fp32 the same line is exact.
  const double rest = sum - m, lost = (m - (sum - rest)) + (log_total - rest);
  const double low = (sum - static_cast<double>(r.lse)) + lost;
  r.lse_low = is_finite(r.lse) ? static_cast<R>(low) : R(0);
  // (z_y - m) - log sum: no large common offset to lose digits to.
  r.log_prob = static_cast<R>((static_cast<double>(z_label) - m) - log_total);
  if (z_label == -INFINITY && !is_nan(sum)) r.log_prob = -INFINITY;
  if (!inside) r.log_prob = NAN;
  r.entropy = entropy ? static_cast<R>(log_total - surprise / total) : R(NAN);
  return r;
}

// One pass over a row: chunks are reduced around a running maximum.
template <class V, class T>
RowResult<typename V::real> reduce(const Row<T> &row, Chunks<V, T> &chunks, int64_t label, bool entropy) {
  using real = typename V::real;
  real m = -INFINITY, z_label = NAN;
  double total = 0, surprise = 0;
  for (int64_t v = 0; v < row.vocab; v += kChunk) {
    const int64_t n = smaller(kChunk, row.vocab - v);
    const real *z = chunks.load(row, v, n, -INFINITY);
    const real top = chunk_maximum<V>(z, n);
    if (top > m) {
      if (total != 0) {  // NaN too
        const double d = static_cast<double>(m) - top, k = ::exp(d);
        surprise = k == 0 ? 0 : k * (surprise + d * total);  // d may be -inf
        total *= k;
      }
      m = top;
    }
    const real shift = m == -INFINITY ? real(0) : m;
    const Sums s = entropy ? chunk_sums<V, true, false>(z, n, shift, nullptr)
                           : chunk_sums<V, false, false>(z, n, shift, nullptr);
    total += s.total;
    surprise += s.surprise;
    if (label >= v && label < v + n) z_label = z[label - v];
  }
  if (m == -INFINITY) m = 0;
  return finish<real>(m, total, surprise, z_label, label >= 0 && label < row.vocab, entropy);
}

// Whether a flattened label position is the first of its sequence.
inline bool first_of_sequence(const topr_params &p, int64_t i) {
  int64_t low = 0, high = p.sequences;  // the first offset >= i is in [low, high]
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (p.offsets[middle] < i) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < p.sequences && p.offsets[low] == i;
}

inline bool scored(const topr_params &p, int64_t i) {
  return p.labels[i] != TOPR_IGNORE_INDEX && !(p.shift && first_of_sequence(p, i));
}

template <class V, class T>
void log_prob(const topr_params &p) {
  using real = typename V::real;
  const Transform<V> transform(p);
  real *const out[] = {static_cast<real *>(p.log_prob), static_cast<real *>(p.lse),
                       static_cast<real *>(p.lse_low), static_cast<real *>(p.row_entropy)};
  for_each(p, p.outer * p.time, p.vocab, [&](int64_t i) {
    RowResult<real> r = {0, 0, 0, p.entropy ? real(0) : real(NAN)};
    const int64_t o = i / p.time, t = i % p.time - (p.shift ? 1 : 0);
    if (t >= 0 && scored(p, i)) {
      const T *x = static_cast<const T *>(p.logits) + o * p.stride_outer + t * p.stride_time;
      Chunks<V, T> chunks(transform, false);
      r = reduce(Row<T>{x, p.stride_vocab, p.vocab}, chunks, p.labels[i], p.entropy != 0);
    }
    out[0][i] = r.log_prob;
    out[1][i] = r.lse;
    out[2][i] = r.lse_low;
    out[3][i] = r.entropy;
  });
}

// Where a row of the gradient goes.
template <class T>
struct Destination {
  T *to;
  int64_t stride;
  bool stream;
};

template <class V, class T>
void write_zeros(const Destination<T> &d, int64_t vocab) {
  int64_t v = 0;
  if (d.stride == 1) {
    for (; v + V::width <= vocab; v += V::width) V::all(0).store(d.to + v);
  }
  for (; v < vocab; ++v) write(d.to + v * d.stride, 0);
}

template <class V, class T>
void write_gradient(const Row<T> &row, const Destination<T> &d, Chunks<V, T> &chunks, int64_t label,
                    typename V::real lse, typename V::real low, typename V::real log_prob,
                    typename V::real coefficient) {
  using real = typename V::real;
  // One NaN for all: its low half is empty, as Floats asks of what it rounds to bf16.
  const auto plain = [](real x) { return is_nan(x) ? real(NAN) : x; };
  const V high = V::all(plain(lse)), rest = V::all(plain(low)), factor = V::all(plain(-coefficient));
  // One that is out of range has a log-prob of NaN, which must not get lost.
  label = label < 0 ? 0 : smaller(label, row.vocab - 1);
  real at_label = 0;
  for (int64_t v = 0; v < row.vocab; v += kChunk) {
    const int64_t n = smaller(kChunk, row.vocab - v);
    const real *z = chunks.load(row, v, n, 0);
    const auto one = [&](int64_t i) {
      const V g = exponential((V::load(z + i) - high) - rest) * factor;
      return chunks.want_slope ? g * V::load(chunks.slopes + i) : g;
    };
    if (label >= v && label < v + n) {
      // The true class before any rounding: 1 - p_y = -expm1(log p_y).
      at_label = static_cast<real>(-::expm1(static_cast<double>(log_prob))) * coefficient;
      if (chunks.want_slope) at_label *= chunks.slopes[label - v];
    }
    T *const to = d.to + v * d.stride;
    int64_t i = 0;
    if (d.stride == 1) {
      if (d.stream) {
        for (; i + V::width <= n; i += V::width) one(i).stream(to + i);
      } else {
        for (; i + 2 * V::width <= n; i += 2 * V::width) store_pair(to + i, one(i), one(i + V::width));
      }
    }
    for (; i < n; i += V::width) {
      real lanes[V::width];
      one(i).store(lanes);
      for (int64_t k = 0; k < V::width && i + k < n; ++k) write(to + (i + k) * d.stride, lanes[k]);
    }
  }
  write(d.to + label * d.stride, at_label);
}

inline void finish_streaming() {
#if defined(TOPR_SIMD_AVX512) || defined(TOPR_SIMD_AVX2)
  _mm_sfence();
#endif
}

// Fresh memory comes in pages of 4 KiB, a fault each, unless one asks for larger ones.
inline void ask_for_large_pages(void *memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 1 << 21, start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + page - 1) / page * page, last = (start + bytes) / page * page;
  // Advice only: where it is refused, nothing is lost.
  if (last > first) (void)madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

template <class V, class T>
void gradient(const topr_params &p) {
  using real = typename V::real;
  const Transform<V> transform(p);
  const auto *lse = static_cast<const real *>(p.lse), *low = static_cast<const real *>(p.lse_low);
  const auto *log_prob = static_cast<const real *>(p.log_prob);
  const auto *d_log_prob = static_cast<const real *>(p.d_log_prob);
  const real scale = p.d_loss && p.loss_denominator ? *static_cast<const real *>(p.d_loss) /
                                                          *static_cast<const real *>(p.loss_denominator)
                                                    : real(1);
  const real temperature = static_cast<real>(p.temperature);
  const bool fresh = p.gradient != p.logits;
  const int64_t bytes = p.outer * p.time * p.vocab * static_cast<int64_t>(sizeof(T));
  const bool dense = p.gradient_stride_vocab == 1 && p.gradient_stride_time == p.vocab &&
                     (p.outer == 1 || p.gradient_stride_outer == p.time * p.vocab);
  const bool large = fresh && dense && bytes >= kStreamBytes;
  if (fresh && dense && bytes >= kLargePageBytes) ask_for_large_pages(p.gradient, bytes);
  for_each(p, p.outer * p.time, p.vocab, [&](int64_t row) {
    const int64_t o = row / p.time, t = row % p.time;
    const int64_t i = p.shift ? row + 1 : row;
    T *const to = static_cast<T *>(p.gradient) + o * p.gradient_stride_outer + t * p.gradient_stride_time;
    Destination<T> d = {to, p.gradient_stride_vocab, false};
    real c = 0;
    if ((!p.shift || t + 1 < p.time) && scored(p, i)) {
      c = d_log_prob[i];
      // Exactly 0 stays 0, also under an infinite loss scale; a NaN scale reaches every row.
      if (c != 0 || is_nan(scale)) c = c * scale / temperature;
    }
    if (c == 0) {
      write_zeros<V>(d, p.vocab);
      return;
    }
    d.stream = large && reinterpret_cast<uintptr_t>(to) % 64 == 0 && p.vocab % V::width == 0;
    const T *x = static_cast<const T *>(p.logits) + o * p.stride_outer + t * p.stride_time;
    Chunks<V, T> chunks(transform, true);
    write_gradient(Row<T>{x, p.stride_vocab, p.vocab}, d, chunks, p.labels[i], lse[i], low[i],
                   log_prob[i], c);
    if (d.stream) finish_streaming();
  });
}

template <class V>
void rows(const topr_params &p) {
  using real = typename V::real;
  const Transform<V> transform(p);
  const bool keep = p.grad != 0, entropy = p.entropy != 0;
  for_each(p, p.time, p.vocab, [&](int64_t t) {
    real *const x = static_cast<real *>(p.gradient) + t * p.stride_time;
    const Row<real> row = {x, 1, p.vocab};
    const bool inside = p.labels[t] >= 0 && p.labels[t] < p.vocab;
    const bool silent = p.labels[t] == TOPR_IGNORE_INDEX;  // fills a tile up
    const int64_t label = p.labels[t] < 0 ? 0 : smaller(p.labels[t], p.vocab - 1);
    Chunks<V, real> chunks(transform, keep);
    double total = 0, surprise = 0, sloped = 0;
    real m = -INFINITY, z_label = NAN, slope_label = 1;
    for (int64_t v = 0; v < p.vocab; v += kChunk) {
      const int64_t n = smaller(kChunk, p.vocab - v);
      // A softcap is applied again below: a row of its results does not fit beside the logits.
      const real top = chunk_maximum<V>(chunks.load(row, v, n, -INFINITY), n);
      m = top > m ? top : m;
    }
    if (m == -INFINITY) m = 0;
    alignas(64) real e[kChunk];
    for (int64_t v = 0; v < p.vocab; v += kChunk) {
      const int64_t n = smaller(kChunk, p.vocab - v);
      const real *z = chunks.load(row, v, n, -INFINITY);
      if (label >= v && label < v + n) {
        z_label = z[label - v];
        if (chunks.want_slope) slope_label = chunks.slopes[label - v];
      }
      // Straight into the row where whole vectors fit. Without a gradient the sums are the same to the
      // bit, and nothing is written: log mu is scored like that.
      real *const to = n % V::width == 0 ? x + v : e;
      const Sums s = keep ? (entropy ? chunk_sums<V, true, true>(z, n, m, to)
                                     : chunk_sums<V, false, true>(z, n, m, to))
                          : (entropy ? chunk_sums<V, true, false>(z, n, m, nullptr)
                                     : chunk_sums<V, false, false>(z, n, m, nullptr));
      total += s.total;
      surprise += s.surprise;
      if (chunks.want_slope) {
        V sum = V::all(0);
        for (int64_t i = 0; i < n; i += V::width) {
          const V g = V::load(to + i) * V::load(chunks.slopes + i);
          g.store(to + i);
          sum = sum + g;
        }
        sloped += lane_sum(sum);
      }
      if (keep && to == e) {
        for (int64_t i = 0; i < n; ++i) x[v + i] = e[i];
      }
    }
    const RowResult<real> r = finish<real>(m, total, surprise, z_label, inside, entropy);
    if (keep && !silent) {
      // The true class in the arithmetic dtype: 1 - p_y = -expm1(log p_y) keeps every digit.
      const real fixed = static_cast<real>(total * ::expm1(static_cast<double>(r.log_prob))) * slope_label;
      sloped += static_cast<double>(fixed) - x[label];
      x[label] = fixed;
    }
    static_cast<real *>(p.log_prob)[t] = silent ? real(0) : r.log_prob;
    static_cast<real *>(p.lse)[t] = r.lse;
    static_cast<real *>(p.lse_low)[t] = r.lse_low;
    static_cast<real *>(p.row_entropy)[t] = r.entropy;
    static_cast<real *>(p.factor)[t] = static_cast<real>(-p.logit_scale / p.temperature / total);
    static_cast<real *>(p.total)[t] = chunks.want_slope ? static_cast<real>(sloped) : real(0);
  });
}

constexpr int kGroups = 8;          // sums kept in registers at a time
constexpr int64_t kColumns = 512;   // columns of one block of work
constexpr int64_t kRowBlock = 256;  // rows whose weights are kept at a time

// Adds rows [0, n) of 2 vectors of columns to sums[0 .. G) and, with Energy, to energy.
template <class V, int G, bool Energy>
void add_columns(const typename V::real *z, int64_t stride, int64_t n, const typename V::real *weight,
                 const typename V::real *square, typename V::real *sums, typename V::real *energy) {
  V s[G > 0 ? G : 1][2], e[2];
  for (int j = 0; j < 2; ++j) {
    for (int g = 0; g < G; ++g) s[g][j] = V::load(sums + g * kColumns + j * V::width);
    if (Energy) e[j] = V::load(energy + j * V::width);
  }
  for (int64_t t = 0; t < n; ++t) {
    const typename V::real *row = z + t * stride;
#if defined(__GNUC__)
    // Rows lie pages apart, which hardware does not follow.
    __builtin_prefetch(row + 8 * stride);
#endif
    for (int j = 0; j < 2; ++j) {
      const V x = V::load(row + j * V::width);
      if (Energy) e[j] = fma(x * x, V::all(square[t]), e[j]);
      for (int g = 0; g < G; ++g) s[g][j] = fma(x, V::all(weight[g * kRowBlock + t]), s[g][j]);
    }
  }
  for (int j = 0; j < 2; ++j) {
    for (int g = 0; g < G; ++g) s[g][j].store(sums + g * kColumns + j * V::width);
    if (Energy) e[j].store(energy + j * V::width);
  }
}

template <class V, bool Energy>
void add_columns(int groups, const typename V::real *z, int64_t stride, int64_t n,
                 const typename V::real *weight, const typename V::real *square,
                 typename V::real *sums, typename V::real *energy) {
  switch (groups) {
    case 0: return add_columns<V, 0, Energy>(z, stride, n, weight, square, sums, energy);
    case 1: return add_columns<V, 1, Energy>(z, stride, n, weight, square, sums, energy);
    case 2: return add_columns<V, 2, Energy>(z, stride, n, weight, square, sums, energy);
    case 3: return add_columns<V, 3, Energy>(z, stride, n, weight, square, sums, energy);
    case 4: return add_columns<V, 4, Energy>(z, stride, n, weight, square, sums, energy);
    case 5: return add_columns<V, 5, Energy>(z, stride, n, weight, square, sums, energy);
    case 6: return add_columns<V, 6, Energy>(z, stride, n, weight, square, sums, energy);
    case 7: return add_columns<V, 7, Energy>(z, stride, n, weight, square, sums, energy);
    default: return add_columns<V, 8, Energy>(z, stride, n, weight, square, sums, energy);
  }
}

template <class V>
void columns(const topr_params &p) {
  using real = typename V::real;
  const auto *z = static_cast<const real *>(p.logits);
  const auto *factor = static_cast<const real *>(p.factor);
  const auto *coefficient = static_cast<const real *>(p.coefficient);
  const auto *groups = static_cast<const real *>(p.groups);
  for_each(p, (p.vocab + kColumns - 1) / kColumns, kColumns * at_least_one(p.time), [&](int64_t block) {
    const int64_t begin = block * kColumns, wide = smaller(kColumns, p.vocab - begin);
    constexpr int64_t step = 2 * V::width;
    alignas(64) real weight[kGroups * kRowBlock], square[kRowBlock];
    alignas(64) real sums[kGroups * kColumns], energy[kColumns];
    // At least once, for the energy.
    for (int64_t g = 0; g == 0 || g < p.group_count; g += kGroups) {
      const int count = static_cast<int>(smaller(kGroups, p.group_count - g));
      for (real &s : sums) s = 0;
      for (real &e : energy) e = 0;
      for (int64_t t = 0; t < p.time; t += kRowBlock) {
        const int64_t n = smaller(kRowBlock, p.time - t);
        for (int64_t k = 0; k < n; ++k) {
          const real c = coefficient[t + k] * factor[t + k];
          square[k] = c * c;
          for (int j = 0; j < count; ++j) {
            weight[j * kRowBlock + k] = groups[(g + j) * p.time + t + k] * factor[t + k];
          }
        }
        const real *tile = z + t * p.stride_time + begin;
        int64_t v = 0;
        for (; v + step <= wide; v += step) {
          if (g == 0) {
            add_columns<V, true>(count, tile + v, p.stride_time, n, weight, square, sums + v, energy + v);
          } else {
            add_columns<V, false>(count, tile + v, p.stride_time, n, weight, square, sums + v, energy + v);
          }
        }
        for (; v < wide; ++v) {
          for (int64_t k = 0; k < n; ++k) {
            const real x = tile[k * p.stride_time + v];
            energy[v] += x * x * square[k];
            for (int j = 0; j < count; ++j) sums[j * kColumns + v] += x * weight[j * kRowBlock + k];
          }
        }
      }
      for (int64_t v = 0; v < wide; ++v) {
        if (g == 0) static_cast<real *>(p.energy)[begin + v] = energy[v];
        for (int j = 0; j < count; ++j) {
          static_cast<real *>(p.sums)[(g + j) * p.vocab + begin + v] = sums[j * kColumns + v];
        }
      }
    }
  });
}

template <class V>
void gather(const topr_params &p) {
  using real = typename V::real;
  for_each(p, p.time, p.column_count, [&](int64_t t) {
    const real *x = static_cast<const real *>(p.logits) + t * p.stride_time;
    real *const to = static_cast<real *>(p.gathered) + t * p.column_count;
    double sum = 0;
    for (int64_t k = 0; k < p.column_count; ++k) {
      to[k] = x[p.columns[k]];
      sum += to[k];
    }
    static_cast<real *>(p.gathered_sums)[t] = static_cast<real>(sum);
  });
}

void exp_of_all(const topr_params &p) {
  const auto *x = static_cast<const float *>(p.logits);
  auto *const y = static_cast<float *>(p.gradient);
  const int64_t blocks = (p.time + kChunk - 1) / kChunk;
  for_each(p, blocks, kChunk, [&](int64_t b) {
    int64_t i = b * kChunk;
    const int64_t end = smaller(p.time, i + kChunk);
    for (; i + Floats::width <= end; i += Floats::width) exponential_of_any(Floats::load(x + i)).store(y + i);
    if (i < end) {
      float lanes[Floats::width] = {0};
      for (int64_t k = i; k < end; ++k) lanes[k - i] = x[k];
      exponential_of_any(Floats::load(lanes)).store(lanes);
      for (int64_t k = i; k < end; ++k) y[k] = lanes[k - i];
    }
  });
}

// One function per dtype of the logits.
#define TOPR_BY_DTYPE(name)                                     \
  void name##_by_dtype(const topr_params &p) {                  \
    switch (p.dtype) {                                          \
      case TOPR_BF16: return name<Floats, Bf16>(p);             \
      case TOPR_F16: return name<Floats, F16>(p);               \
      case TOPR_F64: return name<Doubles, double>(p);           \
      default: return name<Floats, float>(p);                   \
    }                                                           \
  }
TOPR_BY_DTYPE(log_prob)
TOPR_BY_DTYPE(gradient)
#undef TOPR_BY_DTYPE

#define TOPR_BY_REAL(name)                                                \
  void name##_by_real(const topr_params &p) {                             \
    if (p.dtype == TOPR_F64) return name<Doubles>(p);                     \
    return name<Floats>(p);                                               \
  }
TOPR_BY_REAL(rows)
TOPR_BY_REAL(columns)
TOPR_BY_REAL(gather)
#undef TOPR_BY_REAL

const ToprKernels kTable = {log_prob_by_dtype, gradient_by_dtype, rows_by_real,
                            columns_by_real,   gather_by_real,    exp_of_all};

}  // namespace

#endif
