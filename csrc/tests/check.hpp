// A test in a few lines: CHECK in functions that TEST registers, run by main.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

namespace gcfast::testing {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

[[noreturn]] inline void fail(const char* file, int line, const char* what) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what);
  std::exit(1);
}

// The message of the exception E that the call throws.
template <typename E, typename Call>
std::string message_of(const char* file, int line, const Call& call) {
  try {
    call();
  } catch (const E& error) {
    return error.what();
  }
  fail(file, line, "nothing was thrown");
}

}  // namespace gcfast::testing

#define TEST(name)                                                      \
  static void name();                                                   \
  static const gcfast::testing::Register register_##name{#name, &name}; \
  static void name()
#define CHECK(condition) \
  if (!(condition)) gcfast::testing::fail(__FILE__, __LINE__, #condition)
#define MESSAGE_OF(error, call) \
  gcfast::testing::message_of<error>(__FILE__, __LINE__, [&] { (void)(call); })
