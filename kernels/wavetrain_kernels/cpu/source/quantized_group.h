// SPDX-License-Identifier: Apache-2.0
// What becomes of the sums of a group of inputs: its scale and its offset, once for each sum.
#pragma once

#include "quantized_format.h"
#include "quantized_integers.h"

namespace wavetrain {

constexpr int kDecodedBytes = 32 << 10;   // room for segments that are decoded for many rows

// One group of one panel. A value is its scale times factor times (what is multiplied - center), less its offset.
struct Group {
    int64_t number;
    Floats scales[2], offsets[2];
    float center;
};

template <typename Source>
inline Group load_group(const QuantizedFormat& format, const uint8_t* panel, int64_t number) {
    const uint8_t* header = panel + number * format.group_bytes();
    Group group;
    group.number = number, group.center = (float)Source::center();
    for (int half = 0; half < 2; ++half) {
        group.scales[half] = format.has_half_scales ? load_half((const uint16_t*)header + half * kTile)
                                                    : load((const float*)header + half * kTile);
        if (Source::kFactor != 1.0f) group.scales[half] = mul(group.scales[half], broadcast(Source::kFactor));
        group.offsets[half] = format.has_offsets ? load((const float*)(header + format.scale_bytes()) + half * kTile)
                                                 : broadcast(0.0f);
    }
    return group;
}

// Adds a row's sums of 32 outputs in a group to its totals.
inline void add_group(const QuantizedLinear& op, const Group& group, int64_t row, const Floats sums[2], float* totals) {
    bool needs_sum = group.center != 0.0f || op.format.has_offsets;
    Floats x_sum = broadcast(needs_sum ? op.sums()[row * op.format.groups() + group.number] : 0.0f);
    for (int half = 0; half < 2; ++half) {
        Floats total = group.number ? load(totals + half * kTile) : broadcast(0.0f), product = sums[half];
        if (group.center != 0.0f) product = fma(broadcast(-group.center), x_sum, product);
        total = fma(product, group.scales[half], total);
        if (op.format.has_offsets) total = sub(total, mul(group.offsets[half], x_sum));
        store(totals + half * kTile, total);
    }
}

inline void add_group(const QuantizedLinear& op, const Group& group, int64_t row, const Ints sums[2], float* totals) {
    int64_t at = row * op.format.groups() + group.number;
    int32_t x_sum = op.int_sums()[at];
    Floats x_scale = broadcast(op.scales()[at]);
    for (int half = 0; half < 2; ++half) {
        Floats total = group.number ? load(totals + half * kTile) : broadcast(0.0f);
        Floats product = mul(to_floats(sub(sums[half], (int32_t)group.center * x_sum)), group.scales[half]);
        if (op.format.has_offsets) product = sub(product, mul(group.offsets[half], broadcast((float)x_sum)));
        store(totals + half * kTile, fma(product, x_scale, total));
    }
}

}  // namespace wavetrain
