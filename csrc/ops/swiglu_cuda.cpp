#include "ops/cuda_call.h"
#include "ops/ops.h"
#include "ops/ops_cuda.h"

namespace diffqkv {

Tensor swiglu_cuda(const Tensor& gate, const Tensor& up) {
  const SwigluForward forward = swiglu_forward(gate, up);
  const CudaCall call("swiglu", gate);
  call.check(cuda_swiglu(forward.p, call.facts(), call.stream()));
  return forward.out;
}

std::tuple<Tensor, Tensor> swiglu_backward_cuda(const Tensor& dout, const Tensor& gate, const Tensor& up) {
  const SwigluBackward backward = swiglu_backward(dout, gate, up);
  const CudaCall call("swiglu_backward", gate);
  call.check(cuda_swiglu_backward(backward.p, call.facts(), call.stream()));
  return {backward.dgate, backward.dup};
}

}  // namespace diffqkv
