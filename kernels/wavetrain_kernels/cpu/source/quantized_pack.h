// SPDX-License-Identifier: Apache-2.0
// Making panels of a quantized weight, once at load.
#pragma once

#include "quantized_format.h"
#include "quantized_integers.h"

namespace wavetrain {

// A weight as wavetrain_kernels/quantized_weight.py defines it, contiguous.
struct QuantizedSource {
    const uint8_t* values;    // [n, k] bytes, or [n, ceil(k / 2)] pairs of four bits
    const float* scales;      // [ceil(n / block_rows), groups]
    const float* offsets;     // likewise, or null
    int64_t block_rows;
};

// 16 bits that hold a float exactly, which the caller knows to exist.
inline uint16_t half_of(float x) {
    return (uint16_t)_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT));
}

template <typename Source>
inline void pack_segment(uint8_t* to, const Source& source, const QuantizedFormat& format, const QuantizedSource& from,
                         int64_t panel, int64_t input) {
    memset(to, 0, (size_t)format.segment_bytes());
    int64_t last = format.k - input < kSegment ? format.k - input : kSegment, half_bytes = ceil_div(format.k, 2);
    for (int half = 0; half < 2; ++half)
        for (int column = 0; column < kTile; ++column) {
            int64_t row = weight_row(panel, half, column, format.n, format.is_gated);
            if (row >= format.n) continue;
            for (int i = 0; i < last; ++i) {
                int64_t at = input + i;
                if constexpr (Source::kBytes == 256)
                    Source::put(to, half, column, i, from.values[row * half_bytes + at / 2] >> at % 2 * 4 & 15);
                else
                    Source::put(to, half, column, i, source.code(from.values[row * format.k + at]));
            }
        }
}

inline void pack_header(uint8_t* to, const QuantizedFormat& format, const QuantizedSource& from, int64_t panel, int64_t group) {
    memset(to, 0, (size_t)format.header_bytes());
    for (int output = 0; output < kPanel; ++output) {
        int64_t row = weight_row(panel, output / kTile, output % kTile, format.n, format.is_gated);
        if (row >= format.n) continue;
        int64_t at = row / from.block_rows * format.groups() + group;
        if (format.has_half_scales) ((uint16_t*)to)[output] = half_of(from.scales[at]);
        else ((float*)to)[output] = from.scales[at];
        if (format.has_offsets) ((float*)(to + format.scale_bytes()))[output] = from.offsets[at];
    }
}

template <typename Source>
inline void pack_panels(uint8_t* packed, const Source& source, const QuantizedFormat& format, const QuantizedSource& from) {
#pragma omp parallel
    {
        Range panels = share(num_panels(format.n, format.is_gated));
        for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
            uint8_t* start = packed + panel * format.panel_bytes();
            for_each_piece(format, 0, format.segments(), [&](const Piece& piece) {
                pack_header(start + piece.group * format.group_bytes(), format, from, panel, piece.group);
                for (int64_t at = piece.begin; at < piece.end; ++at) {
                    uint8_t* segment = (uint8_t*)segment_at(format, start, piece.group, at);
                    pack_segment(segment, source, format, from, panel, at * kSegment);
                }
            });
        }
    }
}

// Calls visit with the source that the format's values are decoded by.
template <typename Visit>
inline void with_source(const QuantizedFormat& format, const float* codebook, Visit visit) {
    static constexpr float kIntegers[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    if (format.has_int_inputs) return format.is_four_bit() ? visit(Int4Quads()) : visit(Int8Quads());
    switch (format.values) {
        case ValueFormat::kInt4: return visit(Int4Pairs(kIntegers));
        case ValueFormat::kCodebook: return visit(CodebookPairs(codebook));
        case ValueFormat::kInt8: return visit(int8_pairs());
        case ValueFormat::kFp8: return visit(fp8_pairs());
    }
}

inline void pack_quantized(uint8_t* packed, const QuantizedFormat& format, const QuantizedSource& from) {
    static constexpr float kNoCodebook[16] = {};
    with_source(format, kNoCodebook, [&](const auto& source) { pack_panels(packed, source, format, from); });
}

}  // namespace wavetrain
