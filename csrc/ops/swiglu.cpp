#include "ops/checks.h"
#include "ops/device.h"
#include "ops/registration.h"
#include "ops/views.h"

namespace diffqkv {
namespace {

void check_like_gate(const TensorChecks& checks, const char* name, const Tensor& t, const Tensor& gate) {
  checks.dtype_and_device(name, t, {checks.dtype()});
  DIFFQKV_CHECK(t.sizes().equals(gate.sizes()), name, ": got shape ", list_of(t.sizes()),
                ", want the shape of gate = ", list_of(gate.sizes()));
}

TensorChecks check_inputs(const Tensor& gate, const Tensor& up) {
  const TensorChecks checks("gate", gate, kFloatingDtypes);
  check_like_gate(checks, "up", up, gate);
  return checks;
}

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
Tensor empty_of_shape(const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); }

// Fills all but the results.
SwigluParams params_of(const Tensor& gate, const Tensor& up) {
  SwigluParams p;
  p.gate = gate.data_ptr();
  p.up = up.data_ptr();
  p.numel = gate.numel();
  p.dtype = dtype_of(gate);
  return p;
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  check_inputs(gate, up);
  const Device device("swiglu", gate);
  std::optional<int64_t> gate_stride, up_stride;
  if (device.limits().rows_apart && !(gate.is_contiguous() && up.is_contiguous()))
    gate_stride = row_stride(gate), up_stride = row_stride(up);
  const Tensor gate_rows = gate_stride ? gate : packed(gate), up_rows = up_stride ? up : packed(up);
  const Tensor out = empty_of_shape(gate);
  SwigluParams p = params_of(gate_rows, up_rows);
  p.out = out.data_ptr();
  if (gate_stride || up_stride) {
    p.width = gate.size(gate.dim() - 1);
    p.gate_stride = gate_stride.value_or(p.width);
    p.up_stride = up_stride.value_or(p.width);
  }
  device.run(p);
  return out;
}

// -> dgate, dup
std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dout, const Tensor& gate, const Tensor& up) {
  check_like_gate(check_inputs(gate, up), "dout", dout, gate);
  const Tensor packed_dout = packed(dout), packed_gate = packed(gate), packed_up = packed(up);
  const Tensor dgate = empty_of_shape(gate), dup = empty_of_shape(gate);
  SwigluBackwardParams p;
  p.forward = params_of(packed_gate, packed_up);
  p.dout = packed_dout.data_ptr();
  p.dgate = dgate.data_ptr();
  p.dup = dup.data_ptr();
  Device("swiglu_backward", gate).run(p);
  return {dgate, dup};
}

STABLE_TORCH_LIBRARY_FRAGMENT(diffqkv, m) {
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor dout, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}
DIFFQKV_REGISTER(swiglu)
DIFFQKV_REGISTER(swiglu_backward)

}  // namespace
}  // namespace diffqkv
