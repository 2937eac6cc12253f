// CHECK(condition, "format", ...): counts, and prints the first failures of each part with the
// context in force.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <string>

namespace test {

struct Tally {
  int64_t passed = 0;
  int64_t failed = 0;
  int shown = 0;        // failures printed of the part being run
  std::string context;  // the table, dtype, op and sizes being run
};

inline Tally& tally() {
  static Tally instance;
  return instance;
}

__attribute__((format(printf, 1, 2))) inline std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

inline bool record(bool ok, const char* file, int line, const std::string& message) {
  ++(ok ? tally().passed : tally().failed);
  if (!ok && tally().shown++ < 6) {
    std::printf("FAILED %s:%d: %s\n  in %s\n", file, line, message.c_str(),
                tally().context.c_str());
    std::fflush(stdout);
  }
  return ok;
}

}  // namespace test

#define CHECK(condition, ...)                    \
  ((condition) ? ::test::record(true, "", 0, {}) \
               : ::test::record(false, __FILE__, __LINE__, ::test::text(__VA_ARGS__)))
