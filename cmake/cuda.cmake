# The CUDA kernels as nvcc compiles them: the object library xlmr_cuda. Asked for by XLMR_EXT_CUDA.
#
# Machine code for the newest of each family of data centre and desktop GPUs, and PTX, which newer
# ones compile for themselves; -DCMAKE_CUDA_ARCHITECTURES=... overrides (86-real, 89-real...).
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100-real 120-real 80-virtual 120-virtual
      CACHE STRING "As CMake writes them: 90-real for machine code, 90-virtual for PTX")
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
if(NOT CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA")
  message(FATAL_ERROR "the CUDA compiler is ${CMAKE_CUDA_COMPILER_ID}; expected nvcc")
endif()

add_library(xlmr_cuda OBJECT ${XLMR_CUDA_SOURCES})
target_include_directories(xlmr_cuda PRIVATE csrc)
set_target_properties(xlmr_cuda PROPERTIES
    CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF CUDA_RUNTIME_LIBRARY Static)
# Sums are fused where the source says fma() and nowhere else, as on the CPU.
target_compile_options(xlmr_cuda PRIVATE
    -fmad=false -Werror=all-warnings
    "SHELL:-Xcompiler=-Wall,-Wextra,-Werror,-fstack-protector-strong,-ffp-contract=off")
