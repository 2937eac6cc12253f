// What kernels see of the emulator: indices, collectives, order, refused launches.
#pragma once

namespace behaviour {

int run();  // the number of failures, each printed

void check(bool ok, const char* what);
void test_ptx();

}  // namespace behaviour
