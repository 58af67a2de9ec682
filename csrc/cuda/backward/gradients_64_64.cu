#include "cuda/backward/gradients_launch.cuh"

template cudaError_t diffqkv::device::launch_gradients<64, 64>(const BackwardCall&, cudaStream_t);
