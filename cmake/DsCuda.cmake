# libds_core_cuda.so from cpp/src/cuda: static cudart, so that it depends on the driver only. Included when
# DS_BUILD_CUDA is ON or AUTO; sets DS_HAS_CUDA.
set(DS_HAS_CUDA OFF)
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(DS_BUILD_CUDA STREQUAL "AUTO")
    message(STATUS "No CUDA compiler: libds_core_cuda.so is left out")
    return()
  endif()
  message(FATAL_ERROR "DS_BUILD_CUDA=ON needs nvcc; put it on the PATH or set CUDACXX")
endif()

# Machine code for A100, H100/H200 and B200; PTX of the last for what comes after.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100)
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  # CMake 3.25 does not know how a recent nvcc is asked for C++20
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  list(APPEND CMAKE_CUDA_COMPILE_FEATURES cuda_std_20)
endif()
set(DS_HAS_CUDA ON)
