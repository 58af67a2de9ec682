#include <cuda_runtime.h>

#include "cuda/launch_api.h"
#include "cuda/ticket_pool.h"
#include "cuda/tickets.cuh"

namespace diffqkv::cuda {
namespace {

constexpr int kMostDevices = 64;
__device__ uint32_t tickets[TicketPool::kSize];  // zeros when the module is loaded, on every device

}  // namespace

cudaError_t take_tickets(int64_t count, cudaStream_t stream, uint32_t** first) {
  static TicketPool pools[kMostDevices];
  *first = nullptr;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  bool captured = false;
  if (const int error = is_capturing(stream, &captured)) return static_cast<cudaError_t>(error);
  const int64_t place = device < kMostDevices ? pools[device].take(count, captured) : -1;
  if (place < 0) return cudaSuccess;
  void* all = nullptr;
  const cudaError_t error = cudaGetSymbolAddress(&all, tickets);
  *first = static_cast<uint32_t*>(all) + place;
  return error;
}

int device_facts(int device, DeviceFacts* facts) {
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

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int is_capturing(void* stream, bool* capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  *capturing = status != cudaStreamCaptureStatusNone;
  return error;
}

}  // namespace diffqkv::cuda
