// What our kernels have in common: the instructions they need, and how they share their work
// between the threads of XLA's pool.

#pragma once

#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "xla/ffi/api/ffi.h"

// Whether this processor has the instructions that `native.py` compiles for.
extern "C" __attribute__((used)) inline int has_instructions() {
  unsigned a, b, c = 0, d;  // not every compiler's __builtin_cpu_supports knows F16C
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma");
}

// Has `work(*job, num_threads)` called on threads of the pool; what it gives back is how many of
// `num_tasks` it has done. What is left to do `work` has to ask the job: a thread that comes late
// finds nothing, and nobody waits for one that has not begun, as the pool may be busy. So the job
// outlives the call.
//
// The thread that is last goes on with the program, and no other waits. A thread outside the pool
// takes no part: there are as many in it as cores, and one more would keep one of them from its
// core, which all wait for.
template <typename Job, typename Work>
xla::ffi::Future share(xla::ffi::ThreadPool pool, const std::shared_ptr<Job>& job,
                       int64_t num_tasks, Work work) {
  static thread_local bool is_of_pool = false;
  xla::ffi::Promise promise;
  xla::ffi::Future future(promise);
  if (num_tasks == 0) {
    promise.SetAvailable();
    return future;
  }
  const int64_t num_threads = std::clamp<int64_t>(pool.num_threads(), 1, num_tasks);
  auto take_part = [=]() mutable {
    is_of_pool = true;
    const int64_t count = work(*job, num_threads);
    if (count > 0 && job->done.fetch_add(count) + count == num_tasks) promise.SetAvailable();
  };
  for (int64_t i = is_of_pool ? 1 : 0; i < num_threads; ++i) pool.Schedule(decltype(take_part)(take_part));
  if (is_of_pool) take_part();
  return future;
}
