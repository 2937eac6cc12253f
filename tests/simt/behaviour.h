// What kernels see of the emulator: indices, collectives, order, refused launches.
#pragma once

namespace behaviour {

int run();  // the number of failures, each printed

}  // namespace behaviour
