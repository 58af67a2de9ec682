#include "cpu/probe.h"

#include <atomic>

#include "cpu/isa.h"
#include "cpu/kernels/kernels.h"

namespace diffqkv::cpu {

double probe(Probe what, int64_t rounds, const void* data, int64_t bytes, int64_t threads, Parallel parallel) {
  struct Context {
    Probe what;
    int64_t rounds, share;
    const char* data;
    std::atomic<double> done{0};
  } context{
      .what = what, .rounds = rounds, .share = bytes / threads / 4096 * 4096, .data = static_cast<const char*>(data)};
  parallel(
      threads,
      [](void* c, int64_t worker) {
        auto& ctx = *static_cast<Context*>(c);
        const CpuKernels& kernels = cpu_kernels();
        float sink = 0;
        double work = 0;
        switch (ctx.what) {
          case Probe::fma: work = kernels.probe_fma(ctx.rounds, &sink); break;
          case Probe::dot: work = kernels.probe_dot(ctx.rounds, &sink); break;
          case Probe::read:
            for (int64_t r = 0; r < ctx.rounds; ++r, work += double(ctx.share))
              kernels.probe_read(ctx.data + worker * ctx.share, ctx.share, &sink);
        }
        ctx.done += work;
      },
      &context);
  return context.done;
}

}  // namespace diffqkv::cpu
