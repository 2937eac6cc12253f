// Picks the Vec<T> of the instruction set that this object is compiled for.
#pragma once

#if defined(XLMR_ISA_AVX512)
#include "cpu/vec_avx512.h"
#elif defined(XLMR_ISA_AVX2)
#include "cpu/vec_avx2.h"
#elif defined(XLMR_ISA_NEON)
#include "cpu/vec_neon.h"
#else
#include "cpu/vec.h"
#endif
