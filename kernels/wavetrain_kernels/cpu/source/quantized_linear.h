// SPDX-License-Identifier: Apache-2.0
// Linear layers over quantized weights. Of each group of inputs a sum of products of the values as they are, float32 or
// int32; then the group's scale and offset once for each sum.
//
// An element is summed as in tile.h within a group, and the groups upwards, whatever else is computed beside it: no row
// depends on its batch. Values are exact in what they are multiplied as, so that decoding them for each row or once for many
// makes no difference.
#pragma once

#include "quantized_inputs.h"
#include "quantized_pack.h"
#if WAVETRAIN_AMX
#include "quantized_tiles.h"
#else
#include "quantized_rows.h"
#endif

namespace wavetrain {

// What a thread needs beside the rows of x.
struct alignas(64) ProductMemory {
    float totals[kMaxRows * kPanel], partial[kMaxRows * kPanel];
    uint8_t decoded[kDecodedBytes];
};

// Computes and stores rows [row, row + count) times one panel. Not inlined: compiled once for layers and mixtures.
template <typename Source>
[[gnu::noinline]] void multiply_panel(const QuantizedLinear& op, const Source& source, ProductMemory& memory, int64_t row,
                                      int64_t count, int64_t panel) {
#if WAVETRAIN_AMX
    multiply_on_tiles(op, source, memory.totals, memory.partial, memory.decoded, row, count, panel);
#else
    if (count <= kRowsAtOnce) multiply_few_rows(op, source, memory.totals, row, count, panel);
    else multiply_many_rows(op, source, memory.totals, memory.partial, memory.decoded, row, count, panel);
#endif
}

template <typename Source>
inline void run(const QuantizedLinear& op, const Source& source) {
    bool needs_sums = source.center() != 0 || op.format.has_offsets;
    Range rows = share(op.target.m);
    prepare_rows(op, rows.begin, rows.end, needs_sums);
#pragma omp barrier
    auto* memory = (ProductMemory*)thread_memory().reserve(sizeof(ProductMemory));
    int64_t panels = num_panels(op.format.n, op.format.is_gated);
    int64_t chunk = rows_at_once(op.target.m, op.format.steps() * kRowBytes / (int64_t)sizeof(bf16));
    Range units = share(ceil_div(op.target.m, chunk) * panels);
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
        int64_t panel = unit % panels, row = unit / panels * chunk;
        int64_t count = op.target.m - row < chunk ? op.target.m - row : chunk;
        multiply_panel(op, source, *memory, row, count, panel);
    }
}

inline void run(const QuantizedLinear& op) {
    with_source(op.format, op.codebook, [&](const auto& source) { run(op, source); });
}

}  // namespace wavetrain
