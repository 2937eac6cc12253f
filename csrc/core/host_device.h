// Marks functions that CUDA kernels call too.
#pragma once

#if defined(__CUDACC__)
#define XLMR_HD __host__ __device__
#else
#define XLMR_HD
#endif
