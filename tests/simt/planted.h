// Kernels with planted bugs, each beside a twin without. A case runs its kernel and says whether
// the result is right; a bug may also end the process.
#pragma once

#include <vector>

namespace planted {

// What becomes of a bug in the four schedules, in their order: 's' the process is stopped with
// `message`, 'w' the result is wrong, '-' nothing shows.
using Outcome = const char*;

struct Case {
  const char* name;
  bool (*run)(bool bug);
  const char* message;
  Outcome plain, sanitized, race;
};

std::vector<Case> cases();
std::vector<Case> ptx_cases();  // of the functions of simt/ptx.h

}  // namespace planted
