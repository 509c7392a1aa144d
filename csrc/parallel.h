// A fixed partition over threads: block b belongs to thread b % threads. OpenMP, so that a process that
// has torch in it shares torch's pool; std::thread for ThreadSanitizer, which does not know libgomp;
// serial where there is neither. A block is computed by one thread in one order, so no result depends on
// their number.
#ifndef TOPR_PARALLEL_H
#define TOPR_PARALLEL_H

#include <stdint.h>

#if defined(TOPR_STD_THREADS)
#include <thread>
#include <vector>
#endif

namespace {  // every instruction set has its own copy: none may be linked in place of another

template <class Body>
void parallel(int threads, int64_t blocks, const Body &body) {
  // Never a smaller team: OpenMP would rebuild its pool, and again for the next caller that wants it whole.
  if (threads <= 1 || blocks <= 1) {
    for (int64_t b = 0; b < blocks; ++b) body(b);
    return;
  }
#if defined(TOPR_STD_THREADS)
  std::vector<std::thread> pool;
  for (int k = 0; k < threads; ++k) {
    pool.emplace_back([=, &body] {
      for (int64_t b = k; b < blocks; b += threads) body(b);
    });
  }
  for (std::thread &t : pool) t.join();
#elif defined(_OPENMP)
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int64_t b = 0; b < blocks; ++b) body(b);
#else
  for (int64_t b = 0; b < blocks; ++b) body(b);
#endif
}

}  // namespace

#endif
