// SPDX-License-Identifier: Apache-2.0
// Mixtures of experts with a projection, or both, of quantized weights: moe.h's pairs, order of addition and shares of the
// threads, quantized_linear.h's products.
//
// All rows are made into what is multiplied before the products of a projection begin, each once, as rounding them to bytes
// costs more than a copy. In between, gated units lie in memory as plain rows, in the order of the pairs.
#pragma once

#include "moe.h"
#include "quantized_linear.h"

namespace wavetrain {

// One expert's weight of a projection. This and the next are declared alike in wavetrain_kernels/cpu/quantized_moe.py.
struct ExpertWeight {
    QuantizedFormat format;
    const uint8_t* packed;
    const int32_t* order;       // as QuantizedLinear has it
    const float* input_scale;   // likewise
};

// A projection of all experts, whose formats are alike but for offsets, the width of scales, and orders.
struct ExpertStack {
    QuantizedFormat format;        // the first one's
    const bf16* dense;             // packed as moe.h has it; null where the experts are quantized
    const ExpertWeight* weights;   // [num_experts]
    const float* codebook;

    // Of 32 rows of x of any expert, prepared.
    int64_t block_bytes() const { return format.workspace_bytes(kBlock); }
};

struct QuantizedMixture {
    Mixture mixture;   // its weights are unused
    ExpertStack gate_up, down;

    void bind(const Step& step, int64_t capacity) { mixture.bind(step, capacity); }
    int64_t num_tokens() const { return mixture.m; }
    bool is_large() const { return true; }

    // The workspace, behind the index of the pairs: gated units [pairs, inner]; then rows prepared for one projection.
    bf16* units(const Groups& groups) const { return groups.units; }
    char* rows(const Groups& groups) const {
        return (char*)groups.units + ceil_div(mixture.m * mixture.top_k * mixture.inner * (int64_t)sizeof(bf16), 64) * 64;
    }
};

// What stands for a source where weights are bf16.
struct DenseSource {
    static constexpr int32_t center() { return 0; }
};

inline void multiply_panel(const QuantizedLinear& op, const DenseSource&, ProductMemory& memory, int64_t row, int64_t count,
                           int64_t panel) {
    multiply_panel(op.target, memory.totals, row, count, panel);
}

template <typename Visit>
inline void with_source(const ExpertStack& stack, Visit visit) {
    if (stack.dense) visit(DenseSource());
    else with_source(stack.format, stack.codebook, visit);
}

// An expert's part of a projection, from panel `first` on; `rows`: where its prepared rows are.
inline QuantizedLinear expert_linear(const ExpertStack& stack, int64_t expert, char* rows, int64_t count, int64_t first) {
    Linear target{};
    target.workspace = (bf16*)rows;
    target.m = count, target.k = stack.format.k, target.n = stack.format.n - (stack.format.is_gated ? 0 : first * kPanel);
    if (stack.dense) {
        int64_t panels = num_panels(stack.format.n, stack.format.is_gated);
        target.packed = stack.dense + (expert * panels + first) * stack.format.steps() * kBlockElements;
        return {target, stack.format, nullptr, nullptr, nullptr, nullptr};
    }
    const ExpertWeight& weight = stack.weights[expert];
    const uint8_t* packed = weight.packed + first * weight.format.panel_bytes();
    return {target, weight.format, packed, stack.codebook, weight.order, weight.input_scale};
}

inline char* expert_rows(const ExpertStack& stack, const Groups& groups, char* rows, int64_t expert) {
    return rows + groups.blocks[expert] * stack.block_bytes();
}

// Makes the rows of all pairs into what their experts multiply; row_at(pair) is one, of bf16.
template <typename Source, typename RowAt>
inline void prepare_pairs(const ExpertStack& stack, const Source& source, const Groups& groups, int64_t num_experts, char* rows,
                          RowAt row_at) {
    Range mine = share(groups.starts[num_experts]);
    int64_t expert = 0;
    for (int64_t pair = mine.begin; pair < mine.end; ++pair) {
        while (groups.starts[expert + 1] <= pair) ++expert;
        char* to = expert_rows(stack, groups, rows, expert);
        QuantizedLinear op = expert_linear(stack, expert, to, groups.count(expert), 0);
        op.target.x = row_at(pair), op.target.x_stride = 0;
        int64_t row = pair - groups.starts[expert];
        prepare_rows(op, row, row + 1, source.center() != 0 || op.format.has_offsets);
    }
}

inline ProductMemory& product_memory() { return *(ProductMemory*)thread_memory().reserve(sizeof(ProductMemory)); }

// Rows of one expert that pass a panel before the next one, as run(QuantizedLinear) has it.
inline int64_t expert_rows_at_once(const ExpertStack& stack, int64_t count) {
    return rows_at_once(count, stack.format.steps() * kRowBytes / (int64_t)sizeof(bf16));
}

template <typename Source>
inline void run_gates(const QuantizedMixture& op, const Groups& groups, const Source& source) {
    ProductMemory& memory = product_memory();
#if WAVETRAIN_AMX
    // A panel is decoded once, which takes about as long as multiplying three blocks with it.
    auto cost = [](int64_t count) { return 3 + ceil_div(count, kBlock); };
#else
    // Memory brings a panel while some rows are multiplied with it.
    auto cost = [](int64_t count) { return 1 + ceil_div(count, kRowsAtOnce / 2); };
#endif
    int64_t panels = num_panels(op.gate_up.format.n, true), inner = op.mixture.inner;
    share_panels(groups, op.mixture.num_experts, panels, cost, [&](int64_t expert, Range own) {
        int64_t count = groups.count(expert), chunk = expert_rows_at_once(op.gate_up, count);
        char* rows = expert_rows(op.gate_up, groups, op.rows(groups), expert);
        QuantizedLinear linear = expert_linear(op.gate_up, expert, rows, count, 0);
        linear.target.out = op.units(groups) + groups.starts[expert] * inner;
        linear.target.out_stride = inner, linear.target.activation = op.mixture.activation;
        for (int64_t row = 0; row < count; row += chunk)
            for (int64_t panel = own.begin; panel < own.end; ++panel)
                multiply_panel(linear, source, memory, row, count - row < chunk ? count - row : chunk, panel);
    });
}

inline ThreadMemory& sum_memory() {
    thread_local ThreadMemory memory;
    return memory;
}

// A thread's room for the products of an expert's rows with one panel.
inline float* product_room(const QuantizedMixture& op, const Groups& groups) {
    thread_local ThreadMemory memory;
    int64_t most = 0;
    for (int64_t expert = 0; expert < op.mixture.num_experts; ++expert)
        if (groups.count(expert) > most) most = groups.count(expert);
    auto* room = (float*)memory.reserve(most * kPanel * (int64_t)sizeof(float));
    memset(room, 0, (size_t)(most * kPanel) * sizeof(float));
    return room;
}

// Adds to the sums [m, width] of some columns what one expert makes of its tokens there.
template <typename Source>
inline void add_expert(const QuantizedMixture& op, const Groups& groups, const Source& source, ProductMemory& memory, float* products,
                       float* sums, int64_t expert, Range columns) {
    int64_t count = groups.count(expert);
    if (!count) return;
    int64_t chunk = expert_rows_at_once(op.down, count);
    int64_t width = (columns.end - columns.begin) * kPanel, start = groups.starts[expert];
    char* rows = expert_rows(op.down, groups, op.rows(groups), expert);
    for (int64_t panel = columns.begin; panel < columns.end; ++panel) {
        QuantizedLinear linear = expert_linear(op.down, expert, rows, count, panel);
        linear.target.out = products, linear.target.out_stride = kPanel, linear.target.is_float_out = true;
        float* own = sums + (panel - columns.begin) * kPanel;
        for (int64_t row = 0; row < count; row += chunk)
            multiply_panel(linear, source, memory, row, count - row < chunk ? count - row : chunk, 0);
        // What is past the last column is added up too, and not stored.
        for (int64_t i = 0; i < count; ++i)
            add_weighted(own + groups.tokens[start + i] * width, groups.weights[start + i], products + i * kPanel);
    }
}

template <typename Source>
inline void run_downs(const QuantizedMixture& op, const Groups& groups, const Source& source) {
    ProductMemory& memory = product_memory();
    float* products = product_room(op, groups);
    sum_columns(op.mixture, sum_memory(), [&](float* sums, Range panels) {
        for (int64_t expert = 0; expert < op.mixture.num_experts; ++expert)
            add_expert(op, groups, source, memory, products, sums, expert, panels);
    });
}

inline void run(const QuantizedMixture& op) {
    const Mixture& mixture = op.mixture;
    Groups groups(mixture);
    if (omp_get_thread_num() == 0) sort_pairs(mixture, groups);
#pragma omp barrier
    with_source(op.gate_up, [&](const auto& source) {
        prepare_pairs(op.gate_up, source, groups, mixture.num_experts, op.rows(groups),
                      [&](int64_t pair) { return mixture.x + groups.tokens[pair] * mixture.x_stride; });
#pragma omp barrier
        run_gates(op, groups, source);
    });
#pragma omp barrier
    with_source(op.down, [&](const auto& source) {
        prepare_pairs(op.down, source, groups, mixture.num_experts, op.rows(groups),
                      [&](int64_t pair) { return op.units(groups) + pair * mixture.inner; });
#pragma omp barrier
        run_downs(op, groups, source);
    });
}

}  // namespace wavetrain
