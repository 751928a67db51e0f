#include "check.hpp"

int main() {
  for (const auto& test : gcfast::testing::tests()) {
    std::printf("%s\n", test.name);
    std::fflush(stdout);
    test.run();
  }
  std::printf("%zu tests passed\n", gcfast::testing::tests().size());
  return 0;
}
