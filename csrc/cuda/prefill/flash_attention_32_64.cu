#include "cuda/prefill/launch_flash_attention.cuh"

template cudaError_t diffqkv::device::launch_flash_attention<32, 64>(const PrefillParams<float>&, cudaStream_t);
