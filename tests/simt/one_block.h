// Runs a planted kernel as one block and looks at its result.
#pragma once

#include <vector>

#include "simt/simt.h"

namespace planted {

using Kernel = void (*)(float*, bool);

// One block of `threads`, with shared memory for one number each; out[i] must be want(i).
template <Kernel kernel, unsigned threads, class Want>
bool one_block(const char* name, bool bug, unsigned count, Want want) {
  std::vector<float> out(2 * threads, -1.0f);
  float* data = out.data();
  simt::launch(name, 1, threads, threads * sizeof(float), [=] { kernel(data, bug); });
  for (unsigned i = 0; i < count; ++i) {
    if (out[i] != float(want(i))) return false;
  }
  return true;
}

// A Case's `run`: the kernel named `kernel`, its block of `threads`, and what the first `count` of
// them should find.
#define ONE_BLOCK(kernel, threads, count, want)                             \
  [](bool bug) {                                                            \
    return one_block<kernel, threads>(#kernel, bug, count, [](unsigned i) { \
      static_cast<void>(i);                                                 \
      return want;                                                          \
    });                                                                     \
  }

}  // namespace planted
