// The function table of one instruction set level.
#include "cpu/kernels/kernels.h"

namespace diffqkv {

#define DIFFQKV_STRING_(x) #x
#define DIFFQKV_STRING(x) DIFFQKV_STRING_(x)
#define DIFFQKV_JOIN_(a, b) a##b
#define DIFFQKV_JOIN(a, b) DIFFQKV_JOIN_(a, b)

namespace DIFFQKV_ISA {
void attention_block(const AttentionParams&, const AttentionPlan&, int64_t, void*);
void attention_split(const AttentionParams&, const AttentionPlan&, int64_t, void*, float*);
void attention_merge(const AttentionParams&, const AttentionPlan&, int64_t, int64_t, const float*);
void attention_backward_rows(const FlashAttentionBackwardParams&, const FlashAttentionBackwardPlan&,
                             const BackwardWorkspace&, int64_t);
void attention_backward_block(const FlashAttentionBackwardParams&, const FlashAttentionBackwardPlan&,
                              const BackwardWorkspace&, int64_t, void*);
void selective_v_score(const SelectiveVAttentionParams&, const SelectiveVAttentionPlan&, const SelectiveVWorkspace&,
                       int64_t, void*);
void selective_v_stats(const SelectiveVAttentionParams&, const SelectiveVWorkspace&, int64_t);
void selective_v_gather(const SelectiveVAttentionParams&, const SelectiveVAttentionPlan&, const SelectiveVWorkspace&,
                        int64_t, void*);
void kv_cache_update(const KvCacheUpdateParams&, int64_t, int64_t, int64_t, int64_t);
void swiglu(const SwigluParams&, int64_t, int64_t);
void swiglu_backward(const SwigluParams&, int64_t, int64_t);
double probe_fma(int64_t, float*);
double probe_dot(int64_t, float*);
void probe_read(const void*, int64_t, float*);
}  // namespace DIFFQKV_ISA

extern const CpuKernels DIFFQKV_JOIN(kernels_, DIFFQKV_ISA) = {
    DIFFQKV_STRING(DIFFQKV_ISA),
    DIFFQKV_ISA::attention_block,
    DIFFQKV_ISA::attention_split,
    DIFFQKV_ISA::attention_merge,
    DIFFQKV_ISA::attention_backward_rows,
    DIFFQKV_ISA::attention_backward_block,
    DIFFQKV_ISA::selective_v_score,
    DIFFQKV_ISA::selective_v_stats,
    DIFFQKV_ISA::selective_v_gather,
    DIFFQKV_ISA::kv_cache_update,
    DIFFQKV_ISA::swiglu,
    DIFFQKV_ISA::swiglu_backward,
    DIFFQKV_ISA::probe_fma,
    DIFFQKV_ISA::probe_dot,
    DIFFQKV_ISA::probe_read,
};

}  // namespace diffqkv
