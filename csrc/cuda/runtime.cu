#include <cuda_runtime.h>

#include "diffqkv/cuda.h"

namespace diffqkv {

int cuda_device_facts(int device, DeviceFacts* facts) {
  int major = 0, minor = 0, multiprocessors = 0, per_block = 0, per_multiprocessor = 0, registers = 0;
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } questions[] = {{&major, cudaDevAttrComputeCapabilityMajor},
                   {&minor, cudaDevAttrComputeCapabilityMinor},
                   {&multiprocessors, cudaDevAttrMultiProcessorCount},
                   {&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                   {&per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
                   {&registers, cudaDevAttrMaxRegistersPerMultiprocessor}};
  for (const auto& question : questions) {
    const cudaError_t error = cudaDeviceGetAttribute(question.value, question.attribute, device);
    if (error != cudaSuccess) return error;
  }
  *facts = {multiprocessors, 10 * major + minor, per_block, per_multiprocessor, registers, 0};
  return cudaSuccess;
}

const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int cuda_is_capturing(void* stream, bool* capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  *capturing = status != cudaStreamCaptureStatusNone;
  return error;
}

}  // namespace diffqkv
