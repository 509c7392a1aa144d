/* Checks the native kernels against scalar references in long double, through the C ABI alone.
 *
 * The references are written from topr_kernels.h and the torch definitions, and share no line with the
 * kernels. Every array lies against a page that must not be touched, or between canaries; what must not be
 * read is NaN, or such a page itself. Every result is taken on every instruction set of the machine and
 * with 1, 2, 3 and 7 threads, whose bits must agree.
 *
 *     test_kernels [fuzz iterations [seed]]
 */
#include "../topr_kernels.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cfloat>
#include <cinttypes>
#include <cmath>
#include <cstddef>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <vector>

namespace {

using Wide = long double;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int kThreads[] = {1, 2, 3, 7};
constexpr int64_t kVocabs[] = {1,  2,  3,  15,  16,  17,  31,   32,   33,   63,   64,
                               65, 96, 127, 128, 129, 1000, 2047, 2048, 2049, 4097, 5000};

// ---------------------------------------------------------------------------- failure, random numbers

const char *g_test = "none";
char g_case[512] = "";
int64_t g_cases = 0;

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char *format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "FAILED %s: ", g_test);
  va_list args;
  va_start(args, format);
  std::vfprintf(stderr, format, args);
  va_end(args);
  std::fprintf(stderr, "\n  case: %s\n", g_case);
  std::exit(1);
}

__attribute__((format(printf, 1, 2))) void describe(const char *format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(g_case, sizeof g_case, format, args);
  va_end(args);
}

struct sigaction g_previous[2];

// Says which case it was, then faults again under the previous handler: a sanitizer's knows the stack.
void on_fault(int signal, siginfo_t *, void *) {
  const char *parts[] = {"FAILED ", g_test, ": touched memory out of bounds or not to be read\n  case: ",
                         g_case, "\n"};
  for (const char *part : parts) {
    if (write(2, part, std::strlen(part)) < 0) _exit(1);
  }
  sigaction(signal, &g_previous[signal == SIGBUS], nullptr);
}

struct Random {
  uint64_t state;
  uint64_t bits() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545F4914F6CDD1Dull;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>((bits() >> 11) % static_cast<uint64_t>(n)); }
  bool chance(double p) { return uniform() < p; }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }
  template <class T, size_t N>
  T pick(const T (&from)[N]) { return from[below(N)]; }
};

// ---------------------------------------------------------------------------- formats

const char *name_of(int dtype) {
  constexpr const char *names[] = {"f32", "bf16", "f16", "f64"};
  return names[dtype];
}

int64_t size_of(int dtype) { return dtype == TOPR_F64 ? 8 : dtype == TOPR_F32 ? 4 : 2; }

// The dtype of the arithmetic, `real` of the header.
int real_of(int dtype) { return dtype == TOPR_F64 ? TOPR_F64 : TOPR_F32; }

// Distance of neighbours at x: digits after the leading one, and exponent of the smallest normal number.
Wide spacing(int dtype, Wide x) {
  constexpr int digits[] = {23, 7, 10, 52}, smallest[] = {-126, -126, -14, -1022};
  int exponent = smallest[dtype];
  if (x != 0 && std::isfinite(x)) exponent = std::max(exponent, std::ilogb(x));
  return std::ldexp(Wide(1), exponent - digits[dtype]);
}

double largest(int dtype) {
  constexpr double values[] = {FLT_MAX, 0x1.FEp127, 65504, DBL_MAX};
  return values[dtype];
}

// To the nearest value of the format, ties to even; infinite from half a step past the largest.
double rounded(int dtype, Wide x) {
  if (x == 0 || !std::isfinite(x)) return static_cast<double>(x);
  Wide step = spacing(dtype, x);
  Wide r = std::nearbyint(x / step) * step;
  if (std::fabs(r) > largest(dtype)) return x < 0 ? -kInf : kInf;
  return static_cast<double>(r);
}

double unit(int dtype) { return dtype == TOPR_F64 ? 0x1p-53 : 0x1p-24; }
double tiny(int dtype) { return dtype == TOPR_F64 ? 0x1p-1074 : 0x1p-149; }

double load(int dtype, const void *p) {
  if (dtype == TOPR_F64) {
    double x;
    std::memcpy(&x, p, 8);
    return x;
  }
  uint32_t u = 0;
  std::memcpy(&u, p, static_cast<size_t>(size_of(dtype)));
  if (dtype == TOPR_F16) {
    int exponent = (u >> 10) & 31, fraction = u & 1023;
    double x = exponent == 31 ? (fraction ? kNaN : kInf)
               : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                              : std::ldexp(fraction, -24);
    return u & 0x8000 ? -x : x;
  }
  if (dtype == TOPR_BF16) u <<= 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

void store(int dtype, void *p, double value) {
  if (dtype == TOPR_F64) {
    std::memcpy(p, &value, 8);
    return;
  }
  double x = rounded(dtype, value);
  uint32_t u;
  if (dtype == TOPR_F16) {
    uint32_t sign = std::signbit(x) ? 0x8000 : 0;
    double a = std::fabs(x);
    if (std::isnan(a)) u = 0x7E00;
    else if (std::isinf(a)) u = 0x7C00;
    else if (a < 0x1p-14) u = static_cast<uint32_t>(std::ldexp(a, 24));
    else {
      int e = std::ilogb(a);
      u = (static_cast<uint32_t>(e + 15) << 10) | (static_cast<uint32_t>(std::ldexp(a, 10 - e)) & 1023);
    }
    u |= sign;
  } else {
    float f = static_cast<float>(x);
    std::memcpy(&u, &f, 4);
    if (dtype == TOPR_BF16) u >>= 16;
  }
  std::memcpy(p, &u, static_cast<size_t>(size_of(dtype)));
}

// ---------------------------------------------------------------------------- memory

enum Edge { kStart, kMiddle, kEnd };

// Bytes that end or start at a page nobody may touch, or lie between canaries.
class Guarded {
 public:
  Guarded() = default;
  Guarded(const Guarded &) = delete;
  Guarded &operator=(const Guarded &) = delete;
  ~Guarded() {
    if (map_) munmap(map_, capacity_ + 2 * page());
  }
  static size_t page() {
    static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return size;
  }
  void reset(int64_t bytes, Edge edge, int64_t lead, uint8_t fill) {
    bytes_ = static_cast<size_t>(bytes);
    size_t need = bytes_ + 4 * kCanary + static_cast<size_t>(lead);
    if (need > capacity_) {
      if (map_) munmap(map_, capacity_ + 2 * page());
      capacity_ = (need + page() - 1) / page() * page();
      void *map = mmap(nullptr, capacity_ + 2 * page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (map == MAP_FAILED) fail("no memory for the test");
      map_ = static_cast<uint8_t *>(map);
      if (mprotect(map_ + page(), capacity_, PROT_READ | PROT_WRITE)) fail("mprotect");
    }
    uint8_t *first = map_ + page(), *last = first + capacity_;
    data_ = edge == kStart ? first : edge == kEnd ? last - bytes_ : first + kCanary + lead;
    before_ = std::min<size_t>(kCanary, static_cast<size_t>(data_ - first));
    after_ = std::min<size_t>(kCanary, static_cast<size_t>(last - data_) - bytes_);
    std::memset(data_ - before_, kByte, before_);
    std::memset(data_, fill, bytes_);
    std::memset(data_ + bytes_, kByte, after_);
  }
  void check(const char *what) const {
    for (size_t i = 0; i < before_; ++i) {
      if (data_[-1 - static_cast<std::ptrdiff_t>(i)] != kByte) fail("%s: wrote %zu bytes before its start", what, i + 1);
    }
    for (size_t i = 0; i < after_; ++i) {
      if (data_[bytes_ + i] != kByte) fail("%s: wrote %zu bytes past its end", what, i + 1);
    }
  }
  uint8_t *data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kCanary = 256;
  static constexpr uint8_t kByte = 0xC5;
  uint8_t *map_ = nullptr, *data_ = nullptr;
  size_t capacity_ = 0, bytes_ = 0, before_ = 0, after_ = 0;
};

// Numbers of one format in guarded memory.
class Array {
 public:
  void reset(Random &random, int dtype, int64_t n) {
    dtype_ = dtype;
    n_ = n;
    constexpr Edge edges[] = {kStart, kMiddle, kMiddle, kEnd, kEnd};
    // 0xFF is NaN in every format; the other fill is a number, so that an expected NaN must be written too.
    memory_.reset(n * size_of(dtype), random.pick(edges), random.below(17) * size_of(dtype),
                  random.chance(0.5) ? 0xFF : 0xAB);
  }
  int64_t size() const { return n_; }
  void *data() const { return memory_.data(); }
  double get(int64_t i) const { return load(dtype_, memory_.data() + i * size_of(dtype_)); }
  void set(int64_t i, double x) { store(dtype_, memory_.data() + i * size_of(dtype_), x); }
  void fill(double x) {
    for (int64_t i = 0; i < n_; ++i) set(i, x);
  }
  void check(const char *what) const { memory_.check(what); }
  std::vector<uint8_t> bytes() const { return {memory_.data(), memory_.data() + memory_.bytes()}; }
  void restore(const std::vector<uint8_t> &bytes) {
    if (!bytes.empty()) std::memcpy(memory_.data(), bytes.data(), bytes.size());
  }

 private:
  Guarded memory_;
  int dtype_ = 0;
  int64_t n_ = 0;
};

struct Integers {
  Guarded memory;
  int64_t n = 0;
  void reset(Random &random, int64_t count) {
    n = count;
    constexpr Edge edges[] = {kStart, kMiddle, kEnd};
    memory.reset(8 * n, random.pick(edges), 8 * random.below(5), 0xAB);
  }
  int64_t *data() const { return reinterpret_cast<int64_t *>(memory.data()); }
  int64_t &operator[](int64_t i) const { return data()[i]; }
};

// [outer, time, vocab] in any order, with gaps and negative strides.
struct Layout {
  int64_t size[3] = {0, 0, 0}, stride[3] = {0, 0, 0}, low = 0, extent = 0;

  int64_t at(int64_t o, int64_t t, int64_t v) const {
    return o * stride[0] + t * stride[1] + v * stride[2] - low;
  }
  void measure() {
    low = 0;
    int64_t high = 0;
    for (int i = 0; i < 3; ++i) {
      if (size[i] == 0) {
        low = extent = 0;
        return;
      }
      int64_t reach = (size[i] - 1) * stride[i];
      low += std::min<int64_t>(reach, 0);
      high += std::max<int64_t>(reach, 0);
    }
    extent = high - low + 1;
  }
};

Layout random_layout(Random &random, int64_t outer, int64_t time, int64_t vocab) {
  Layout layout;
  layout.size[0] = outer, layout.size[1] = time, layout.size[2] = vocab;
  int order[3] = {2, 1, 0};
  constexpr int64_t steps[] = {1, 1, 1, 1, 2, 3}, pads[] = {0, 0, 1, 3, 16};
  bool plain = random.chance(0.3);
  if (!plain && random.chance(0.3)) std::swap(order[0], order[random.below(3)]);
  if (!plain && random.chance(0.3)) std::swap(order[1], order[2]);
  int64_t step = plain ? 1 : random.pick(steps);
  for (int i : order) {
    layout.stride[i] = step;
    step = step * std::max<int64_t>(layout.size[i], 1) + (plain ? 0 : random.pick(pads));
    if (!plain && random.chance(0.15)) layout.stride[i] = -layout.stride[i];
    // The stride of a dimension of one element means nothing.
    if (layout.size[i] == 1 && random.chance(0.2)) layout.stride[i] = random.chance(0.5) ? 0 : int64_t(1) << 40;
  }
  layout.measure();
  return layout;
}

// ---------------------------------------------------------------------------- calls

using Function = int (*)(const topr_params *);

topr_params new_params() {
  topr_params p;
  std::memset(&p, 0, sizeof p);
  p.size = sizeof p;
  p.threads = 1;
  return p;
}

void expect_code(int got, int expected, const char *what) {
  if (got != expected) {
    fail("%s: code %d (%s), expected %d (%s)", what, got, topr_error_message(got), expected,
         topr_error_message(expected));
  }
  ++g_cases;
}

void expect_close(const char *what, int64_t i, double got, Wide expected, Wide tolerance, int dtype) {
  if (std::isnan(expected)) {
    if (!std::isnan(got)) fail("%s[%" PRId64 "] = %.17g, expected NaN", what, i, got);
    return;
  }
  double nearest = rounded(dtype, expected);
  if (got == nearest) return;
  if (!std::isfinite(got) || !std::isfinite(expected) || !(std::fabs(got - expected) <= tolerance)) {
    fail("%s[%" PRId64 "] = %.17g, expected %.17Lg (%.17g in its format), tolerance %.3Lg", what, i, got,
         expected, nearest, tolerance);
  }
}

// Runs the function with every instruction set and number of threads; `check` sees the first result of an
// instruction set, the others must have its bits. AUTO must have those of the best one.
void run_everywhere(const char *name, Function function, topr_params p, const std::vector<Array *> &outputs,
                    Integers *length, const std::function<void()> &check) {
  std::vector<std::vector<uint8_t>> before;
  for (Array *output : outputs) before.push_back(output->bytes());
  char what[sizeof g_case];
  std::snprintf(what, sizeof what, "%s", g_case);
  for (int isa = topr_isa_available(); isa >= 0; --isa) {
    static std::vector<std::vector<uint8_t>> best;
    std::vector<std::vector<uint8_t>> first;
    std::vector<int64_t> first_length;
    for (int threads : kThreads) {
      if (isa == TOPR_ISA_AUTO && threads != 2) continue;
      describe("%.400s, isa %d, threads %d", what, isa, threads);
      for (size_t i = 0; i < outputs.size(); ++i) outputs[i]->restore(before[i]);
      p.isa = isa;
      p.threads = threads;
      expect_code(function(&p), TOPR_OK, name);
      for (Array *output : outputs) output->check("an output");
      std::vector<std::vector<uint8_t>> now;
      for (Array *output : outputs) now.push_back(output->bytes());
      std::vector<int64_t> now_length;
      if (length) {
        length->memory.check("length");
        now_length.assign(length->data(), length->data() + length->n);
      }
      if (isa == TOPR_ISA_AUTO) {
        if (now != best) fail("%s: AUTO differs from the best instruction set", name);
      } else if (threads == kThreads[0]) {
        check();
        first = now;
        first_length = now_length;
        if (isa == topr_isa_available()) best = now;
      } else if (now != first || now_length != first_length) {
        size_t i = 0;
        while (i < now.size() && now[i] == first[i]) ++i;
        fail("%s: output %zu differs from the one of 1 thread", name, i);
      }
    }
  }
  std::snprintf(g_case, sizeof g_case, "%s", what);
}

// ---------------------------------------------------------------------------- reference: rows

struct Transforms {
  double logit_scale = 1, softcap = 0, temperature = 1;
};

Transforms random_transforms(Random &random) {
  Transforms t;
  constexpr double temperatures[] = {1, 1, 0.7, 2.5}, softcaps[] = {0, 0, 5, 30};
  t.temperature = random.pick(temperatures);
  t.softcap = random.pick(softcaps);
  return t;
}

Wide transform(Wide x, const Transforms &t, int real) {
  if (t.softcap != 0) return std::tanh(x * (Wide(t.logit_scale) / t.softcap)) * t.softcap / t.temperature;
  Wide z = x * (Wide(t.logit_scale) / t.temperature);
  // A product beyond the range is infinite in the arithmetic of the kernels.
  return std::isinf(rounded(real, z)) ? Wide(rounded(real, z)) : z;
}

// By how much the transforms may miss a value of z.
Wide transform_error(Wide z, const Transforms &t, int real) {
  if (t.softcap != 0) return 8 * unit(real) * (t.softcap / t.temperature);
  return t.logit_scale == t.temperature ? 0 : 4 * unit(real) * std::fabs(z);
}

// By how much e^x, at most about 1, may be off where x is off by `error`, which may be huge.
Wide exp_error(Wide x, Wide error) {
  return std::exp(std::min(x + error, std::max(x, Wide(0.01)))) - std::exp(x - error);
}

struct RowReference {
  std::vector<Wide> z, e;  // transformed logits; exp(z - top)
  Wide top = 0, total = 0, log_total = 0, log_sum = 0, log_prob = 0, entropy = 0;
  Wide log_prob_error = 0, log_sum_error = 0, entropy_error = 0;
};

RowReference reference_row(const std::vector<double> &x, int64_t label, const Transforms &t, int real) {
  RowReference r;
  int64_t vocab = static_cast<int64_t>(x.size());
  for (double value : x) r.z.push_back(transform(value, t, real));
  r.top = -kInf;
  for (Wide z : r.z) {
    if (std::isnan(z) || std::isnan(r.top)) r.top = kNaN;
    else r.top = std::max(r.top, z);
  }
  if (r.top == -kInf) r.top = 0;
  Wide surprise = 0;
  for (Wide z : r.z) {
    Wide e = std::exp(z - r.top);
    r.e.push_back(e);
    r.total += e;
    if (e != 0) surprise += e * (z - r.top);
  }
  r.log_total = std::log(r.total);
  r.log_sum = r.top + r.log_total;
  r.entropy = r.log_total - surprise / r.total;
  Wide z_label = r.z[static_cast<size_t>(std::clamp<int64_t>(label, 0, vocab - 1))];
  r.log_prob = z_label - r.top - r.log_total;
  if (z_label == -kInf && !std::isnan(r.log_sum)) r.log_prob = -kInf;
  if (label < 0 || label >= vocab) r.log_prob = kNaN;

  // What is inherent: 64 roundings of the sum, one of each difference, and those of the transforms.
  Wide u = unit(real), digits = 1 + std::log(Wide(vocab));
  Wide top_error = std::isfinite(r.top) ? transform_error(r.top, t, real) : 0;
  Wide label_error = std::isfinite(z_label) ? transform_error(z_label, t, real) : 0;
  // Logits below the top still count within the digits of the sum.
  Wide near = t.softcap == 0 && t.logit_scale != t.temperature ? 4 * u * digits : 0;
  Wide distance = std::isfinite(z_label) && std::isfinite(r.top) ? std::fabs(z_label - r.top) : 0;
  r.log_sum_error = 32 * u * digits + top_error + near;
  r.log_prob_error = 32 * u * digits + 2 * u * distance + 2 * top_error + label_error + near;
  r.entropy_error = 64 * u * digits + 4 * (top_error + near) * digits;
  return r;
}

// lse and lse_low together are the log-sum-exp, to more digits than one of them has.
void check_log_sum(const RowReference &r, int64_t i, double lse, double low, int real) {
  if (!std::isfinite(r.log_sum)) {
    expect_close("lse", i, lse, r.log_sum, 0, real);
    if (low != 0) fail("lse_low[%" PRId64 "] = %.17g, expected 0 beside an lse of %.17g", i, low, lse);
    return;
  }
  expect_close("lse", i, lse, r.log_sum, r.log_sum_error + spacing(real, r.log_sum), real);
  if (!(std::fabs(low) <= spacing(real, lse) / 2)) {
    fail("lse_low[%" PRId64 "] = %.17g is more than rounding takes from lse %.17g", i, low, lse);
  }
  Wide sum = Wide(lse) + low;
  if (!(std::fabs(sum - r.log_sum) <= r.log_sum_error)) {
    fail("lse + lse_low [%" PRId64 "] = %.17Lg (%.17g + %.17g), expected %.17Lg, tolerance %.3Lg", i, sum, lse, low,
         r.log_sum, r.log_sum_error);
  }
}

// One row of logits of a random kind: ordinary, under an offset, or degenerate.
void fill_row(Random &random, int dtype, std::vector<double> &x) {
  double huge = std::min(largest(dtype), dtype == TOPR_F64 ? 1.5e308 : 3e38);
  double small = static_cast<double>(spacing(dtype, 0));
  int64_t n = static_cast<int64_t>(x.size());
  int kind = static_cast<int>(random.below(28));
  double width = random.chance(0.5) ? 3 : 0.5, equal = rounded(dtype, 20 * random.normal());
  int64_t v = 0;
  for (double &value : x) {
    double g = random.normal();
    switch (kind) {
      case 0: case 1: value = 1e4 + width * g; break;
      case 2: value = -1e4 + width * g; break;
      case 3: value = equal; break;
      case 4: value = -kInf; break;
      case 5: value = random.chance(0.5) ? -kInf : width * g; break;
      case 6: value = random.chance(0.3) ? huge : -huge; break;
      case 7: value = random.chance(0.01) ? huge : width * g; break;
      case 8: value = small * static_cast<double>(random.below(64) - 32); break;
      case 9: value = 60 * g; break;
      case 10: value = -huge * random.uniform(); break;
      // Maxima that grow along the row, slowly or all at once at its end.
      case 13: value = 20 * static_cast<double>(v) / static_cast<double>(n) + width * g; break;
      case 14: value = v + 3 < n ? -huge : g; break;
      case 15: value = v + 3 < n ? -huge : huge; break;
      default: value = width * g;
    }
    ++v;
  }
  // One odd value, where a tail or a lane alone would see it.
  constexpr double odd[] = {kNaN, kInf, -kInf};
  int64_t place = random.chance(0.5) ? n - 1 - random.below(std::min<int64_t>(n, 4)) : random.below(n);
  if (kind == 11) x[static_cast<size_t>(place)] = random.pick(odd);
  if (kind == 12) x[static_cast<size_t>(place)] = 50;
  for (double &value : x) value = rounded(dtype, value);
}

// ---------------------------------------------------------------------------- a random batch

// Logits, labels and sequences of one case, and which position is scored by which row.
struct Batch {
  int dtype = 0;
  int64_t outer = 0, time = 0, vocab = 0;
  bool shift = false, packed = false;
  Transforms transforms;
  Layout layout;
  Array logits;
  Integers labels, offsets;
  std::vector<bool> scored;             // [outer * time] positions of labels
  std::vector<std::vector<double>> x;   // [outer * time] rows of the logits, as stored
  std::vector<RowReference> reference;  // [outer * time] of the scored positions

  int64_t positions() const { return outer * time; }
  // The position whose label the row predicts, or -1.
  int64_t position(int64_t row) const {
    int64_t o = row / time, t = row % time + (shift ? 1 : 0);
    int64_t i = o * time + t;
    return t < time && scored[static_cast<size_t>(i)] ? i : -1;
  }
};

void random_sequences(Random &random, Batch &b, bool allow_invalid) {
  int64_t n = b.positions();
  std::vector<int64_t> bounds;
  if (b.packed) {
    bounds.push_back(0);
    while (bounds.back() < n) {
      constexpr int64_t lengths[] = {0, 1, 1, 2, 3, 5, 9};
      bounds.push_back(std::min(n, bounds.back() + random.pick(lengths)));
    }
    for (int64_t i = random.below(3); i > 0; --i) bounds.push_back(n);
  } else {
    for (int64_t o = 0; o <= b.outer; ++o) bounds.push_back(o * b.time);
  }
  b.offsets.reset(random, static_cast<int64_t>(bounds.size()));
  std::copy(bounds.begin(), bounds.end(), b.offsets.data());
  b.labels.reset(random, n);
  double ignored = random.chance(0.1) ? 1 : random.chance(0.3) ? 0 : 0.3;
  b.scored.assign(static_cast<size_t>(n), false);
  for (int64_t i = 0; i < n; ++i) {
    int64_t y = random.below(b.vocab);
    if (random.chance(0.1)) y = b.vocab - 1;
    const int64_t invalid[] = {-1, b.vocab, b.vocab + 7, -99, -101, INT64_MAX, INT64_MIN, int64_t(1) << 32};
    if (allow_invalid && random.chance(0.04)) y = random.pick(invalid);
    if (random.chance(ignored)) y = TOPR_IGNORE_INDEX;
    b.labels[i] = y;
    bool first = std::find(bounds.begin(), bounds.end() - 1, i) != bounds.end() - 1;
    if (b.shift && b.time > 0 && i % b.time == 0) first = true;
    b.scored[static_cast<size_t>(i)] = y != TOPR_IGNORE_INDEX && !(b.shift && first);
  }
}

void make_batch(Random &random, Batch &b, int dtype, int64_t vocab, int64_t most_rows) {
  b.dtype = dtype;
  b.vocab = vocab;
  b.shift = random.chance(0.5);
  b.packed = random.chance(0.5);
  b.outer = b.packed ? 1 : random.below(4);
  constexpr int64_t times[] = {0, 1, 2, 3, 5, 7, 11, 17};
  b.time = std::min(random.pick(times), most_rows);
  if (!b.packed && b.outer > 0) b.time = std::min(b.time, std::max<int64_t>(1, most_rows / b.outer));
  b.transforms = random_transforms(random);
  random_sequences(random, b, true);
  b.layout = random_layout(random, b.outer, b.time, vocab);
  b.logits.reset(random, dtype, b.layout.extent);
  b.logits.fill(kNaN);
  b.x.assign(static_cast<size_t>(b.positions()), {});
  b.reference.assign(static_cast<size_t>(b.positions()), {});
  for (int64_t row = 0; row < b.positions(); ++row) {
    // Every row that nobody is to read stays NaN, and so does what lies between the elements.
    int64_t i = b.position(row);
    if (i < 0) continue;
    std::vector<double> &x = b.x[static_cast<size_t>(row)];
    x.resize(static_cast<size_t>(vocab));
    fill_row(random, dtype, x);
    for (int64_t v = 0; v < vocab; ++v) b.logits.set(b.layout.at(row / b.time, row % b.time, v), x[static_cast<size_t>(v)]);
    b.reference[static_cast<size_t>(i)] = reference_row(x, b.labels[i], b.transforms, real_of(dtype));
  }
  describe("%s [%" PRId64 ", %" PRId64 ", %" PRId64 "] strides %" PRId64 " %" PRId64 " %" PRId64
           " %s%s softcap %g temperature %g",
           name_of(dtype), b.outer, b.time, vocab, b.layout.stride[0], b.layout.stride[1], b.layout.stride[2],
           b.packed ? "packed" : "padded", b.shift ? " shifted" : "", b.transforms.softcap, b.transforms.temperature);
}

topr_params params_of(const Batch &b) {
  topr_params p = new_params();
  p.dtype = b.dtype;
  p.shift = b.shift;
  p.logit_scale = b.transforms.logit_scale;
  p.softcap = b.transforms.softcap;
  p.temperature = b.transforms.temperature;
  p.outer = b.outer, p.time = b.time, p.vocab = b.vocab;
  p.stride_outer = b.layout.stride[0], p.stride_time = b.layout.stride[1], p.stride_vocab = b.layout.stride[2];
  p.logits = static_cast<uint8_t *>(b.logits.data()) - b.layout.low * size_of(b.dtype);
  p.labels = b.labels.data();
  p.offsets = b.offsets.data();
  p.sequences = b.offsets.n - 1;
  return p;
}

struct TokenOutputs {
  Array log_prob, lse, lse_low, entropy;
  void reset(Random &random, int real, int64_t n) {
    for (Array *a : all()) a->reset(random, real, n);
  }
  std::vector<Array *> all() { return {&log_prob, &lse, &lse_low, &entropy}; }
  void point(topr_params &p) const {
    p.log_prob = log_prob.data(), p.lse = lse.data(), p.lse_low = lse_low.data(), p.row_entropy = entropy.data();
  }
};

void check_log_prob(const Batch &b, const TokenOutputs &out, bool entropy) {
  int real = real_of(b.dtype);
  for (int64_t i = 0; i < b.positions(); ++i) {
    const RowReference &r = b.reference[static_cast<size_t>(i)];
    if (!b.scored[static_cast<size_t>(i)]) {
      if (out.log_prob.get(i) != 0 || out.lse.get(i) != 0 || out.lse_low.get(i) != 0) {
        fail("position %" PRId64 " is not scored: log_prob %g, lse %g, lse_low %g, expected 0", i,
             out.log_prob.get(i), out.lse.get(i), out.lse_low.get(i));
      }
      expect_close("row_entropy", i, out.entropy.get(i), entropy ? 0 : kNaN, 0, real);
      continue;
    }
    expect_close("log_prob", i, out.log_prob.get(i), r.log_prob, r.log_prob_error, real);
    check_log_sum(r, i, out.lse.get(i), out.lse_low.get(i), real);
    expect_close("row_entropy", i, out.entropy.get(i), entropy ? r.entropy : kNaN, r.entropy_error, real);
    g_cases += 4;
  }
}

// ---------------------------------------------------------------------------- log_prob and gradient

struct GradientInputs {
  Array d_log_prob, d_loss, denominator;
  bool scaled = false;
};

void random_coefficients(Random &random, const Batch &b, GradientInputs &in) {
  int real = real_of(b.dtype);
  in.d_log_prob.reset(random, real, b.positions());
  for (int64_t i = 0; i < b.positions(); ++i) {
    double c = 2 * random.normal();
    if (random.chance(0.25)) c = 0;
    if (random.chance(0.02)) c = kNaN;
    if (random.chance(0.02)) c = real == TOPR_F64 ? 1e-320 : 1e-44;
    // What is not scored has no coefficient, whatever lies there.
    if (!b.scored[static_cast<size_t>(i)]) c = random.chance(0.5) ? kNaN : 1;
    in.d_log_prob.set(i, c);
  }
  in.scaled = random.chance(0.6);
  in.d_loss.reset(random, real, 1);
  in.denominator.reset(random, real, 1);
  constexpr double scales[] = {1, -0.5, 3, 65536, 0, kInf, kNaN}, counts[] = {1, 3, 1000, 0.5};
  in.d_loss.set(0, random.chance(0.7) ? scales[random.below(4)] : random.pick(scales));
  in.denominator.set(0, random.chance(0.03) ? kNaN : random.pick(counts));
}

template <class T>
double scaled_coefficient(double d, double d_loss, double denominator) {
  T scale = static_cast<T>(d_loss) / static_cast<T>(denominator);
  // Exactly 0 stays 0 under an infinite loss scale; a NaN, of unsound offsets, reaches every scored row.
  if (d == 0 && !std::isnan(scale)) return 0;
  return static_cast<double>(static_cast<T>(d) * scale);
}

double coefficient_of(const Batch &b, const GradientInputs &in, int64_t i) {
  double c = in.d_log_prob.get(i);
  if (!in.scaled) return c;
  return real_of(b.dtype) == TOPR_F64 ? scaled_coefficient<double>(c, in.d_loss.get(0), in.denominator.get(0))
                                      : scaled_coefficient<float>(c, in.d_loss.get(0), in.denominator.get(0));
}

void check_gradient(const Batch &b, const GradientInputs &in, const TokenOutputs &forward, const Array &gradient,
                    const Layout &layout, const std::vector<uint8_t> &before) {
  int real = real_of(b.dtype);
  Wide u = unit(real), step = tiny(real);
  const Transforms &tr = b.transforms;
  for (int64_t row = 0; row < b.positions(); ++row) {
    int64_t o = row / b.time, t = row % b.time, i = b.position(row);
    Wide c = i < 0 ? 0 : coefficient_of(b, in, i);
    if (c == 0) {
      for (int64_t v = 0; v < b.vocab; ++v) {
        double got = gradient.get(layout.at(o, t, v));
        if (got != 0) fail("gradient of row %" PRId64 ", whose coefficient is 0: %g at %" PRId64, row, got, v);
      }
      continue;
    }
    Wide scale = c / tr.temperature;
    Wide lse = forward.lse.get(i), low = forward.lse_low.get(i), log_prob = forward.log_prob.get(i);
    int64_t label = std::clamp<int64_t>(b.labels[i], 0, b.vocab - 1);
    for (int64_t v = 0; v < b.vocab; ++v) {
      Wide z = b.reference[static_cast<size_t>(i)].z[static_cast<size_t>(v)];
      Wide exponent = z - lse - low, size, error;
      if (v == label) {
        size = -std::expm1(log_prob);
        error = 8 * u * std::fabs(size);
      } else {
        size = -Wide(rounded(real, std::exp(exponent)));
        error = 4 * step;
        if (std::isfinite(exponent)) {
          Wide off = 4 * u * std::fabs(exponent) + transform_error(z, tr, real);
          // Near 3e38 one rounding is more than the range of exp: nothing to expect.
          if (off > 1 && std::fabs(exponent) < off) continue;
          error += 8 * u * std::fabs(size) + exp_error(exponent, off);
        }
      }
      Wide slope = 1, slope_error = 0;
      if (tr.softcap != 0) {
        Wide part = z * tr.temperature / tr.softcap;
        slope = 1 - part * part;
        slope_error = 16 * u;
      }
      // An infinite coefficient times what may or may not round to 0: infinite or NaN, as it falls.
      double got = gradient.get(layout.at(o, t, v));
      if (std::isinf(c)) {
        if (std::isfinite(got)) fail("gradient[%" PRId64 ", %" PRId64 "] = %g under an infinite coefficient", row, v, got);
        continue;
      }
      Wide expected = size * scale * slope;
      Wide tolerance = std::fabs(scale) * (error + std::fabs(size) * (slope_error + 8 * u)) + 4 * step;
      tolerance += spacing(b.dtype, expected) * Wide(b.dtype == real ? 1 : 0.5001);
      char what[64];
      std::snprintf(what, sizeof what, "gradient of row %" PRId64 " at ", row);
      expect_close(what, v, got, expected, tolerance, b.dtype);
    }
    g_cases += b.vocab;
  }
  // Nothing but the elements: what lies between them has kept its bytes.
  std::vector<uint8_t> after = gradient.bytes();
  int64_t bytes = size_of(b.dtype);
  for (int64_t row = 0; row < b.positions(); ++row) {
    for (int64_t v = 0; v < b.vocab; ++v) {
      int64_t at = layout.at(row / b.time, row % b.time, v) * bytes;
      std::memcpy(after.data() + at, before.data() + at, static_cast<size_t>(bytes));
    }
  }
  if (after != before) fail("gradient: wrote between the elements");
}

void log_prob_and_gradient_case(Random &random, int dtype, int64_t vocab, int64_t most_rows) {
  static Batch b;
  static TokenOutputs out;
  static GradientInputs in;
  static Array gradient;
  make_batch(random, b, dtype, vocab, most_rows);
  int real = real_of(dtype);
  topr_params p = params_of(b);

  bool entropy = random.chance(0.5);
  out.reset(random, real, b.positions());
  out.point(p);
  p.entropy = entropy;
  run_everywhere("topr_log_prob", topr_log_prob, p, out.all(), nullptr,
                 [&] { check_log_prob(b, out, entropy); });

  // Half the time the exact values in place of the kernel's own, so that no error of it can hide here.
  if (random.chance(0.5)) {
    for (int64_t i = 0; i < b.positions(); ++i) {
      if (!b.scored[static_cast<size_t>(i)]) continue;
      const RowReference &r = b.reference[static_cast<size_t>(i)];
      out.log_prob.set(i, rounded(real, r.log_prob));
      out.lse.set(i, rounded(real, r.log_sum));
      out.lse_low.set(i, std::isfinite(r.log_sum) ? rounded(real, r.log_sum - rounded(real, r.log_sum)) : 0);
    }
  }
  // Where nothing is scored lies what must not matter.
  for (int64_t i = 0; i < b.positions(); ++i) {
    if (b.scored[static_cast<size_t>(i)]) continue;
    for (Array *a : {&out.log_prob, &out.lse, &out.lse_low}) a->set(i, kNaN);
  }
  random_coefficients(random, b, in);
  p.d_log_prob = in.d_log_prob.data();
  p.d_loss = in.scaled ? in.d_loss.data() : nullptr;
  p.loss_denominator = in.scaled ? in.denominator.data() : nullptr;
  p.row_entropy = nullptr;
  p.entropy = 0;
  // A row of coefficient 0 is not to be read either.
  for (int64_t row = 0; row < b.positions(); ++row) {
    int64_t i = b.position(row);
    if (i < 0 || coefficient_of(b, in, i) != 0) continue;
    for (int64_t v = 0; v < vocab; ++v) b.logits.set(b.layout.at(row / b.time, row % b.time, v), kNaN);
  }
  bool in_place = random.chance(0.4);
  Layout layout = in_place ? b.layout : random_layout(random, b.outer, b.time, vocab);
  if (!in_place) gradient.reset(random, dtype, layout.extent);
  Array &target = in_place ? b.logits : gradient;
  p.gradient_stride_outer = layout.stride[0];
  p.gradient_stride_time = layout.stride[1];
  p.gradient_stride_vocab = layout.stride[2];
  p.gradient = static_cast<uint8_t *>(target.data()) - layout.low * size_of(dtype);
  std::vector<uint8_t> before = target.bytes();
  size_t used = std::strlen(g_case);
  std::snprintf(g_case + used, sizeof g_case - used, ", gradient %s strides %" PRId64 " %" PRId64 " %" PRId64,
                in_place ? "in place" : "apart", layout.stride[0], layout.stride[1], layout.stride[2]);
  run_everywhere("topr_gradient", topr_gradient, p, {&target}, nullptr,
                 [&] { check_gradient(b, in, out, target, layout, before); });
}

void test_log_prob_and_gradient(Random &random, int iterations) {
  for (int64_t vocab : kVocabs) {
    for (int dtype : {TOPR_F32, TOPR_BF16, TOPR_F16, TOPR_F64}) log_prob_and_gradient_case(random, dtype, vocab, 5);
  }
  for (int i = 0; i < iterations; ++i) {
    int64_t vocab = random.chance(0.6) ? random.pick(kVocabs) : 1 + random.below(300);
    log_prob_and_gradient_case(random, static_cast<int>(random.below(4)), vocab, vocab > 500 ? 7 : 40);
  }
}

// A row's results are its own: the same bits alone as among others, at any place in the batch.
void test_row_alone(Random &random, int iterations) {
  for (int i = 0; i < iterations; ++i) {
    static Batch b;
    static TokenOutputs out, alone;
    make_batch(random, b, static_cast<int>(random.below(4)), random.pick(kVocabs), 12);
    int real = real_of(b.dtype);
    topr_params p = params_of(b);
    p.entropy = 1;
    p.isa = static_cast<int32_t>(1 + random.below(topr_isa_available()));
    p.threads = random.pick(kThreads);
    out.reset(random, real, b.positions());
    out.point(p);
    expect_code(topr_log_prob(&p), TOPR_OK, "topr_log_prob");
    for (int64_t row = 0; row < b.positions(); ++row) {
      int64_t k = b.position(row);
      if (k < 0) continue;
      topr_params q = p;
      int64_t label = b.labels[k], offsets[] = {0, 1};
      q.logits = static_cast<const uint8_t *>(b.logits.data()) +
                 b.layout.at(row / b.time, row % b.time, 0) * size_of(b.dtype);
      q.outer = q.time = q.sequences = 1;
      q.shift = 0;
      q.labels = &label;
      q.offsets = offsets;
      alone.reset(random, real, 1);
      alone.point(q);
      expect_code(topr_log_prob(&q), TOPR_OK, "topr_log_prob");
      for (size_t a = 0; a < 4; ++a) {
        double in_batch = out.all()[a]->get(k), by_itself = alone.all()[a]->get(0);
        if (in_batch != by_itself && !(std::isnan(in_batch) && std::isnan(by_itself))) {
          fail("output %zu of row %" PRId64 ": %.17g in the batch, %.17g alone", a, row, in_batch, by_itself);
        }
      }
    }
  }
}

// Every number of 16 bits is read as what it is, and what is written is rounded once: where a row has one
// finite logit, that is its log-sum-exp, and where exp is of 0, the gradient is minus the coefficient.
void test_formats(Random &random, int) {
  constexpr int64_t vocab = 33, label = 5;
  static Array logits, gradient, d;
  static TokenOutputs out;
  for (int dtype : {TOPR_BF16, TOPR_F16}) {
    std::vector<double> coefficients;
    for (uint64_t u = 0; u < (uint64_t(1) << 32); u += dtype == TOPR_BF16 ? 17 << 16 : 7 << 13) {
      // Just below, at and above the middle between two numbers of either format.
      for (uint32_t low : {0u, 0x0FFFu, 0x1000u, 0x1001u, 0x7FFFu, 0x8000u, 0x8001u}) {
        uint32_t bits = static_cast<uint32_t>(u) | low;
        // Most of the range is 0 or infinite in fp16.
        if (dtype == TOPR_F16 && ((u >> 23 & 255) < 100 || (u >> 23 & 255) > 144) && u % 997) continue;
        float c;
        std::memcpy(&c, &bits, 4);
        if (c != 0) coefficients.push_back(c);
      }
    }
    for (bool backward : {false, true}) {
      int64_t rows = backward ? static_cast<int64_t>(coefficients.size()) : 65536;
      std::vector<int64_t> labels(static_cast<size_t>(rows), label);
      int64_t offsets[] = {0, rows};
      topr_params p = new_params();
      p.dtype = dtype;
      p.threads = 2;
      p.logit_scale = p.temperature = 1;
      p.outer = p.sequences = 1, p.time = rows, p.vocab = vocab;
      p.stride_time = backward ? 0 : vocab;
      p.gradient_stride_time = vocab;
      p.stride_vocab = p.gradient_stride_vocab = 1;
      p.labels = labels.data(), p.offsets = offsets;
      out.reset(random, TOPR_F32, rows);
      out.point(p);
      logits.reset(random, dtype, backward ? vocab : rows * vocab);
      logits.fill(backward ? 0 : -kInf);
      p.logits = logits.data();
      if (backward) {
        for (Array *a : {&out.log_prob, &out.lse, &out.lse_low}) a->fill(0);
        d.reset(random, TOPR_F32, rows);
        for (int64_t i = 0; i < rows; ++i) d.set(i, coefficients[static_cast<size_t>(i)]);
        gradient.reset(random, dtype, rows * vocab);
        p.d_log_prob = d.data(), p.gradient = gradient.data();
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          uint16_t bits = static_cast<uint16_t>(i);
          std::memcpy(static_cast<uint8_t *>(logits.data()) + 2 * (i * vocab + i % 31 * 7 % vocab), &bits, 2);
        }
      }
      for (int isa = 1; isa <= topr_isa_available(); ++isa) {
        describe("%s %s, isa %d", name_of(dtype), backward ? "written" : "read", isa);
        p.isa = isa;
        expect_code(backward ? topr_gradient(&p) : topr_log_prob(&p), TOPR_OK, "formats");
        for (int64_t i = 0; i < rows; ++i) {
          if (!backward) {
            uint16_t bits = static_cast<uint16_t>(i);
            double x = load(dtype, &bits);
            expect_close("lse", i, out.lse.get(i), x == kInf ? kNaN : x, 0, TOPR_F32);
            continue;
          }
          // Elements of the first vector, of the last whole one and of the tail.
          for (int64_t v : {int64_t(0), int64_t(31), int64_t(32)}) {
            expect_close("gradient", i, gradient.get(i * vocab + v), rounded(dtype, -coefficients[static_cast<size_t>(i)]), 0, dtype);
          }
        }
        g_cases += rows;
      }
    }
  }
}

// Rows that are not to be read are pages that cannot be.
void test_unread_rows(Random &random, int) {
  size_t page = Guarded::page();
  constexpr int64_t rows = 9;
  uint8_t *map = static_cast<uint8_t *>(
      mmap(nullptr, rows * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (static_cast<void *>(map) == MAP_FAILED) fail("no memory for the test");
  for (int dtype : {TOPR_F32, TOPR_BF16, TOPR_F16, TOPR_F64}) {
    for (int shift : {0, 1}) {
      describe("%s, rows of a page each, shift %d", name_of(dtype), shift);
      int real = real_of(dtype);
      topr_params p = new_params();
      p.dtype = dtype;
      p.shift = shift;
      p.logit_scale = p.temperature = 1;
      p.outer = 1, p.time = rows, p.vocab = static_cast<int64_t>(page) / size_of(dtype);
      p.stride_outer = p.stride_time = p.gradient_stride_time = p.gradient_stride_outer = p.vocab;
      p.stride_vocab = p.gradient_stride_vocab = 1;
      int64_t labels[rows] = {3, -100, 5, 1, -100, 7, 2, 9, 4}, offsets[] = {0, 3, 3, 7, 9};
      p.logits = map;
      p.labels = labels, p.offsets = offsets, p.sequences = 4;
      static TokenOutputs out;
      static Array d, gradient;
      out.reset(random, real, rows);
      out.point(p);
      d.reset(random, real, rows);
      d.fill(1);
      d.set(2, 0);
      d.set(5, 0);
      p.d_log_prob = d.data();
      for (bool backward : {false, true}) {
        mprotect(map, rows * page, PROT_READ | PROT_WRITE);
        std::memset(map, 0, rows * page);
        for (int64_t row = 0; row < rows; ++row) {
          int64_t t = row + shift;
          bool first = shift && (t == 0 || t == 3 || t == 7);
          bool read = t < rows && labels[t] != -100 && !first && !(backward && d.get(t) == 0);
          if (!read) mprotect(map + row * static_cast<int64_t>(page), page, PROT_NONE);
        }
        gradient.reset(random, dtype, rows * p.vocab);
        p.gradient = gradient.data();
        for (int isa = 1; isa <= topr_isa_available(); ++isa) {
          p.isa = isa;
          expect_code(backward ? topr_gradient(&p) : topr_log_prob(&p), TOPR_OK, "with unreadable rows");
        }
      }
    }
  }
  munmap(map, rows * page);
}

// Offsets that do not say where the rows begin: whatever the code, nothing before the first row is read.
void test_unsound_offsets(Random &random, int) {
  constexpr int64_t outer = 2, time = 3, n = outer * time, vocab = 40;
  const int64_t late[] = {1, n}, none[] = {0}, across[] = {0, n}, zeros[] = {0, 0, 0};
  const struct {
    const int64_t *offsets;
    int64_t sequences;
  } cases[] = {{late, 1}, {none, 0}, {across, 1}, {zeros, 2}};
  static Guarded logits;
  static TokenOutputs out;
  static Array d, gradient;
  int64_t labels[n] = {1, 2, 3, 4, 5, 6};
  for (const auto &c : cases) {
    for (int dtype : {TOPR_F32, TOPR_BF16, TOPR_F16, TOPR_F64}) {
      describe("%s, %d sequences from %d on", name_of(dtype), int(c.sequences), int(c.offsets[0]));
      logits.reset(n * vocab * size_of(dtype), kStart, 0, 0);
      out.reset(random, real_of(dtype), n);
      d.reset(random, real_of(dtype), n);
      d.fill(1);
      gradient.reset(random, dtype, n * vocab);
      topr_params p = new_params();
      p.dtype = dtype;
      p.shift = 1;
      p.logit_scale = p.temperature = 1;
      p.outer = outer, p.time = time, p.vocab = vocab;
      p.stride_outer = p.gradient_stride_outer = time * vocab;
      p.stride_time = p.gradient_stride_time = vocab;
      p.stride_vocab = p.gradient_stride_vocab = 1;
      p.logits = logits.data(), p.gradient = gradient.data(), p.d_log_prob = d.data();
      p.labels = labels, p.offsets = c.offsets, p.sequences = c.sequences;
      out.point(p);
      if (topr_log_prob(&p) == TOPR_OK) {
        // No row of the same sequence predicts the first label of a row of the batch.
        for (int64_t o = 0; o < outer; ++o) {
          if (out.log_prob.get(o * time) != 0) fail("log_prob[%d] = %g", int(o * time), out.log_prob.get(o * time));
        }
      }
      topr_gradient(&p);
      for (Array *a : out.all()) a->check("an output");
      gradient.check("gradient");
      ++g_cases;
    }
  }
}

// A gradient larger than any cache: the same bits as its rows have one by one.
void test_large_gradient(Random &random, int) {
  constexpr int64_t vocab = 4112, live = 97;
  for (int dtype : {TOPR_F32, TOPR_BF16}) {
    int real = real_of(dtype);
    int64_t bytes = vocab * size_of(dtype), rows = (int64_t(64) << 20) / bytes / 32 * 32 + 32;
    describe("%s [1, %d, %d]", name_of(dtype), int(rows), int(vocab));
    static Array logits, d, small;
    static Guarded large;
    static TokenOutputs forward;
    static Integers labels;
    logits.reset(random, dtype, vocab);
    for (int64_t v = 0; v < vocab; ++v) logits.set(v, 2 * random.normal());
    labels.reset(random, rows);
    d.reset(random, real, rows);
    forward.reset(random, real, rows);
    for (int64_t i = 0; i < rows; ++i) labels[i] = i % 2 ? vocab - 1 : random.below(vocab);
    for (int64_t i = 0; i < rows; ++i) d.set(i, i % live ? 0 : random.normal());
    // One row of logits for all: its stride is 0.
    topr_params p = new_params();
    p.dtype = dtype;
    p.logit_scale = p.temperature = 1;
    p.outer = p.sequences = 1, p.time = rows, p.vocab = vocab;
    p.stride_vocab = p.gradient_stride_vocab = 1;
    p.gradient_stride_time = vocab;
    int64_t offsets[] = {0, rows};
    p.logits = logits.data();
    p.labels = labels.data(), p.offsets = offsets;
    forward.point(p);
    p.threads = 3;
    expect_code(topr_log_prob(&p), TOPR_OK, "topr_log_prob");
    p.d_log_prob = d.data();
    const std::vector<uint8_t> zeros(static_cast<size_t>(bytes), 0);
    for (int isa = 1; isa <= topr_isa_available(); ++isa) {
      large.reset(rows * bytes, kEnd, 0, 0xFF);
      p.isa = isa;
      p.gradient = large.data();
      expect_code(topr_gradient(&p), TOPR_OK, "topr_gradient");
      large.check("gradient");
      for (int64_t i = 0; i < rows; ++i) {
        const void *expected = zeros.data();
        if (i % live == 0) {
          topr_params q = p;
          int64_t one[] = {0, 1};
          small.reset(random, dtype, vocab);
          q.time = 1, q.offsets = one, q.gradient = small.data(), q.labels = &labels[i];
          const auto at = [&](const Array &a) { return static_cast<uint8_t *>(a.data()) + i * size_of(real); };
          q.d_log_prob = at(d), q.log_prob = at(forward.log_prob), q.lse = at(forward.lse), q.lse_low = at(forward.lse_low);
          expect_code(topr_gradient(&q), TOPR_OK, "topr_gradient");
          expected = small.data();
        }
        if (std::memcmp(large.data() + i * bytes, expected, static_cast<size_t>(bytes)) != 0) {
          fail("row %" PRId64 " of the large gradient differs from the row alone", i);
        }
        ++g_cases;
      }
    }
  }
}

// ---------------------------------------------------------------------------- sequences

struct SequenceOutputs {
  Array loss, denominator, token_log_ratio, log_ratio, weight, objective, d_log_prob;
  Integers length;
  void reset(Random &random, int real, int64_t positions, int64_t sequences) {
    loss.reset(random, real, 1);
    denominator.reset(random, real, 1);
    token_log_ratio.reset(random, real, positions);
    d_log_prob.reset(random, real, positions);
    for (Array *a : {&log_ratio, &weight, &objective}) a->reset(random, real, sequences);
    length.reset(random, sequences);
  }
  std::vector<Array *> all() {
    return {&loss, &denominator, &token_log_ratio, &log_ratio, &weight, &objective, &d_log_prob};
  }
  void point(topr_params &p) const {
    p.loss = loss.data(), p.denominator = denominator.data(), p.token_log_ratio = token_log_ratio.data();
    p.log_ratio = log_ratio.data(), p.weight = weight.data(), p.objective = objective.data();
    p.d_log_prob = d_log_prob.data(), p.length = length.data();
  }
};

struct Taper {
  double value, weight;
  Wide value_error;
};

// rho(x, a, b) and its clipped ratio from log x; each step rounds as the format does.
Taper taper(int real, double log_ratio, double log_min, double log_max) {
  log_min = rounded(real, log_min);
  log_max = rounded(real, log_max);
  double c = log_ratio < log_min ? log_min : log_ratio;
  c = c > log_max ? log_max : c;
  double weight = rounded(real, std::exp(Wide(c)));
  double excess = log_ratio == c ? 0 : rounded(real, Wide(log_ratio) - c);
  if (weight == 0) return {0, 0, 0};
  return {rounded(real, Wide(weight) * (1 + Wide(excess))), weight,
          16 * unit(real) * Wide(weight) * (1 + std::fabs(Wide(excess)))};
}

struct SequenceCase {
  Batch b;
  Array log_prob, behavior, reward, normalizer;
  bool per_sequence = false, normalized = false;
  int ratio = 0, reduction = 0, real = 0;
  double limits[4] = {0, 0, 0, 0};
};

void check_sequences(const SequenceCase &s, const SequenceOutputs &out) {
  const Batch &b = s.b;
  int real = s.real;
  Wide u = unit(real), step = tiny(real), sum = 0, sum_error = 0;
  int64_t sequences = b.offsets.n - 1, counted = 0, tokens = 0;
  for (int64_t k = 0; k < sequences; ++k) {
    int64_t length = 0;
    double log_ratio = 0;
    std::vector<double> difference;
    for (int64_t i = b.offsets[k]; i < b.offsets[k + 1]; ++i) {
      bool scored = b.scored[static_cast<size_t>(i)];
      length += scored;
      double d = !scored ? 0 : s.per_sequence ? s.log_prob.get(i) : s.log_prob.get(i) - s.behavior.get(i);
      log_ratio += d;
      difference.push_back(rounded(real, d));
      expect_close("token_log_ratio", i, out.token_log_ratio.get(i), s.per_sequence ? kNaN : difference.back(), 0, real);
    }
    if (s.per_sequence) log_ratio = length ? log_ratio - s.behavior.get(k) : 0;
    counted += length > 0;
    tokens += length;
    if (out.length[k] != length) fail("length[%" PRId64 "] = %" PRId64 ", expected %" PRId64, k, out.length[k], length);
    // In the order of the tokens and in fp64: the bits are determined.
    expect_close("log_ratio", k, out.log_ratio.get(k), rounded(real, log_ratio), 0, real);

    double reward = s.reward.get(k);
    double low = s.limits[reward < 0 ? 2 : 0], high = s.limits[reward < 0 ? 3 : 1];
    double n = static_cast<double>(std::max<int64_t>(length, 1));
    Wide objective = 0, objective_error = 0, weight = 0;
    std::vector<double> token_weight;
    if (s.ratio == TOPR_TOKEN) {
      for (size_t i = 0; i < difference.size(); ++i) {
        bool scored = b.scored[static_cast<size_t>(b.offsets[k]) + i];
        Taper t = taper(real, difference[i], low, high);
        token_weight.push_back(scored ? t.weight : 0);
        if (!scored) continue;
        objective += t.value;
        if (std::isfinite(t.value_error)) objective_error += t.value_error + step;
        weight += t.weight;
      }
      weight /= n;
    } else {
      double scale = s.ratio == TOPR_GEOMETRIC ? n : 1;
      Taper t = taper(real, rounded(real, log_ratio / scale), low, high);
      objective = Wide(t.value) * scale;
      objective_error = std::isfinite(t.value_error) ? scale * (t.value_error + step) : 0;
      weight = t.weight;
      token_weight.assign(difference.size(), t.weight);
    }
    if (std::isnan(reward)) weight = kNaN;
    if (length == 0) objective = weight = 0;
    objective_error += 2 * u * (std::isfinite(objective) ? std::fabs(objective) : 0) + step;
    double objective_real = rounded(real, objective);
    if (std::isinf(objective_real)) objective = objective_real;
    expect_close("weight", k, out.weight.get(k), weight, 16 * u * std::fabs(weight) + 2 * step, real);
    expect_close("objective", k, out.objective.get(k), objective, objective_error, real);

    double share = s.reduction == TOPR_SEQUENCE_MEAN ? rounded(real, -Wide(reward) / n) : -reward;
    // The reward of 0 cancels an infinite objective or weight, and never a NaN.
    bool silent = length == 0 || (reward == 0 && !std::isnan(objective));
    if (!silent) {
      double contribution = rounded(real, Wide(share) * objective_real);
      sum += contribution;
      if (std::isfinite(contribution)) {
        sum_error += std::fabs(Wide(share)) * objective_error + 4 * u * std::fabs(Wide(contribution)) + step;
      }
    }
    for (size_t j = 0; j < token_weight.size(); ++j) {
      int64_t i = b.offsets[k] + static_cast<int64_t>(j);
      bool quiet = !b.scored[static_cast<size_t>(i)] || (reward == 0 && !std::isnan(token_weight[j]));
      Wide d = quiet ? 0 : Wide(share) * token_weight[j];
      if (std::isinf(rounded(real, d))) d = rounded(real, d);
      expect_close("d_log_prob", i, out.d_log_prob.get(i), d,
                   16 * u * std::fabs(d) + (2 + 2 * std::fabs(Wide(share))) * step, real);
    }
    g_cases += 5;
  }
  double denominator = s.reduction == TOPR_SEQUENCE_MEAN ? static_cast<double>(counted) : static_cast<double>(tokens);
  denominator = s.reduction == TOPR_SUM ? 1 : std::max(denominator, 1.0);
  if (s.normalized) denominator = s.normalizer.get(0);
  expect_close("denominator", 0, out.denominator.get(0), denominator, 0, real);
  Wide loss = counted ? sum / denominator : 0;
  if (std::isinf(rounded(real, loss))) loss = rounded(real, loss);
  Wide error = counted && denominator != 0 ? std::fabs(sum_error / denominator) + 4 * u * std::fabs(loss) + step : 0;
  expect_close("loss", 0, out.loss.get(0), loss, error, real);
}

void sequences_case(Random &random, int ratio, int reduction) {
  static SequenceCase s;
  static SequenceOutputs out;
  Batch &b = s.b;
  b.dtype = random.chance(0.4) ? TOPR_F64 : static_cast<int>(random.below(3));
  s.real = real_of(b.dtype);
  b.vocab = 7;
  b.shift = random.chance(0.5);
  b.packed = random.chance(0.6);
  b.outer = b.packed ? 1 : random.below(5);
  constexpr int64_t times[] = {0, 1, 2, 5, 9, 40, 150};
  b.time = random.pick(times);
  random_sequences(random, b, false);
  int64_t n = b.positions(), sequences = b.offsets.n - 1;
  s.ratio = ratio;
  s.reduction = reduction;
  s.per_sequence = ratio != TOPR_TOKEN && random.chance(0.4);
  s.normalized = reduction != TOPR_SUM && random.chance(0.3);
  int behavior_dtype = random.chance(0.5) ? TOPR_F32 : TOPR_F64;
  constexpr double limits[][4] = {{0, 0, -kInf, 0},           {-kInf, 0, -kInf, 0}, {-kInf, kInf, -kInf, kInf},
                                  {0, 0, 0, 0},               {0, 0, -kInf, -kInf}, {-0.6931471805599453, 1.0986, -2, 0.1},
                                  {-150, 0, -800, -0.3}};
  std::copy_n(limits[random.below(7)], 4, s.limits);

  s.log_prob.reset(random, s.real, n);
  s.behavior.reset(random, behavior_dtype, s.per_sequence ? sequences : n);
  s.reward.reset(random, s.real, sequences);
  s.normalizer.reset(random, s.real, 1);
  constexpr double normalizers[] = {1, 3, 17.5, 1e6, 0, kNaN};
  s.normalizer.set(0, random.pick(normalizers));
  s.log_prob.fill(kNaN);
  s.behavior.fill(kNaN);
  constexpr double widths[] = {0.01, 0.3, 3, 60};
  double width = random.pick(widths);
  constexpr double odd[] = {kNaN, -kInf, -1e4, 0, kInf, -100};
  for (int64_t k = 0; k < sequences; ++k) {
    constexpr double rewards[] = {1, -1, 0, -0.0, 0.3, -2.5, kNaN, 1e-30};
    s.reward.set(k, rewards[random.chance(0.9) ? random.below(6) : random.below(8)]);
    double total = 0;
    bool plain = random.chance(0.7), counted = false;
    for (int64_t i = b.offsets[k]; i < b.offsets[k + 1]; ++i) {
      if (!b.scored[static_cast<size_t>(i)]) continue;
      counted = true;
      double x = -3 * random.uniform(), mu = x - width * random.normal();
      if (!plain && random.chance(0.1)) x = random.pick(odd);
      if (!plain && random.chance(0.05)) mu = random.pick(odd);
      s.log_prob.set(i, x);
      if (!s.per_sequence) s.behavior.set(i, mu);
      total += mu;
    }
    if (s.per_sequence && counted) s.behavior.set(k, total);
  }
  describe("%s [%" PRId64 ", %" PRId64 "] %s%s, %" PRId64 " sequences, ratio %d reduction %d behavior %s%s%s, "
           "log limits %g %g %g %g",
           name_of(b.dtype), b.outer, b.time, b.packed ? "packed" : "padded", b.shift ? " shifted" : "", sequences,
           ratio, reduction, name_of(behavior_dtype), s.per_sequence ? " per sequence" : "",
           s.normalized ? " normalized" : "", s.limits[0], s.limits[1], s.limits[2], s.limits[3]);

  topr_params p = new_params();
  p.dtype = b.dtype;
  p.shift = b.shift;
  p.ratio = ratio, p.reduction = reduction;
  p.behavior_dtype = behavior_dtype, p.behavior_per_sequence = s.per_sequence;
  p.outer = b.outer, p.time = b.time;
  p.labels = b.labels.data(), p.offsets = b.offsets.data(), p.sequences = sequences;
  p.log_prob = s.log_prob.data();
  p.behavior_log_prob = s.behavior.data(), p.reward = s.reward.data();
  p.normalizer = s.normalized ? s.normalizer.data() : nullptr;
  p.log_pos_min = s.limits[0], p.log_pos_max = s.limits[1], p.log_neg_min = s.limits[2], p.log_neg_max = s.limits[3];
  out.reset(random, s.real, n, sequences);
  out.point(p);
  run_everywhere("topr_sequences", topr_sequences, p, out.all(), &out.length, [&] { check_sequences(s, out); });
}

void test_sequences(Random &random, int iterations) {
  for (int i = 0; i < 1 + iterations / 4; ++i) {
    for (int ratio : {TOPR_SEQUENCE, TOPR_GEOMETRIC, TOPR_TOKEN}) {
      for (int reduction : {TOPR_SEQUENCE_MEAN, TOPR_TOKEN_MEAN, TOPR_SUM}) sequences_case(random, ratio, reduction);
    }
  }
}

// ---------------------------------------------------------------------------- tiles

struct TileOutputs {
  TokenOutputs rows;
  Array factor, total;
  void reset(Random &random, int real, int64_t n) {
    rows.reset(random, real, n);
    factor.reset(random, real, n);
    total.reset(random, real, n);
  }
  void point(topr_params &p) const {
    rows.point(p);
    p.factor = factor.data(), p.total = total.data();
  }
};

struct Tile {
  int real = 0;
  int64_t rows = 0, vocab = 0, stride = 0;
  Transforms transforms;
  bool entropy = false, gradient = false;
  Array z;
  Integers labels;
  std::vector<RowReference> reference;
};

void check_rows(const Tile &tile, const TileOutputs &out) {
  int real = tile.real;
  Wide u = unit(real), step = tiny(real);
  const Transforms &tr = tile.transforms;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const RowReference &r = tile.reference[static_cast<size_t>(i)];
    bool ignored = tile.labels[i] == TOPR_IGNORE_INDEX;
    int64_t label = std::clamp<int64_t>(tile.labels[i], 0, tile.vocab - 1);
    if (!ignored) expect_close("log_prob", i, out.rows.log_prob.get(i), r.log_prob, r.log_prob_error, real);
    check_log_sum(r, i, out.rows.lse.get(i), out.rows.lse_low.get(i), real);
    expect_close("row_entropy", i, out.rows.entropy.get(i), tile.entropy ? r.entropy : kNaN, r.entropy_error, real);
    Wide factor = -tr.logit_scale / (tr.temperature * r.total);
    expect_close("factor", i, out.factor.get(i), factor, std::fabs(factor) * (r.log_sum_error + 8 * u), real);
    // Without grad the logits stay as they are.
    if (!tile.gradient) {
      if (out.total.get(i) != 0) fail("total[%" PRId64 "] = %g without grad, expected 0", i, out.total.get(i));
      continue;
    }
    // The factor poisons such a row whatever its elements are.
    if (std::isnan(r.total)) continue;
    Wide sum = 0, sum_error = 0, magnitude = 0;
    for (int64_t v = 0; v < tile.vocab; ++v) {
      Wide z = r.z[static_cast<size_t>(v)], distance = z - r.top;
      Wide expected = r.e[static_cast<size_t>(v)], error = 0;
      if (v == label) {
        expected = Wide(rounded(real, r.total)) * std::expm1(r.log_prob);
        error = 16 * u * r.total * std::fabs(std::expm1(r.log_prob));
        if (std::isfinite(r.log_prob)) error += r.total * exp_error(r.log_prob, r.log_prob_error);
        error += std::fabs(expected) * (r.log_sum_error + transform_error(r.top, tr, real));
      } else if (std::isfinite(z)) {
        error = 8 * u * expected + 4 * step;
        error += exp_error(distance, 2 * u * std::fabs(distance) + transform_error(z, tr, real) +
                                         transform_error(r.top, tr, real));
      }
      if (tr.softcap != 0) {
        Wide part = z * tr.temperature / tr.softcap, slope = 1 - part * part;
        error += std::fabs(expected) * (16 * u + 2 * std::fabs(slope) * u);
        expected *= slope;
      }
      double got = tile.z.get(i * tile.stride + v);
      // The entry of a label that is none to score means nothing.
      if (ignored && v == label) {
        expected = got;
        error = 0;
      }
      char what[64];
      std::snprintf(what, sizeof what, "E of row %" PRId64 " at ", i);
      expect_close(what, v, got, expected, error + spacing(real, expected), real);
      sum += expected;
      magnitude += std::fabs(expected);
      sum_error += error;
    }
    expect_close("total", i, out.total.get(i), tr.softcap != 0 ? sum : 0, 32 * u * magnitude + sum_error + 4 * step, real);
    g_cases += tile.vocab + 6;
  }
}

void check_between_rows(const Tile &tile, const std::vector<uint8_t> &before) {
  std::vector<uint8_t> after = tile.z.bytes();
  int64_t bytes = size_of(tile.real);
  for (int64_t i = 0; i < tile.rows; ++i) {
    int64_t at = i * tile.stride * bytes;
    std::memcpy(after.data() + at, before.data() + at, static_cast<size_t>(tile.vocab * bytes));
  }
  if (after != before) fail("topr_rows wrote between the rows");
}

topr_params params_of(const Tile &tile) {
  topr_params p = new_params();
  p.dtype = tile.real;
  p.outer = 1, p.time = tile.rows, p.vocab = tile.vocab;
  p.stride_outer = p.gradient_stride_outer = tile.rows * tile.stride;
  p.stride_time = p.gradient_stride_time = tile.stride;
  p.stride_vocab = p.gradient_stride_vocab = 1;
  p.logits = p.gradient = tile.z.data();
  return p;
}

void rows_case(Random &random, int real, int64_t vocab, int64_t most_rows) {
  static Tile tile;
  static TileOutputs out;
  constexpr int64_t heights[] = {0, 1, 2, 3, 5, 8, 13};
  constexpr int64_t pads[] = {0, 0, 1, 16, 33};
  tile.real = real;
  tile.vocab = vocab;
  tile.rows = std::min(random.pick(heights), most_rows);
  tile.stride = vocab + random.pick(pads);
  tile.transforms = random_transforms(random);
  constexpr double scales[] = {1, 1, 0.25, 2};
  tile.transforms.logit_scale = random.pick(scales);
  tile.entropy = random.chance(0.5);
  tile.gradient = random.chance(0.7);
  tile.labels.reset(random, tile.rows);
  tile.z.reset(random, real, tile.rows ? (tile.rows - 1) * tile.stride + vocab : 0);
  tile.z.fill(kNaN);
  tile.reference.clear();
  std::vector<double> x(static_cast<size_t>(vocab));
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t labels[] = {random.below(vocab), random.below(vocab), random.below(vocab), vocab - 1,
                              random.chance(0.5) ? TOPR_IGNORE_INDEX : random.chance(0.5) ? vocab : -1};
    tile.labels[i] = random.pick(labels);
    fill_row(random, real, x);
    for (int64_t v = 0; v < vocab; ++v) tile.z.set(i * tile.stride + v, x[static_cast<size_t>(v)]);
    tile.reference.push_back(reference_row(x, tile.labels[i], tile.transforms, real));
  }
  topr_params p = params_of(tile);
  p.entropy = tile.entropy, p.grad = tile.gradient;
  p.logit_scale = tile.transforms.logit_scale;
  p.softcap = tile.transforms.softcap;
  p.temperature = tile.transforms.temperature;
  p.labels = tile.labels.data();
  out.reset(random, real, tile.rows);
  out.point(p);
  describe("tile %s [%" PRId64 ", %" PRId64 "] stride %" PRId64 " scale %g softcap %g temperature %g%s%s", name_of(real),
           tile.rows, vocab, tile.stride, p.logit_scale, p.softcap, p.temperature, tile.entropy ? " entropy" : "",
           tile.gradient ? " grad" : "");
  std::vector<uint8_t> before = tile.z.bytes();
  std::vector<Array *> outputs = out.rows.all();
  outputs.insert(outputs.end(), {&out.factor, &out.total, &tile.z});
  run_everywhere("topr_rows", topr_rows, p, outputs, nullptr, [&] {
    check_rows(tile, out);
    check_between_rows(tile, before);
    if (!tile.gradient && tile.z.bytes() != before) fail("topr_rows wrote to the logits without grad");
  });
  // log mu is scored without grad: it must have the bits of log pi before the first update.
  for (int isa = 1; isa <= topr_isa_available(); ++isa) {
    std::vector<std::vector<uint8_t>> bits[2];
    for (int grad : {0, 1}) {
      tile.z.restore(before);
      p.isa = isa;
      p.grad = grad;
      expect_code(topr_rows(&p), TOPR_OK, "topr_rows");
      for (Array *a : {&out.rows.log_prob, &out.rows.lse, &out.rows.lse_low, &out.rows.entropy, &out.factor}) {
        bits[grad].push_back(a->bytes());
      }
    }
    if (bits[0] != bits[1]) fail("topr_rows: other bits without grad on isa %d", isa);
  }
}

// Columns and gather read what they are given: any numbers, not only those of topr_rows.
void columns_case(Random &random, int real, int64_t vocab, int64_t most_rows) {
  static Tile tile;
  static Array factor, coefficient, groups, energy, sums, gathered, gathered_sums;
  static Integers chosen;
  constexpr int64_t heights[] = {0, 1, 2, 3, 7, 8, 9, 64, 65}, counts[] = {0, 1, 2, 3, 4, 8, 9, TOPR_MAX_GROUPS};
  tile.real = real;
  tile.vocab = vocab;
  tile.rows = std::min(random.pick(heights), most_rows);
  tile.stride = vocab + random.below(4);
  int64_t n = tile.rows, group_count = random.pick(counts);
  if (vocab > 500) group_count = std::min<int64_t>(group_count, 8);
  tile.z.reset(random, real, n ? (n - 1) * tile.stride + vocab : 0);
  tile.z.fill(kNaN);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t v = 0; v < vocab; ++v) tile.z.set(i * tile.stride + v, std::exp(-3 * random.uniform()) - 0.2);
  }
  factor.reset(random, real, n);
  coefficient.reset(random, real, n);
  groups.reset(random, real, group_count * n);
  for (int64_t i = 0; i < n; ++i) {
    factor.set(i, -random.uniform());
    coefficient.set(i, random.chance(0.2) ? 0 : random.normal());
  }
  // One group per row as the callers have it, or anything.
  bool apart = random.chance(0.5);
  groups.fill(0);
  for (int64_t i = 0; i < n && group_count; ++i) {
    if (apart) groups.set(random.below(group_count) * n + i, random.normal());
    else for (int64_t k = 0; k < group_count; ++k) groups.set(k * n + i, random.normal());
  }
  describe("tile %s [%" PRId64 ", %" PRId64 "] stride %" PRId64 ", %" PRId64 " groups", name_of(real), n, vocab,
           tile.stride, group_count);
  topr_params p = params_of(tile);
  p.factor = factor.data(), p.coefficient = coefficient.data(), p.groups = groups.data();
  p.group_count = group_count;
  energy.reset(random, real, vocab);
  sums.reset(random, real, group_count * vocab);
  p.energy = energy.data(), p.sums = sums.data();
  Wide u = unit(real);
  run_everywhere("topr_columns", topr_columns, p, {&energy, &sums}, nullptr, [&] {
    for (int64_t v = 0; v < vocab; ++v) {
      Wide sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        Wide x = Wide(coefficient.get(i)) * factor.get(i) * tile.z.get(i * tile.stride + v);
        sum += x * x;
      }
      expect_close("energy", v, energy.get(v), sum, 32 * u * sum, real);
      for (int64_t k = 0; k < group_count; ++k) {
        Wide total = 0, magnitude = 0;
        for (int64_t i = 0; i < n; ++i) {
          Wide x = Wide(groups.get(k * n + i)) * factor.get(i) * tile.z.get(i * tile.stride + v);
          total += x;
          magnitude += std::fabs(x);
        }
        expect_close("sums", k * vocab + v, sums.get(k * vocab + v), total, 32 * u * magnitude, real);
      }
    }
    g_cases += vocab * (1 + group_count);
  });

  p = params_of(tile);
  constexpr int64_t widths[] = {0, 1, 2, 15, 16, 17, 33, 200};
  chosen.reset(random, random.pick(widths));
  for (int64_t j = 0; j < chosen.n; ++j) chosen[j] = random.chance(0.1) ? vocab - 1 : random.below(vocab);
  gathered.reset(random, real, n * chosen.n);
  gathered_sums.reset(random, real, n);
  p.columns = chosen.data(), p.column_count = chosen.n;
  p.gathered = gathered.data(), p.gathered_sums = gathered_sums.data();
  run_everywhere("topr_gather", topr_gather, p, {&gathered, &gathered_sums}, nullptr, [&] {
    for (int64_t i = 0; i < n; ++i) {
      Wide sum = 0, magnitude = 0;
      for (int64_t j = 0; j < chosen.n; ++j) {
        double x = tile.z.get(i * tile.stride + chosen[j]);
        expect_close("gathered", i * chosen.n + j, gathered.get(i * chosen.n + j), x, 0, real);
        sum += x;
        magnitude += std::fabs(x);
      }
      expect_close("gathered_sums", i, gathered_sums.get(i), sum,
                   (32 * u + 0x1p-53 * static_cast<double>(chosen.n)) * magnitude, real);
    }
    g_cases += n * (chosen.n + 1);
  });
}

void test_tiles(Random &random, int iterations) {
  for (int64_t vocab : kVocabs) {
    for (int real : {TOPR_F32, TOPR_F64}) {
      rows_case(random, real, vocab, 3);
      columns_case(random, real, vocab, vocab > 500 ? 9 : 65);
    }
  }
  for (int i = 0; i < iterations; ++i) {
    int real = random.chance(0.5) ? TOPR_F32 : TOPR_F64;
    int64_t vocab = random.chance(0.6) ? random.pick(kVocabs) : 1 + random.below(300);
    rows_case(random, real, vocab, vocab > 500 ? 5 : 13);
    if (i % 2) columns_case(random, real, vocab, vocab > 500 ? 9 : 65);
  }
}

// ---------------------------------------------------------------------------- exp

void test_exp(Random &random, int) {
  std::vector<float> x;
  auto add = [&](uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    x.push_back(f);
  };
  for (uint64_t bits = 0; bits < (uint64_t(1) << 32); bits += 4099) add(static_cast<uint32_t>(bits));
  // The neighbourhoods of 0, overflow, the first subnormal result and the last one that is not 0.
  for (float centre : {0.0f, 1.0f, -1.0f, 88.72284f, -87.33655f, -103.97208f, -103.27893f, 0.34657359f, -0.34657359f}) {
    uint32_t bits;
    std::memcpy(&bits, &centre, 4);
    for (uint32_t i = 0; i < 200; ++i) add(bits + i - 100);
  }
  for (uint32_t bits : {0x7F800000u, 0xFF800000u, 0x7FC00000u, 0xFFC00000u, 0x7F800001u, 0x7F7FFFFFu, 0xFF7FFFFFu,
                        0x00000001u, 0x80000001u, 0x007FFFFFu, 0x00800000u, 0x80000000u}) add(bits);
  std::vector<Wide> expected;
  for (float f : x) expected.push_back(std::exp(Wide(f)));
  constexpr size_t longest = 8191;
  static Array in, out;
  for (int isa = 1; isa <= topr_isa_available(); ++isa) {
    size_t a = 0;
    Wide worst = 0;
    for (int block = 0; a < x.size(); ++block) {
      size_t n = std::min(x.size() - a, block < 70 ? static_cast<size_t>(block) : longest);
      in.reset(random, TOPR_F32, static_cast<int64_t>(n));
      out.reset(random, TOPR_F32, static_cast<int64_t>(n));
      if (n) std::memcpy(in.data(), x.data() + a, 4 * n);
      topr_params p = new_params();
      p.isa = isa;
      p.threads = 1 + block % 3;
      p.time = static_cast<int64_t>(n);
      p.logits = in.data();
      p.gradient = out.data();
      describe("isa %d, %zu values from %a", isa, n, static_cast<double>(x[a]));
      expect_code(topr_exp(&p), TOPR_OK, "topr_exp");
      out.check("topr_exp");
      for (size_t i = 0; i < n; ++i) {
        Wide e = expected[a + i];
        double got = out.get(static_cast<int64_t>(i));
        if (std::isnan(e) || e == 0 || std::isinf(e)) {
          if (!(std::isnan(e) ? std::isnan(got) : got == static_cast<double>(e))) {
            fail("exp(%a) = %g, expected %Lg", static_cast<double>(x[a + i]), got, e);
          }
          continue;
        }
        // Infinity stands one step above the largest number.
        Wide value = std::isinf(got) ? Wide(FLT_MAX) + spacing(TOPR_F32, FLT_MAX) : Wide(got);
        Wide capped = std::min(e, Wide(FLT_MAX) + spacing(TOPR_F32, FLT_MAX));
        Wide error = std::fabs(value - capped) / spacing(TOPR_F32, std::min(capped, Wide(FLT_MAX)));
        if (!(error <= 2) || std::signbit(got)) {
          fail("exp(%a) = %a, expected %La: %.2Lf ulp", static_cast<double>(x[a + i]), got, e, error);
        }
        worst = std::max(worst, error);
      }
      a += n;
      g_cases += static_cast<int64_t>(n);
    }
    std::printf("  isa %d: at most %.2Lf ulp over %zu values\n", isa, worst, x.size());
  }
}

// ---------------------------------------------------------------------------- errors

// A small valid call of every function, to be broken one field at a time.
struct Valid {
  static constexpr int64_t n = 4, vocab = 5, k = 2;
  double logits[n * vocab], gradient[n * vocab], tokens[12][n], more[8][n * vocab];
  int64_t labels[n] = {1, 2, 3, 4}, offsets[3] = {0, 2, 4}, length[2], columns[k] = {4, 0};

  topr_params params(bool tile) {
    std::memset(tokens, 0x11, sizeof tokens);
    std::memset(more, 0x11, sizeof more);
    std::memset(gradient, 0x11, sizeof gradient);
    std::memset(logits, 0, sizeof logits);
    std::memset(length, 0x11, sizeof length);
    topr_params p = new_params();
    p.temperature = p.logit_scale = 1;
    p.outer = 1, p.time = n, p.vocab = vocab, p.sequences = 2;
    p.stride_outer = p.gradient_stride_outer = n * vocab;
    p.stride_time = p.gradient_stride_time = vocab;
    p.stride_vocab = p.gradient_stride_vocab = 1;
    p.logits = logits;
    p.gradient = tile ? logits : gradient;
    p.labels = labels, p.offsets = offsets, p.length = length, p.columns = columns;
    p.column_count = k, p.group_count = k;
    void **outputs[] = {&p.log_prob, &p.lse, &p.lse_low, &p.row_entropy, &p.d_log_prob, &p.token_log_ratio,
                        &p.log_ratio, &p.weight, &p.objective, &p.loss, &p.denominator, &p.factor};
    for (size_t i = 0; i < 12; ++i) *outputs[i] = tokens[i];
    p.total = more[0], p.energy = more[1], p.sums = more[2], p.gathered = more[3], p.gathered_sums = more[4];
    p.behavior_log_prob = more[5], p.reward = more[6], p.coefficient = more[7], p.groups = more[7];
    p.entropy = 1;
    return p;
  }
};

void test_errors(Random &, int) {
  using Break = std::function<void(topr_params &)>;
  struct Entry {
    const char *name;
    Function function;
    bool tile;
    std::vector<std::pair<int, Break>> breaks;
  };
#define NULLED(field) {TOPR_NULL_POINTER, [](topr_params &p) { p.field = nullptr; }}
#define BROKEN(code, field, value) {code, [](topr_params &p) { p.field = value; }}
  const std::vector<std::pair<int, Break>> common = {
      BROKEN(TOPR_BAD_SIZE, size, 0),
      BROKEN(TOPR_BAD_SIZE, size, static_cast<int64_t>(sizeof(topr_params)) - 8),
      BROKEN(TOPR_BAD_SIZE, size, static_cast<int64_t>(sizeof(topr_params)) + 8),
      BROKEN(TOPR_BAD_OPTION, threads, 0),
      BROKEN(TOPR_BAD_OPTION, threads, -3),
      BROKEN(TOPR_BAD_OPTION, isa, -1),
      BROKEN(TOPR_BAD_OPTION, isa, 4),
      BROKEN(TOPR_BAD_OPTION, isa, topr_isa_available() + 1),
      BROKEN(TOPR_BAD_SHAPE, time, -1),
  };
  const std::vector<std::pair<int, Break>> dtypes = {BROKEN(TOPR_BAD_DTYPE, dtype, -1), BROKEN(TOPR_BAD_DTYPE, dtype, 4)};
  const std::vector<std::pair<int, Break>> tiles = {BROKEN(TOPR_BAD_DTYPE, dtype, TOPR_BF16),
                                                    BROKEN(TOPR_BAD_DTYPE, dtype, TOPR_F16)};
  const std::vector<std::pair<int, Break>> shape = {BROKEN(TOPR_BAD_SHAPE, vocab, 0), BROKEN(TOPR_BAD_SHAPE, vocab, -5)};
  const std::vector<std::pair<int, Break>> transforms = {
      BROKEN(TOPR_BAD_OPTION, temperature, 0),   BROKEN(TOPR_BAD_OPTION, temperature, -1),
      BROKEN(TOPR_BAD_OPTION, temperature, kNaN), BROKEN(TOPR_BAD_OPTION, temperature, kInf),
      BROKEN(TOPR_BAD_OPTION, softcap, -1),      BROKEN(TOPR_BAD_OPTION, softcap, kNaN),
      BROKEN(TOPR_BAD_OPTION, softcap, kInf),    BROKEN(TOPR_BAD_OPTION, logit_scale, kNaN),
      BROKEN(TOPR_BAD_OPTION, logit_scale, kInf),
  };
  const std::vector<std::pair<int, Break>> batch = {BROKEN(TOPR_BAD_SHAPE, outer, -1),
                                                    BROKEN(TOPR_BAD_SHAPE, sequences, -1), NULLED(labels), NULLED(offsets)};
  auto join = [](std::initializer_list<std::vector<std::pair<int, Break>>> parts) {
    std::vector<std::pair<int, Break>> all;
    for (const auto &part : parts) all.insert(all.end(), part.begin(), part.end());
    return all;
  };
  static const int64_t decreasing[] = {0, 3, 2}, beyond[] = {0, 2, 5}, outside[] = {0, 5}, negative[] = {-1, 0};
  const std::vector<std::pair<int, Break>> unsound = {BROKEN(TOPR_BAD_SHAPE, offsets, decreasing),
                                                      BROKEN(TOPR_BAD_SHAPE, offsets, beyond)};
  const std::vector<std::pair<int, Break>> chosen = {BROKEN(TOPR_BAD_SHAPE, columns, outside),
                                                     BROKEN(TOPR_BAD_SHAPE, columns, negative)};
  const std::vector<Entry> entries = {
      {"topr_log_prob", topr_log_prob, false,
       join({common, dtypes, shape, transforms, batch, unsound, {NULLED(logits), NULLED(log_prob), NULLED(lse), NULLED(lse_low), NULLED(row_entropy)}})},
      {"topr_gradient", topr_gradient, false,
       join({common, dtypes, shape, transforms, batch, unsound,
             {NULLED(logits), NULLED(log_prob), NULLED(lse), NULLED(lse_low), NULLED(d_log_prob), NULLED(gradient)}})},
      {"topr_sequences", topr_sequences, false,
       join({common, dtypes, batch, unsound,
             {BROKEN(TOPR_BAD_OPTION, ratio, -1), BROKEN(TOPR_BAD_OPTION, ratio, 3), BROKEN(TOPR_BAD_OPTION, reduction, -1),
              BROKEN(TOPR_BAD_OPTION, reduction, 3), BROKEN(TOPR_BAD_DTYPE, behavior_dtype, TOPR_BF16),
              BROKEN(TOPR_BAD_DTYPE, behavior_dtype, TOPR_F16), BROKEN(TOPR_BAD_DTYPE, behavior_dtype, 4), NULLED(log_prob),
              NULLED(behavior_log_prob), NULLED(reward), NULLED(loss), NULLED(denominator), NULLED(token_log_ratio),
              NULLED(log_ratio), NULLED(weight), NULLED(objective), NULLED(length), NULLED(d_log_prob)}})},
      {"topr_rows", topr_rows, true,
       join({common, dtypes, tiles, shape, transforms,
             {NULLED(gradient), NULLED(labels), NULLED(log_prob), NULLED(lse), NULLED(lse_low), NULLED(row_entropy), NULLED(factor),
              NULLED(total)}})},
      {"topr_columns", topr_columns, true,
       join({common, dtypes, tiles, shape,
             {BROKEN(TOPR_BAD_SHAPE, group_count, -1), BROKEN(TOPR_BAD_SHAPE, group_count, TOPR_MAX_GROUPS + 1),
              NULLED(logits), NULLED(factor), NULLED(coefficient), NULLED(groups), NULLED(energy), NULLED(sums)}})},
      {"topr_gather", topr_gather, true,
       join({common, dtypes, tiles, shape, chosen,
             {BROKEN(TOPR_BAD_SHAPE, column_count, -1), NULLED(logits), NULLED(columns), NULLED(gathered), NULLED(gathered_sums)}})},
      {"topr_exp", topr_exp, false, join({common, {NULLED(logits), NULLED(gradient)}})},
  };
#undef NULLED
#undef BROKEN
  static Valid valid;
  for (const Entry &entry : entries) {
    int index = 0;
    for (const auto &[code, spoil] : entry.breaks) {
      topr_params p = valid.params(entry.tile);
      spoil(p);
      static Valid before;
      std::memcpy(&before, &valid, sizeof valid);
      describe("%s, broken field number %d", entry.name, index++);
      expect_code(entry.function(&p), code, entry.name);
      if (std::memcmp(&before, &valid, sizeof valid) != 0) fail("%s wrote in spite of an error", entry.name);
    }
    describe("%s, all fields good", entry.name);
    topr_params p = valid.params(entry.tile);
    expect_code(entry.function(&p), TOPR_OK, entry.name);
    describe("%s, no params", entry.name);
    expect_code(entry.function(nullptr), TOPR_NULL_POINTER, entry.name);
  }
  describe("messages");
  for (int code = -3; code < 20; ++code) {
    const char *message = topr_error_message(code);
    if (!message || !*message) fail("topr_error_message(%d) is empty", code);
  }
  for (int code : {INT32_MIN, INT32_MAX}) {
    if (!topr_error_message(code)) fail("topr_error_message(%d) is null", code);
  }
  if (topr_params_size() != static_cast<int64_t>(sizeof(topr_params))) fail("topr_params_size");
  if (topr_isa_available() < TOPR_ISA_BASELINE || topr_isa_available() > TOPR_ISA_AVX512) fail("topr_isa_available");
}

// ---------------------------------------------------------------------------- concurrent callers

// Two threads of the caller, each with its own arrays: nothing may be shared behind their backs.
void test_concurrent_callers(Random &random, int) {
  constexpr int64_t n = 24, vocab = 777;
  static Array logits, gradient[2], d[2];
  static TokenOutputs out[2];
  logits.reset(random, TOPR_BF16, n * vocab);
  for (int64_t i = 0; i < n * vocab; ++i) logits.set(i, 3 * random.normal());
  int64_t labels[n], offsets[] = {0, 10, n};
  for (int64_t &y : labels) y = random.below(vocab);
  describe("bf16 [1, %d, %d], two callers", int(n), int(vocab));
  topr_params p[2];
  for (int c = 0; c < 2; ++c) {
    out[c].reset(random, TOPR_F32, n);
    gradient[c].reset(random, TOPR_BF16, n * vocab);
    d[c].reset(random, TOPR_F32, n);
    d[c].fill(0.5);
    p[c] = new_params();
    p[c].dtype = TOPR_BF16;
    p[c].threads = 2 + c;
    p[c].logit_scale = p[c].temperature = 1;
    p[c].softcap = 20;
    p[c].shift = 1;
    p[c].outer = 1, p[c].time = n, p[c].vocab = vocab, p[c].sequences = 2;
    p[c].stride_time = p[c].gradient_stride_time = vocab;
    p[c].stride_vocab = p[c].gradient_stride_vocab = 1;
    p[c].labels = labels, p[c].offsets = offsets;
    p[c].logits = logits.data(), p[c].gradient = gradient[c].data(), p[c].d_log_prob = d[c].data();
    out[c].point(p[c]);
  }
  int codes[2] = {-1, -1};
  auto work = [&](int c) {
    for (int i = 0; i < 4; ++i) codes[c] = topr_log_prob(&p[c]) | topr_gradient(&p[c]);
  };
  std::thread other(work, 1);
  work(0);
  other.join();
  for (int code : codes) expect_code(code, TOPR_OK, "concurrent callers");
  if (gradient[0].bytes() != gradient[1].bytes() || out[0].log_prob.bytes() != out[1].log_prob.bytes()) {
    fail("two callers of the same arrays differ");
  }
}

}  // namespace

int main(int argc, char **argv) {
  int iterations = argc > 1 ? std::atoi(argv[1]) : 250;
  uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 2503;
  struct sigaction action;
  std::memset(&action, 0, sizeof action);
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, &g_previous[0]);
  sigaction(SIGBUS, &action, &g_previous[1]);
  struct {
    const char *name;
    void (*run)(Random &, int);
  } const tests[] = {
      {"errors", test_errors},
      {"exp", test_exp},
      {"formats", test_formats},
      {"unread rows", test_unread_rows},
      {"unsound offsets", test_unsound_offsets},
      {"log_prob and gradient", test_log_prob_and_gradient},
      {"a row alone", test_row_alone},
      {"large gradient", test_large_gradient},
      {"sequences", test_sequences},
      {"tiles", test_tiles},
      {"concurrent callers", test_concurrent_callers},
  };
  std::printf("instruction sets 1 to %d, %s, %d fuzz iterations, seed %" PRIu64 "\n", topr_isa_available(),
              topr_parallel() ? "parallel" : "serial", iterations, seed);
  for (const auto &test : tests) {
    g_test = test.name;
    g_case[0] = 0;
    int64_t before = g_cases;
    std::printf("%s\n", test.name);
    std::fflush(stdout);
    // Each test has its own stream: one more case in another does not change it.
    Random random{(seed + 1) * 0x9E3779B97F4A7C15ull ^ static_cast<uint64_t>(test.name[0] * 131 + test.name[2])};
    test.run(random, iterations);
    std::printf("  %" PRId64 " cases\n", g_cases - before);
  }
  std::printf("all passed: %" PRId64 " cases\n", g_cases);
  return 0;
}
