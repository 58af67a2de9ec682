// Writes a prompt into a cache and decodes one token, through torch's dispatcher: linking libdiffqkv.so registers the
// ops, and no header of diffqkv is needed. Ends with 1 if the result is not that of torch's own attention.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include <cmath>
#include <iostream>
#include <optional>
#include <tuple>

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

int main() {
  c10::InferenceMode inference;
  torch::manual_seed(0);
  // Heads and dimension of a Sigma-1.5B layer: G = gcd(4, 16) = 4 KV groups.
  const int64_t n_q = 32, n_k = 4, n_v = 16, d = 64, groups = 4, tokens = 1000, capacity = 1024;
  const Tensor q = torch::randn({1, n_q, 1, d}), k = torch::randn({1, n_k, tokens, d}),
               v = torch::randn({1, n_v, tokens, d});

  const Tensor k_cache = torch::empty({1, groups, capacity, n_k / groups, d});
  const Tensor v_cache = torch::empty({1, groups, capacity, n_v / groups, d});
  const Tensor positions = torch::arange(tokens).unsqueeze(0);
  const Tensor cache_seqlens = torch::full({1}, tokens, torch::kInt);

  auto& dispatcher = c10::Dispatcher::singleton();
  const auto update =
      dispatcher.findSchemaOrThrow("diffqkv::kv_cache_update", "")
          .typed<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                      const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, int64_t)>();
  const auto decode =
      dispatcher.findSchemaOrThrow("diffqkv::decode_attention", "")
          .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                            const MaybeTensor&, const MaybeTensor&, std::optional<double>, int64_t,
                                            int64_t, int64_t, double, const MaybeTensor&)>();

  update.call(k_cache, v_cache, k, v, positions, {}, {}, {}, {}, /*k_layout=*/0);
  const auto [out, lse] = decode.call(q, k_cache, v_cache, cache_seqlens, {}, {}, {}, /*k_layout=*/0,
                                      /*window_left=*/-1, /*window_right=*/-1, /*softcap=*/0.0, /*sinks=*/{});

  const Tensor all_k = k.repeat_interleave(n_q / n_k, 1), all_v = v.repeat_interleave(n_q / n_v, 1);
  const Tensor want = at::scaled_dot_product_attention(q, all_k, all_v);
  const double error = (out - want).abs().max().item<double>();
  std::cout << "decode_attention " << out.sizes() << ", lse " << lse.sizes() << ", largest difference from torch "
            << error << '\n';
  return error < 1e-5 ? 0 : 1;
}
