# diffqkv_add_cpu_isa(<target> <sources>...): compiles the sources once per x86-64 level into objects of <target>.
# Each level is compiled with exactly what csrc/cpu/isa.cpp checks before it is chosen.
set(DIFFQKV_CPU_ISAS v2 v3 v4 v4_bf16)
set(DIFFQKV_ISA_FLAGS_v2 -march=x86-64-v2)
set(DIFFQKV_ISA_FLAGS_v3 -march=x86-64-v3)
set(DIFFQKV_ISA_FLAGS_v4 -march=x86-64-v4)
set(DIFFQKV_ISA_FLAGS_v4_bf16 -march=x86-64-v4 -mavx512bf16 -mavx512vnni)

function(diffqkv_add_cpu_isa target)
  foreach(isa IN LISTS DIFFQKV_CPU_ISAS)
    set(objects ${target}_cpu_${isa})
    add_library(${objects} OBJECT ${ARGN})
    target_include_directories(${objects} PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
    target_compile_definitions(${objects} PRIVATE DIFFQKV_ISA=${isa})
    # GCC 12 takes the deliberately undefined operand in its own AVX-512 header for a mistake.
    target_compile_options(${objects} PRIVATE
      -O3 ${DIFFQKV_ISA_FLAGS_${isa}} -Wno-maybe-uninitialized -Wno-uninitialized)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
  endforeach()
endfunction()
