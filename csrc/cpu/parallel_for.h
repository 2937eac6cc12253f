// core/parallel.h for lambdas.
#pragma once

#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/isa.h"
#include "types.h"

namespace xlmr::XLMR_ISA {
namespace {

// fn(task, thread) for every task in [0, tasks).
template <class F>
XLMR_INLINE void parallel_for(const ExecContext& ctx, int64_t tasks, const F& fn) {
  parallel_tasks(
      ctx.num_threads, tasks,
      [](void* arg, int64_t task, int32_t thread) { (*static_cast<const F*>(arg))(task, thread); },
      const_cast<F*>(&fn));
}

// fn(begin, end) over [0, n) in pieces of `grain`.
template <class F>
XLMR_INLINE void parallel_ranges(const ExecContext& ctx, int64_t n, int64_t grain, const F& fn) {
  parallel_for(ctx, ceil_div(n, grain), [&](int64_t task, int32_t) {
    const int64_t begin = task * grain;
    fn(begin, min_of(n, begin + grain));
  });
}

}  // namespace
}  // namespace xlmr::XLMR_ISA
