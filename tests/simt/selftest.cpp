// The emulator's test of itself: what it runs is right, and what it should catch it catches.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "behaviour.h"
#include "planted.h"
#include "simt/emulator.h"

namespace {

#if defined(SIMT_RACE)
constexpr const char* flavour = "race";
planted::Outcome wanted(const planted::Case& c) { return c.race; }
#elif defined(__SANITIZE_ADDRESS__)
constexpr const char* flavour = "sanitized";
planted::Outcome wanted(const planted::Case& c) { return c.sanitized; }
#else
constexpr const char* flavour = "plain";
planted::Outcome wanted(const planted::Case& c) { return c.plain; }
#endif

constexpr int right = 0;
constexpr int wrong = 1;

// What a child process that runs the case does, as in planted::Outcome; and what it wrote to
// stderr.
char outcome(const planted::Case& c, bool bug, simt::Schedule schedule, std::string& text) {
  std::fflush(nullptr);
  FILE* errors = std::tmpfile();
  const pid_t child = fork();
  if (errors == nullptr || child < 0) {
    std::perror("selftest");
    std::exit(2);
  }
  if (child == 0) {
    const rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    dup2(fileno(errors), STDERR_FILENO);
    simt::set_schedule(schedule);
    _exit(c.run(bug) ? right : wrong);
  }
  int status = 0;
  waitpid(child, &status, 0);
  std::rewind(errors);
  text.clear();
  char buffer[4096];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, errors)) > 0;) text.append(buffer, n);
  std::fclose(errors);
  if (WIFEXITED(status) && WEXITSTATUS(status) == right) return '-';
  if (WIFEXITED(status) && WEXITSTATUS(status) == wrong && text.empty()) return 'w';
  return 's';
}

const char* in_words(char outcome) {
  return outcome == 's' ? "stopped" : outcome == 'w' ? "wrong result" : "-";
}

int run_planted(bool verbose) {
  int failures = 0;
  std::printf("Planted bugs, flavour %s\n%-50s", flavour, "");
  for (simt::Schedule schedule : simt::schedules) std::printf(" %-13s", name_of(schedule));
  std::printf("\n");
  std::vector<planted::Case> cases = planted::cases();
  const std::vector<planted::Case> more = planted::ptx_cases();
  cases.insert(cases.end(), more.begin(), more.end());
  std::string text;
  for (const planted::Case& c : cases) {
    std::printf("%-50s", c.name);
    std::string message, complaints;
    int column = 0;
    for (simt::Schedule schedule : simt::schedules) {
      const char want = wanted(c)[column++];
      const char got = outcome(c, true, schedule, text);
      std::printf(" %-13s", in_words(got));
      const std::string where = std::string("  ") + name_of(schedule) + ": ";
      if (got != want) complaints += where + "expected " + in_words(want) + "\n";
      if (got == 's' && text.find(c.message) == std::string::npos) {
        complaints += where + "expected a message with '" + c.message + "', not\n" + text;
      }
      if (got == 's' && column == 1) message = text;
      if (outcome(c, false, schedule, text) != '-') {
        complaints += where + "the twin without the bug fails\n" + text;
      }
    }
    std::printf("\n%s%s", verbose ? message.c_str() : "", complaints.c_str());
    failures += !complaints.empty();
  }
  return failures;
}

}  // namespace

int main(int count, char** arguments) {
  const bool verbose = count > 1 && std::string(arguments[1]) == "-v";
  const int failures = run_planted(verbose) + behaviour::run();
  std::printf("%s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
