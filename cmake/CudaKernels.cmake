# The CUDA kernels, if they are wanted and can be compiled: target diffqkv_cuda (static library, torch-free) and
# DIFFQKV_HAVE_CUDA. Decided by the compiler at hand, never by a GPU: build machines have none.
include_guard(GLOBAL)

set(DIFFQKV_CUDA AUTO CACHE STRING "Compile the CUDA kernels: AUTO (if there is a CUDA compiler), ON, OFF")
set_property(CACHE DIFFQKV_CUDA PROPERTY STRINGS AUTO ON OFF)
set(DIFFQKV_HAVE_CUDA OFF)

string(TOUPPER "${DIFFQKV_CUDA}" _diffqkv_cuda)
if(NOT _diffqkv_cuda MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "DIFFQKV_CUDA: got ${DIFFQKV_CUDA}, want AUTO, ON or OFF")
endif()
if(_diffqkv_cuda STREQUAL "OFF")
  message(STATUS "CUDA kernels: off (DIFFQKV_CUDA=OFF)")
  return()
endif()

# check_language looks at CMAKE_CUDA_COMPILER, the environment's CUDACXX and PATH; the toolkit's usual folders as well.
include(CheckLanguage)
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_package(CUDAToolkit QUIET)
  if(CUDAToolkit_NVCC_EXECUTABLE)
    set(ENV{CUDACXX} "${CUDAToolkit_NVCC_EXECUTABLE}")
  endif()
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(_diffqkv_cuda STREQUAL "ON")
    message(FATAL_ERROR "DIFFQKV_CUDA: got ON without a CUDA compiler, want nvcc on PATH or CUDACXX=<path of nvcc>")
  endif()
  message(STATUS "CUDA kernels: off, no CUDA compiler found (set CUDACXX to name one)")
  return()
endif()

# Machine code for Ampere and Hopper (with wgmma and TMA), PTX for what comes later.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 80-virtual)
endif()
if(NOT DEFINED CMAKE_CUDA_RUNTIME_LIBRARY)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # the library must load beside any CUDA version of torch, or none
endif()
if(CCACHE AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER "${CCACHE}")
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  set(_diffqkv_old "got nvcc ${CMAKE_CUDA_COMPILER_VERSION}, want 12.0 or later for C++20 and sm_90a")
  if(_diffqkv_cuda STREQUAL "ON")
    message(FATAL_ERROR "DIFFQKV_CUDA=ON: ${_diffqkv_old}")
  endif()
  message(STATUS "CUDA kernels: off, ${_diffqkv_old}")
  return()
endif()

file(GLOB_RECURSE _diffqkv_cuda_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu")

# Appends to _diffqkv_cuda_sources a file that instantiates a template of csrc/cuda/<op>/launch.cuh, so that the
# instances compile side by side.
function(_diffqkv_instance op name instance)
  set(file "${CMAKE_CURRENT_BINARY_DIR}/cuda/${op}/${name}.cu")
  configure_file("${PROJECT_SOURCE_DIR}/csrc/cuda/instance.cu.in" "${file}" @ONLY)
  list(APPEND _diffqkv_cuda_sources "${file}")
  set(_diffqkv_cuda_sources "${_diffqkv_cuda_sources}" PARENT_SCOPE)
endfunction()
# The head dimensions (d_k, d_v) that have kernels of their own: the first two numbers of each row of the table from
# which plan/cuda chooses.
set(_diffqkv_table "${PROJECT_SOURCE_DIR}/csrc/plan/cuda/flash_attention.h")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${_diffqkv_table}")
file(READ "${_diffqkv_table}" _diffqkv_text)
string(REGEX MATCH "kFlashAttentionVariants\\[\\] = {[^;]*}" _diffqkv_text "${_diffqkv_text}")
string(REGEX MATCHALL "{[0-9]+, [0-9]+" _diffqkv_rows "${_diffqkv_text}")
if(NOT _diffqkv_rows)
  message(FATAL_ERROR "${_diffqkv_table}: got no rows {d_k, d_v, ...} of kFlashAttentionVariants, want some")
endif()
foreach(_diffqkv_row IN LISTS _diffqkv_rows)
  string(SUBSTRING "${_diffqkv_row}" 1 -1 _diffqkv_dims)
  string(REPLACE ", " "_" _diffqkv_name "${_diffqkv_dims}")
  _diffqkv_instance(flash_attention "${_diffqkv_name}"
    "cudaError_t launch_flash_attention<${_diffqkv_dims}>(const FlashAttentionParams<float>&, cudaStream_t)")
  _diffqkv_instance(flash_attention_backward "${_diffqkv_name}"
    "cudaError_t launch_gradients<${_diffqkv_dims}>(const FlashAttentionBackwardCall&, cudaStream_t)")
endforeach()
foreach(_diffqkv_dtype F32 F16 BF16)
  _diffqkv_instance(selective_v_attention "${_diffqkv_dtype}"
    "cudaError_t selective_v_attention::run<${_diffqkv_dtype}>(\
const SelectiveVAttentionParams&, const CudaSelectiveVAttentionPlan&, void*, cudaStream_t)")
endforeach()

add_library(diffqkv_cuda STATIC ${_diffqkv_cuda_sources})
target_include_directories(diffqkv_cuda PUBLIC "${PROJECT_SOURCE_DIR}/csrc")
set_target_properties(diffqkv_cuda PROPERTIES
  CUDA_VISIBILITY_PRESET hidden
  CUDA_STANDARD_REQUIRED OFF)  # CMake before 3.26 does not know that nvcc has C++20; -std below asks for it
list(JOIN CMAKE_CUDA_ARCHITECTURES "," _diffqkv_archs)
# -Werror makes ptxas's warnings errors too: no kernel spills registers or indexes an array in local memory (a build
# with -G has to drop it). -lineinfo: profilers and compute-sanitizer name the source line; compressed, it costs
# little.
target_compile_options(diffqkv_cuda PRIVATE
  -std=c++20 -lineinfo -Xfatbin=-compress-all -Werror=all-warnings -Xcompiler=-Wall,-Wextra
  -Xptxas=--warn-on-spills,--warn-on-local-memory-usage)

set(DIFFQKV_HAVE_CUDA ON)
message(STATUS "CUDA kernels: nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${_diffqkv_archs}")
