#include <cuda_runtime.h>

#include "cuda/launch_api.h"
#include "cuda/ticket_pool.h"

namespace diffqkv {
namespace {

constexpr int kMostDevices = 64;
__device__ uint32_t tickets[TicketPool::kSize];  // zeros when the module is loaded, on every device

}  // namespace

int cuda_tickets(int device, int64_t count, bool captured, uint32_t** first) {
  static TicketPool pools[kMostDevices];
  *first = nullptr;
  const int64_t place = device < kMostDevices ? pools[device].take(count, captured) : -1;
  if (place < 0) return cudaSuccess;
  void* all = nullptr;
  const cudaError_t error = cudaGetSymbolAddress(&all, tickets);
  *first = static_cast<uint32_t*>(all) + place;
  return error;
}

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
