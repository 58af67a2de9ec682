# Target torch_stable: torch's stable ABI headers and libtorch.so, nothing else.
#
# find_package(Torch) would rewrite the CUDA architectures, and its include folder shadows fmt and pybind11. So torch is
# only located (DIFFQKV_TORCH_ROOT, or the torch that the Python interpreter finds), and <torch>/include/torch alone is
# made visible.
if(NOT DIFFQKV_TORCH_ROOT)
  # pip hides the environment's packages from an isolated build by PYTHONPATH; torch is wanted all the same.
  execute_process(
    COMMAND "${CMAKE_COMMAND}" -E env --unset=PYTHONPATH "${Python_EXECUTABLE}" -c
            "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE DIFFQKV_TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE torch_missing)
  if(torch_missing)
    message(FATAL_ERROR "torch >= 2.11 not found by ${Python_EXECUTABLE}: install it beside diffqkv first, or set "
                        "DIFFQKV_TORCH_ROOT to a torch folder")
  endif()
endif()
set(torch_shim "${DIFFQKV_TORCH_ROOT}/include/torch/csrc/stable/c/shim.h")
if(NOT EXISTS "${torch_shim}")
  message(FATAL_ERROR "DIFFQKV_TORCH_ROOT: got ${DIFFQKV_TORCH_ROOT}, want a torch >= 2.11 with its headers")
endif()

set(torch_include "${CMAKE_BINARY_DIR}/torch_stable_include")
file(MAKE_DIRECTORY "${torch_include}")
file(CREATE_LINK "${DIFFQKV_TORCH_ROOT}/include/torch" "${torch_include}/torch" SYMBOLIC)

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${torch_include}")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
# No symbol comes from libtorch.so itself, it only leads to the others: without --no-as-needed the linker drops it.
target_link_options(torch_stable INTERFACE "LINKER:--no-as-needed")
target_link_libraries(torch_stable INTERFACE "${DIFFQKV_TORCH_ROOT}/lib/libtorch.so")
