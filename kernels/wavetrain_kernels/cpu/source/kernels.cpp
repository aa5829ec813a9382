// SPDX-License-Identifier: Apache-2.0
// The library's functions, as wavetrain_kernels/cpu/library.py declares them. One translation unit: it compiles in a second.
#include <sys/syscall.h>
#include <unistd.h>

#include "attention.h"
#include "filters.h"
#include "linear.h"
#include "moe.h"
#include "norm.h"
#include "program.h"
#include "quantized_linear.h"
#include "quantized_moe.h"
#include "rotary.h"
#include "sampling.h"

using namespace wavetrain;

extern "C" {

// Asks the kernel for the AMX registers of this process; false where it refuses them.
int wavetrain_enable(void) {
#if WAVETRAIN_AMX && !defined(WAVETRAIN_EMULATE_TILES)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return 1;
#endif
}

void* wavetrain_program_new(int64_t capacity) { return new Program(capacity); }

void wavetrain_program_free(void* program) { delete (Program*)program; }

// From here on this thread's calls are recorded in the program and not run; null: they are run again.
void wavetrain_program_record(void* program) { recording() = (Program*)program; }

int wavetrain_program_is_sound(const void* program) { return ((const Program*)program)->is_sound(); }

void wavetrain_program_run(const void* program, const Step* steps) { ((const Program*)program)->replay(steps); }

void wavetrain_pack_weight(bf16* packed, const bf16* weight, int64_t stride, int64_t n, int64_t k, int is_gated) {
    pack_weight(packed, weight, stride, n, k, is_gated);
}

void wavetrain_embedding(bf16* out, const bf16* table, const int64_t* rows, int64_t num_rows, int64_t k, float scale,
                         int is_packed) {
    submit(Embedding{out, table, rows, num_rows, k, scale, is_packed != 0});
}

void wavetrain_select_rows(bf16* out, const bf16* x, const int64_t* indices, int64_t num_rows, int64_t k) {
    submit(Selection{{out, x, indices, num_rows, k, 1.0f, false}});
}

void wavetrain_linear(void* out, const bf16* x, const bf16* packed, const bf16* bias, bf16* workspace, int64_t out_stride,
                      int64_t x_stride, int64_t m, int64_t k, int64_t n, int activation, int is_float_out) {
    submit(Linear{out, x, packed, bias, workspace, out_stride, x_stride, m, k, n, (Activation)activation, is_float_out != 0});
}

int64_t wavetrain_quantized_bytes(const QuantizedFormat* format) { return format->num_bytes(); }

int64_t wavetrain_quantized_workspace(const QuantizedFormat* format, int64_t m) { return format->workspace_bytes(m); }

void wavetrain_pack_quantized(uint8_t* packed, const QuantizedFormat* format, const uint8_t* values, const float* scales,
                              const float* offsets, int64_t block_rows) {
    pack_quantized(packed, *format, {values, scales, offsets, block_rows});
}

void wavetrain_quantized_linear(void* out, const bf16* x, const uint8_t* packed, const bf16* bias, bf16* workspace,
                                const QuantizedFormat* format, const float* codebook, const int32_t* order,
                                const float* input_scale, int64_t out_stride, int64_t x_stride, int64_t m, int activation,
                                int is_float_out) {
    Linear target{out,      x, nullptr,   bias,      workspace,              out_stride,
                  x_stride, m, format->k, format->n, (Activation)activation, is_float_out != 0};
    submit(QuantizedLinear{target, *format, packed, codebook, order, input_scale});
}

void wavetrain_route_experts(float* weights, int32_t* experts, const float* logits, int64_t num_rows, int64_t num_experts,
                             int64_t top_k, int is_renormalized) {
    submit(Routing{weights, experts, logits, num_rows, num_experts, top_k, is_renormalized != 0});
}

void wavetrain_fused_moe(bf16* out, const bf16* x, const bf16* gate_up, const bf16* down, const float* weights,
                         const int32_t* experts, char* workspace, int64_t x_stride, int64_t m, int64_t hidden, int64_t inner,
                         int64_t num_experts, int64_t top_k, int activation) {
    submit(Mixture{out, x, gate_up, down, weights, experts, workspace, x_stride, m, hidden, inner, num_experts, top_k,
                   (Activation)activation});
}

void wavetrain_quantized_moe(bf16* out, const bf16* x, const ExpertStack* gate_up, const ExpertStack* down, const float* weights,
                             const int32_t* experts, char* workspace, int64_t x_stride, int64_t m, int64_t hidden, int64_t inner,
                             int64_t num_experts, int64_t top_k, int activation) {
    Mixture mixture{out,    x,     nullptr,     nullptr, weights,               experts, workspace, x_stride, m,
                    hidden, inner, num_experts, top_k,   (Activation)activation};
    submit(QuantizedMixture{mixture, *gate_up, *down});
}

void wavetrain_rms_norm(void* out, void* residual_out, const void* x, const void* residual, const void* weight, int64_t outer,
                        int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t size, float eps, float weight_offset,
                        int is_bf16) {
    auto run = [&](auto kind) {
        using T = decltype(kind);
        submit(Norm<T>{(T*)out, (T*)residual_out, (const T*)x, (const T*)residual, (const T*)weight, outer, inner, outer_stride,
                       inner_stride, size, eps, weight_offset});
    };
    if (is_bf16) run(bf16());
    else run(float());
}

void wavetrain_rotate_and_cache(void* out, const void* query, int64_t query_stride, int64_t query_head_stride, int64_t query_heads,
                                const void* key, int64_t key_stride, int64_t key_head_stride, int64_t key_heads, const void* value,
                                int64_t value_stride, int64_t value_head_stride, const int64_t* positions, const void* table,
                                void* key_cache, void* value_cache, bf16* key_scales, bf16* value_scales, int codes,
                                const int64_t* slots, const void* query_norm, const void* key_norm, int64_t num_tokens, int64_t size, int64_t half, int64_t block_size,
                                float eps, int kind) {
    auto run = [&](auto element, auto entry) {
        using T = decltype(element);
        using C = decltype(entry);
        submit(Rotation<T, C>{(T*)out,
                                {(const T*)query, query_stride, query_head_stride, query_heads},
                                {(const T*)key, key_stride, key_head_stride, key_heads},
                                {(const T*)value, value_stride, value_head_stride, key_heads},
                                positions,
                                (const C*)table,
                                key_cache,
                                value_cache,
                                key_scales,
                                value_scales,
                                (Codes)codes,
                                slots,
                                (const T*)query_norm,
                                (const T*)key_norm,
                                num_tokens,
                                size,
                                half,
                                block_size,
                                eps});
    };
    if (kind == 0) run(bf16(), bf16());
    else if (kind == 1) run(bf16(), float());
    else run(float(), float());
}

void wavetrain_paged_attention(bf16* out, const bf16* query, const char* key_cache, const char* value_cache,
                               const bf16* key_scales, const bf16* value_scales, int codes, const int32_t* query_start_loc, const int32_t* seq_lens, const int32_t* block_tables,
                               char* workspace, int64_t query_stride, int64_t table_stride, int64_t num_rows, int64_t num_heads,
                               int64_t num_kv_heads, int64_t head_dim, int64_t block_size, int64_t sliding_window,
                               int64_t num_tokens, int64_t max_pieces, float scale, float soft_cap) {
    submit(Attention{out, query, key_cache, value_cache, key_scales, value_scales, (Codes)codes, query_start_loc, seq_lens,
                     block_tables, query_stride, table_stride, num_rows, num_heads, num_kv_heads, head_dim, block_size, sliding_window, num_tokens, max_pieces, workspace,
                     scale, soft_cap});
}

void wavetrain_sample_greedy(int64_t* token_ids, float* best, const float* logits, int64_t stride, int64_t num_rows, int64_t size) {
    sample_greedy(token_ids, best, logits, stride, num_rows, size);
}

void wavetrain_sample(int64_t* token_ids, float* best, const float* logits, const int64_t* seeds, const int64_t* positions,
                      const float* temperatures, const float* lowest, float* workspace, int64_t stride, int64_t num_rows,
                      int64_t size) {
    sample({token_ids, best, logits, seeds, positions, temperatures, lowest, workspace, stride, num_rows, size});
}

void wavetrain_apply_penalties(float* logits, const int64_t* token_ids, const int32_t* output_counts, const float* repetition,
                               const float* presence, const float* frequency, float* workspace, int64_t num_rows, int64_t size,
                               int64_t count) {
    apply_penalties({logits, token_ids, output_counts, repetition, presence, frequency, workspace, num_rows, size, count});
}

void wavetrain_filter_thresholds(float* lowest, const float* logits, const float* temperatures, const int64_t* top_k,
                                 const float* top_p, const float* min_p, int64_t stride, int64_t num_rows, int64_t size) {
    filter_thresholds({lowest, logits, temperatures, top_k, top_p, min_p, stride, num_rows, size});
}

void wavetrain_top_logprobs(int64_t* ids, float* logprobs, int64_t* ranks, const float* logits, const int64_t* token_ids,
                            int64_t num_rows, int64_t size, int64_t k, int64_t stride) {
    top_logprobs({ids, logprobs, ranks, logits, token_ids, num_rows, size, k, stride});
}

}  // extern "C"
