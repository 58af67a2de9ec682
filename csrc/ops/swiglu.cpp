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

Tensor swiglu_cpu(const Tensor& gate, const Tensor& up) {
  check_floating("gate", gate);
  check_like_gate("up", up, gate);
  const Tensor g = packed(gate), u = packed(up);
  Tensor out = empty_of_shape(gate);
  SwigluParams p;
  p.gate = g.data_ptr();
  p.up = u.data_ptr();
  p.out = out.data_ptr();
  p.numel = gate.numel();
  p.dtype = dtype_of(gate);
  cpu::swiglu(p, torch_threads(), parallel_on_torch);
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward_cpu(const Tensor& dout, const Tensor& gate, const Tensor& up) {
  check_floating("gate", gate);
  check_like_gate("up", up, gate);
  check_like_gate("dout", dout, gate);
  const Tensor d = packed(dout), g = packed(gate), u = packed(up);
  Tensor dgate = empty_of_shape(gate), dup = empty_of_shape(gate);
  SwigluParams p;
  p.dout = d.data_ptr();
  p.gate = g.data_ptr();
  p.up = u.data_ptr();
  p.dgate = dgate.data_ptr();
  p.dup = dup.data_ptr();
  p.numel = gate.numel();
  p.dtype = dtype_of(gate);
  cpu::swiglu_backward(p, torch_threads(), parallel_on_torch);
  return {dgate, dup};
}

}  // namespace diffqkv
