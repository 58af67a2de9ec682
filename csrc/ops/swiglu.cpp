#include "ops/arguments.h"
#include "ops/ops.h"

namespace diffqkv {
namespace {

void check_like_gate(const char* name, const Tensor& t, const Tensor& gate) {
  check_same_dtype(name, t, "gate", gate);
  check_same_device(name, t, "gate", gate);
  bool same = t.dim() == gate.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == gate.size(i);
  DIFFQKV_CHECK(same, name, ": got shape ", shape_of(t), ", want ", shape_of(gate), ", that of gate");
}

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
Tensor empty_of_shape(const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); }

}  // namespace

SwigluForward swiglu_forward(const Tensor& gate, const Tensor& up) {
  check_floating("gate", gate);
  check_like_gate("up", up, gate);
  SwigluForward call{packed(gate), packed(up), empty_of_shape(gate), {}};
  call.p.gate = call.gate.data_ptr();
  call.p.up = call.up.data_ptr();
  call.p.out = call.out.data_ptr();
  call.p.numel = gate.numel();
  call.p.dtype = dtype_of(gate);
  return call;
}

SwigluBackward swiglu_backward(const Tensor& dout, const Tensor& gate, const Tensor& up) {
  check_floating("gate", gate);
  check_like_gate("up", up, gate);
  check_like_gate("dout", dout, gate);
  SwigluBackward call{packed(dout), packed(gate), packed(up), empty_of_shape(gate), empty_of_shape(gate), {}};
  call.p.dout = call.dout.data_ptr();
  call.p.gate = call.gate.data_ptr();
  call.p.up = call.up.data_ptr();
  call.p.dgate = call.dgate.data_ptr();
  call.p.dup = call.dup.data_ptr();
  call.p.numel = gate.numel();
  call.p.dtype = dtype_of(gate);
  return call;
}

Tensor swiglu_cpu(const Tensor& gate, const Tensor& up) {
  const SwigluForward call = swiglu_forward(gate, up);
  cpu::swiglu(call.p, torch_threads(), parallel_on_torch);
  return call.out;
}

std::tuple<Tensor, Tensor> swiglu_backward_cpu(const Tensor& dout, const Tensor& gate, const Tensor& up) {
  const SwigluBackward call = swiglu_backward(dout, gate, up);
  cpu::swiglu_backward(call.p, torch_threads(), parallel_on_torch);
  return {call.dgate, call.dup};
}

}  // namespace diffqkv
