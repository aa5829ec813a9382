// SPDX-License-Identifier: Apache-2.0
// What becomes of the sums of a group of inputs: its scale and its offset, once for each sum.
#pragma once

#include <type_traits>

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

    [[gnu::always_inline]] Group(const QuantizedFormat& format, const uint8_t* panel, int64_t number, float factor) {
        const uint8_t* header = header_at(format, panel, number);
        for (int half = 0; half < 2; ++half) {
            Floats scale = format.has_half_scales ? load_half((const uint16_t*)header + half * kTile)
                                                  : load((const float*)header + half * kTile);
            scales[half] = mul(scale, broadcast(factor));
            offsets[half] = format.has_offsets ? load((const float*)(header + format.scale_bytes()) + half * kTile)
                                               : broadcast(0.0f);
        }
    }
};

// Adds a row's sums of 32 outputs in a group to its totals; its scale is that of integers. Inlined, as all that takes sums
// here: a call would have them in memory, from the first product on.
template <bool kHasOffsets>
[[gnu::always_inline]]
inline void add_row(const Group& group, const Correction& left, float, float x_sum, const Floats sums[2], float* totals) {
    for (int half = 0; half < 2; ++half) {
        Floats product = sums[half];
        if (left.halves) product = fma(broadcast(-0.5f * (float)left.halves), broadcast(x_sum), product);
        Floats total = fma(product, group.scales[half], load(totals + half * kTile));
        if (kHasOffsets) total = sub(total, mul(group.offsets[half], broadcast(x_sum)));
        store(totals + half * kTile, total);
    }
}

// The same of integers, which started with what their center makes of x.
template <bool kHasOffsets>
[[gnu::always_inline]]
inline void add_row(const Group& group, const Correction&, float x_scale, float x_sum, const Ints sums[2], float* totals) {
    for (int half = 0; half < 2; ++half) {
        Floats scale = mul(group.scales[half], broadcast(x_scale));
        Floats total = fma(to_floats(sums[half]), scale, load(totals + half * kTile));
        if (kHasOffsets) total = sub(total, mul(group.offsets[half], broadcast(x_sum)));
        store(totals + half * kTile, total);
    }
}

// Adds the sums of kRows rows from `row` on in group `number` to their totals [kRows, 32].
template <bool kHasOffsets, int kRows, typename Sum>
[[gnu::always_inline]]
inline void add_rows(const PreparedRows& rows, const Group& group, const Correction& left, int64_t number, int64_t row,
                     const Sum (&sums)[kRows][2], float* totals) {
    constexpr bool kIsInt = std::is_same_v<Sum, Ints>;
    int64_t stride = rows.groups, at = row * stride + number;
    const float *x_sums = rows.sums + at, *x_scales = rows.scales + at;
    bool needs_sum = kHasOffsets || (!kIsInt && left.halves);
    // Unrolled, as the sums are in registers.
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
        add_row<kHasOffsets>(group, left, kIsInt ? x_scales[i * stride] : 1.0f, needs_sum ? x_sums[i * stride] : 0.0f, sums[i],
                             totals + i * kPanel);
}

template <int kRows, typename Sum>
[[gnu::always_inline]]
inline void add_group(const PreparedRows& rows, const Group& group, const Correction& left, int64_t number, int64_t row,
                      bool has_offsets, const Sum (&sums)[kRows][2], float* totals) {
    if (has_offsets) add_rows<true>(rows, group, left, number, row, sums, totals);
    else add_rows<false>(rows, group, left, number, row, sums, totals);
}

}  // namespace wavetrain
