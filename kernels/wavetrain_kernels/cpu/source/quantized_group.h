// SPDX-License-Identifier: Apache-2.0
// What becomes of the sums of a group of inputs: its scale and its offset, once for each sum.
#pragma once

#include "quantized_format.h"
#include "quantized_integers.h"

namespace wavetrain {

constexpr int kDecodedBytes = 32 << 10;   // room for segments that are decoded for many rows

// What a source leaves to be done: a value is its scale times factor times (what is multiplied - center), less its offset.
struct Correction {
    float factor;
    int32_t halves;   // the center, in halves
    template <typename Source>
    explicit Correction(const Source& source) : factor(Source::kFactor), halves((int32_t)(2 * source.center())) {}
};

// The scales and offsets of one group of one panel.
struct Group {
    Floats scales[2], offsets[2];

    Group(const QuantizedFormat& format, const uint8_t* panel, int64_t number, float factor) {
        const uint8_t* header = panel + number * format.group_bytes();
        for (int half = 0; half < 2; ++half) {
            Floats scale = format.has_half_scales ? load_half((const uint16_t*)header + half * kTile)
                                                  : load((const float*)header + half * kTile);
            scales[half] = mul(scale, broadcast(factor));
            offsets[half] = format.has_offsets ? load((const float*)(header + format.scale_bytes()) + half * kTile)
                                               : broadcast(0.0f);
        }
    }
};

// Adds a row's sums of 32 outputs in a group to its totals. x_sum: of what they are sums of.
inline void add_group(const QuantizedLinear& op, const Group& group, const Correction& left, int64_t number, int64_t row,
                      const Floats sums[2], float* totals) {
    bool has_offsets = op.format.has_offsets != 0;
    Floats x_sum = broadcast(left.halves || has_offsets ? op.sums()[row * op.format.groups() + number] : 0.0f);
    for (int half = 0; half < 2; ++half) {
        Floats total = number ? load(totals + half * kTile) : broadcast(0.0f), product = sums[half];
        if (left.halves) product = fma(broadcast(-0.5f * (float)left.halves), x_sum, product);
        total = fma(product, group.scales[half], total);
        if (has_offsets) total = sub(total, mul(group.offsets[half], x_sum));
        store(totals + half * kTile, total);
    }
}

inline void add_group(const QuantizedLinear& op, const Group& group, const Correction& left, int64_t number, int64_t row,
                      const Ints sums[2], float* totals) {
    int64_t at = row * op.format.groups() + number;
    int32_t x_sum = op.int_sums()[at];
    Floats x_scale = broadcast(op.scales()[at]);
    // Unsigned, as rows past the last one hold anything.
    int32_t centers = (int32_t)((uint32_t)left.halves / 2 * (uint32_t)x_sum);
    for (int half = 0; half < 2; ++half) {
        Floats total = number ? load(totals + half * kTile) : broadcast(0.0f);
        Floats product = mul(to_floats(sub(sums[half], centers)), group.scales[half]);
        if (op.format.has_offsets) product = sub(product, mul(group.offsets[half], broadcast((float)x_sum)));
        store(totals + half * kTile, fma(product, x_scale, total));
    }
}

}  // namespace wavetrain
