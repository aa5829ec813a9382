// SPDX-License-Identifier: Apache-2.0
// Mixtures of experts: which experts a token goes to, and the weighted sum of what they make of it.
//
// A pair is a token and one of its experts. Pairs are sorted by expert, so that an expert's weights are read once for all its
// tokens. A token's sum is taken in the order of its experts' numbers, each product as linear.h has it: its bits do not depend
// on the other tokens, nor on the number of threads.
#pragma once

#include <math.h>

#include "linear.h"
#include "memory.h"

namespace wavetrain {

struct Routing {
    float* weights;         // [num_rows, top_k]
    int32_t* experts;       // likewise
    const float* logits;    // [num_rows, num_experts]
    int64_t num_rows, num_experts, top_k;
    bool is_renormalized;

    void bind(const Step& step, int64_t) { num_rows = step.num_tokens; }
    int64_t num_tokens() const { return num_rows; }
    bool is_large() const { return is_worth_threads(num_rows * num_experts); }
};

// The k largest logits in falling order, the lower number first where two are equal.
inline void find_largest(float* values, int32_t* experts, const float* logits, int64_t size, int64_t k) {
    int64_t count = 0;
    for (int64_t expert = 0; expert < size; ++expert) {
        float logit = logits[expert];
        if (count == k && !(logit > values[k - 1])) continue;
        int64_t at = count < k ? count++ : k - 1;
        for (; at > 0 && logit > values[at - 1]; --at) values[at] = values[at - 1], experts[at] = experts[at - 1];
        values[at] = logit, experts[at] = (int32_t)expert;
    }
}

// The sum of exp(logit - largest).
inline float sum_of_powers(const float* logits, int64_t size, float largest) {
    Floats total = broadcast(0.0f), top = broadcast(largest);
    int64_t at = 0;
    for (; at + kLanes <= size; at += kLanes) total = add(total, exp(sub(load(logits + at), top)));
    if (at < size) {
        float rest[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) rest[lane] = at + lane < size ? logits[at + lane] : -INFINITY;
        total = add(total, exp(sub(load(rest), top)));
    }
    return sum(total);
}

inline void run(const Routing& op) {
    Range rows = share(op.num_rows);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        float* weights = op.weights + row * op.top_k;
        int32_t* experts = op.experts + row * op.top_k;
        const float* logits = op.logits + row * op.num_experts;
        find_largest(weights, experts, logits, op.num_experts, op.top_k);
        float largest = weights[0], total = sum_of_powers(logits, op.num_experts, largest);
        if (!(total < INFINITY)) {   // a NaN, or nothing but infinities: no distribution, but experts that exist
            for (int64_t rank = 0; rank < op.top_k; ++rank) weights[rank] = NAN, experts[rank] = (int32_t)rank;
            continue;
        }
        float chosen = 0.0f;
        for (int64_t rank = 0; rank < op.top_k; ++rank) chosen += weights[rank] = expf(weights[rank] - largest);
        for (int64_t rank = 0; rank < op.top_k; ++rank) weights[rank] /= op.is_renormalized ? chosen : total;
    }
}

struct Mixture {
    bf16* out;              // [m, hidden], contiguous
    const bf16* x;          // [m, hidden]
    const bf16* gate_up;    // of each expert, packed with gates
    const bf16* down;       // of each expert, packed
    const float* weights;   // [m, top_k]
    const int32_t* experts; // likewise; one that does not exist adds nothing
    char* workspace;        // see wavetrain_kernels/cpu/moe.py
    int64_t x_stride, m, hidden, inner, num_experts, top_k;
    Activation activation;

    void bind(const Step& step, int64_t) { m = step.num_tokens, workspace = step.workspace; }
    int64_t num_tokens() const { return m; }
    bool is_large() const { return true; }
};

// The pairs of a step by expert, in the workspace. An expert's rows begin with a block of their own.
struct Groups {
    int32_t* starts;   // [num_experts + 1] where an expert's pairs begin
    int32_t* blocks;   // [num_experts + 1] its first block
    int32_t* tokens;   // [m * top_k]
    float* weights;    // likewise
    bf16* units;       // blocks of rows of A: the gated units

    explicit Groups(const Mixture& op) {
        int64_t pairs = op.m * op.top_k, num_bytes = (2 * (op.num_experts + 1) + 2 * pairs) * 4;
        starts = (int32_t*)op.workspace;
        blocks = starts + op.num_experts + 1;
        tokens = blocks + op.num_experts + 1;
        weights = (float*)(tokens + pairs);
        units = (bf16*)(op.workspace + (num_bytes + 63) / 64 * 64);
    }

    int64_t count(int64_t expert) const { return starts[expert + 1] - starts[expert]; }
};

inline void sort_pairs(const Mixture& op, const Groups& groups) {
    auto exists = [&](int32_t expert) { return expert >= 0 && expert < op.num_experts; };
    int64_t pairs = op.m * op.top_k;
    memset(groups.starts, 0, (size_t)(op.num_experts + 1) * sizeof(int32_t));
    for (int64_t pair = 0; pair < pairs; ++pair)
        if (exists(op.experts[pair])) ++groups.starts[op.experts[pair] + 1];
    groups.blocks[0] = 0;
    for (int64_t expert = 0; expert < op.num_experts; ++expert) {
        groups.blocks[expert + 1] = groups.blocks[expert] + (int32_t)ceil_div(groups.starts[expert + 1], kBlock);
        groups.starts[expert + 1] += groups.starts[expert];
    }
    for (int64_t pair = 0; pair < pairs; ++pair) {
        if (!exists(op.experts[pair])) continue;
        int32_t at = groups.starts[op.experts[pair]]++;
        groups.tokens[at] = (int32_t)(pair / op.top_k);
        groups.weights[at] = op.weights[pair];
    }
    // Each start has moved on to the next one's.
    memmove(groups.starts + 1, groups.starts, (size_t)op.num_experts * sizeof(int32_t));
    groups.starts[0] = 0;
}

// Stores the gated units of `rows` rows, columns of one panel, as rows of A in the block at `block`.
inline void store_units(const Mixture& op, bf16* block, const float* c, int64_t rows, int64_t panel) {
    bf16* to = block + panel / 2 * kBlockElements + panel % 2 * kTile;
    bool is_alone = panel % 2 == 0 && panel + 1 == num_panels(2 * op.inner, true);
    for (int64_t i = 0; i < rows; ++i, to += kDepth) {
        store(to, mul(activate(load(c + i * kPanel), op.activation), load(c + i * kPanel + kTile)));
        if (is_alone) memset(to + kTile, 0, kTile * sizeof(bf16));
    }
}

// Shares the panels of all experts with pairs among the threads, by cost(pairs of the expert) a panel: calls visit(expert, its
// panels) for this thread's stretch.
template <typename Cost, typename Visit>
inline void share_panels(const Groups& groups, int64_t num_experts, int64_t panels, Cost cost, Visit visit) {
    int64_t total = 0, before = 0;
    for (int64_t expert = 0; expert < num_experts; ++expert)
        if (int64_t count = groups.count(expert)) total += cost(count) * panels;
    Range mine = share(total);
    for (int64_t expert = 0; expert < num_experts; ++expert) {
        int64_t count = groups.count(expert);
        if (!count) continue;
        auto panel_at = [&](int64_t position) {
            int64_t panel = position <= before ? 0 : ceil_div(position - before, cost(count));
            return panel < panels ? panel : panels;
        };
        Range own = {panel_at(mine.begin), panel_at(mine.end)};
        before += cost(count) * panels;
        if (own.begin < own.end) visit(expert, own);
    }
}

// The gated units of all pairs. A thread gets a stretch of all experts' panels; it packs the rows for each expert itself,
// so that they are in its cache.
inline void run_gates(const Mixture& op, const Groups& groups, float* c) {
    // Reading a panel takes about as long as multiplying three blocks with it.
    auto cost = [](int64_t count) { return 3 + ceil_div(count, kBlock); };
    int64_t steps = ceil_div(op.hidden, kDepth), panels = num_panels(2 * op.inner, true);
    int64_t unit_steps = ceil_div(op.inner, kDepth);
    share_panels(groups, op.num_experts, panels, cost, [&](int64_t expert, Range own) {
        int64_t count = groups.count(expert), chunk = rows_at_once(count, op.hidden);
        for (int64_t row = 0; row < count; row += chunk) {
            int64_t rows = count - row < chunk ? count - row : chunk;
            bf16* a = (bf16*)thread_memory().reserve(ceil_div(rows, kBlock) * steps * kBlockElements * (int64_t)sizeof(bf16));
            for (int64_t i = 0; i < rows; ++i) {
                const bf16* x = op.x + groups.tokens[groups.starts[expert] + row + i] * op.x_stride;
                pack_rows(a + i / kBlock * steps * kBlockElements + i % kBlock * kDepth, x, 0, 0, 1, op.hidden);
            }
            for (int64_t panel = own.begin; panel < own.end; ++panel)
                multiply_panel(c, a, op.gate_up + (expert * panels + panel) * steps * kBlockElements, steps, rows,
                               [&](const float* sums, int64_t first, int64_t some) {
                                   int64_t block = groups.blocks[expert] + (row + first) / kBlock;
                                   store_units(op, groups.units + block * unit_steps * kBlockElements, sums, some, panel);
                               });
        }
    });
}

// Adds weight times 32 products.
inline void add_weighted(float* sums, float weight, const float* products) {
    Floats factor = broadcast(weight);
    store(sums, fma(factor, load(products), load(sums)));
    store(sums + kTile, fma(factor, load(products + kTile), load(sums + kTile)));
}

// Adds to the sums [m, width] of some columns what one expert makes of its tokens there; panels [begin, end).
inline void add_expert(const Mixture& op, const Groups& groups, float* c, float* sums, int64_t expert, Range columns) {
    int64_t steps = ceil_div(op.inner, kDepth), panels = num_panels(op.hidden, false), count = groups.count(expert);
    int64_t width = (columns.end - columns.begin) * kPanel, chunk = count ? rows_at_once(count, op.inner) : 0;
    for (int64_t row = 0; row < count; row += chunk) {
        int64_t rows = count - row < chunk ? count - row : chunk, at = groups.starts[expert] + row;
        const bf16* a = groups.units + (groups.blocks[expert] + row / kBlock) * steps * kBlockElements;
        for (int64_t panel = columns.begin; panel < columns.end; ++panel)
            multiply_panel(c, a, op.down + (expert * panels + panel) * steps * kBlockElements, steps, rows,
                           [&](const float* products, int64_t first, int64_t some) {
                               for (int64_t i = 0; i < some; ++i) {
                                   float* to = sums + groups.tokens[at + first + i] * width + (panel - columns.begin) * kPanel;
                                   add_weighted(to, groups.weights[at + first + i], products + i * kPanel);
                               }
                           });
    }
}

// Columns of the results, a thread's own, some at a time: calls add(sums [m, width], its panels), and stores the sums.
template <typename Add>
inline void sum_columns(const Mixture& op, ThreadMemory& memory, Add add) {
    constexpr int64_t kSumBytes = 1 << 20;   // with an expert's rows they stay in a core's second-level cache
    Range mine = share(num_panels(op.hidden, false));
    int64_t most = kSumBytes / (op.m * kPanel * (int64_t)sizeof(float)), at_once = most ? most : 1;
    for (Range some = {mine.begin, mine.begin}; some.begin < mine.end; some.begin = some.end) {
        some.end = mine.end - some.begin < at_once ? mine.end : some.begin + at_once;
        int64_t width = (some.end - some.begin) * kPanel, first = some.begin * kPanel;
        int64_t columns = op.hidden - first < width ? op.hidden - first : width;
        float* sums = (float*)memory.reserve(op.m * width * (int64_t)sizeof(float));
        memset(sums, 0, (size_t)(op.m * width) * sizeof(float));
        add(sums, some);
        for (int64_t row = 0; row < op.m; ++row)
            for (int64_t at = 0; at < columns; at += kLanes) {
                Floats values = load(sums + row * width + at);
                bf16* to = op.out + row * op.hidden + first + at;
                if (columns - at < kLanes) store(to, values, (int)(columns - at));
                else store(to, values);
            }
    }
}

// The second projections. A thread has columns of its own, and adds the experts there in their order.
inline void run_downs(const Mixture& op, const Groups& groups, float* c) {
    sum_columns(op, thread_memory(), [&](float* sums, Range panels) {
        for (int64_t expert = 0; expert < op.num_experts; ++expert) add_expert(op, groups, c, sums, expert, panels);
    });
}

inline void run(const Mixture& op) {
    Groups groups(op);
    if (omp_get_thread_num() == 0) sort_pairs(op, groups);
#pragma omp barrier
    alignas(64) float c[kMaxRows * kPanel];
    run_gates(op, groups, c);
#pragma omp barrier
    run_downs(op, groups, c);
}

}  // namespace wavetrain
