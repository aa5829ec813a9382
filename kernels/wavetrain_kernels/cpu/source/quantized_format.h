// SPDX-License-Identifier: Apache-2.0
// How quantized weights lie in memory: panels of 32 outputs as in linear.h, each a stream that is read once, in order.
//
// A panel is its groups of inputs one after the other, a group a header and its segments. The header has the group's scales
// (float32, or float16 where that holds them exactly), then its offsets (float32), of 32 outputs each. A segment is 16 inputs
// of the 32 outputs, in the order in which a level's registers want them: see quantized_values.h. The last group's segments
// reach to the end of the rows of x, which are padded with zeros.
#pragma once

#include "linear.h"

namespace wavetrain {

constexpr int kSegment = 16;      // inputs of a segment
constexpr int kRowBytes = 64;     // of a row of x in a block, as of a tile: 32 bf16 or 64 int8

enum class ValueFormat : int32_t { kInt4 = 0, kCodebook = 1, kInt8 = 2, kFp8 = 3 };

// A packed weight and what it is multiplied with. Declared alike in wavetrain_kernels/cpu/quantized_linear.py.
struct QuantizedFormat {
    int64_t n, k;
    int64_t group_size;         // inputs that share a scale: k, or a multiple of 16 below it
    int64_t input_group_size;   // of rows of int8 x: k, or a multiple of group_size
    ValueFormat values;
    int32_t has_int_inputs;     // x is rounded to int8, and sums are integers
    int32_t has_offsets, has_half_scales, is_gated;

    // Inputs of a row of x in one block of a step, and segments of them.
    int64_t step_inputs() const { return has_int_inputs ? 64 : 32; }
    int64_t steps() const { return has_int_inputs ? ceil_div(k, 64) : ceil_div(k, 32); }
    int64_t segments() const { return steps() * step_inputs() / kSegment; }
    int64_t groups() const { return ceil_div(k, group_size); }
    int64_t group_segments() const { return groups() == 1 ? segments() : group_size / kSegment; }
    bool is_four_bit() const { return values == ValueFormat::kInt4 || values == ValueFormat::kCodebook; }

    int64_t segment_bytes() const { return kSegment * kPanel / (is_four_bit() ? 2 : 1); }
    int64_t scale_bytes() const { return kPanel * (has_half_scales ? 2 : 4); }
    int64_t header_bytes() const { return scale_bytes() + (has_offsets ? kPanel * 4 : 0); }
    int64_t group_bytes() const { return header_bytes() + group_segments() * segment_bytes(); }
    int64_t panel_bytes() const { return groups() * header_bytes() + segments() * segment_bytes(); }
    int64_t num_bytes() const { return num_panels(n, is_gated) * panel_bytes(); }

    // What rows of x are made into before they are multiplied; rows in whole blocks.
    int64_t padded_rows(int64_t m) const { return ceil_div(m, kBlock) * kBlock; }
    int64_t x_bytes(int64_t m) const { return padded_rows(m) * steps() * kRowBytes; }
    int64_t sum_bytes(int64_t m) const { return padded_rows(m) * groups() * 4; }
    int64_t workspace_bytes(int64_t m) const { return x_bytes(m) + (has_int_inputs ? 3 : 1) * sum_bytes(m); }
};

// Rows of x as they are multiplied, in a call's workspace: blocks of 32 rows, [steps][32 rows][64 bytes]; then of each row and
// group the sum of its x; then, of int8 x, its scale, and what sums of its products start with.
//
// A view with everything found out: the compiler would divide anew at each use, as it cannot know what a store may change.
struct PreparedRows {
    char* x;
    float *sums, *scales;
    int32_t* starts;
    int64_t groups, block_bytes;

    PreparedRows(const QuantizedFormat& format, void* workspace, int64_t m)
        : x((char*)workspace), groups(format.groups()), block_bytes(format.steps() * kStepBytes) {
        int64_t num_sums = format.padded_rows(m) * groups;
        sums = (float*)(x + format.x_bytes(m));
        scales = sums + num_sums;
        starts = (int32_t*)(scales + num_sums);
    }
    // A row of x in the first step, and how far it is to the next one.
    char* row(int64_t number) const { return x + number / kBlock * block_bytes + number % kBlock * kRowBytes; }
    static constexpr int64_t kStepBytes = kBlock * kRowBytes;
};

struct QuantizedLinear {
    Linear target;              // where results go, and how; its weight is unused
    QuantizedFormat format;
    const uint8_t* packed;
    const float* codebook;      // [16], of kCodebook
    const int32_t* order;       // [k]: column i of the weight multiplies input order[i]; or null
    const float* input_scale;   // [1], or null: found for each row

    void bind(const Step& step, int64_t capacity) { target.bind(step, capacity); }
    int64_t num_tokens() const { return target.m; }
    bool is_large() const { return true; }

    PreparedRows prepared() const { return PreparedRows(format, target.workspace, target.m); }
};

// A run of segments that belong to one group.
struct Piece {
    int64_t group, begin, end;   // segments of the row
    bool is_first, is_last;      // of its group
};

// Calls visit(piece) for the segments [begin, end) of a row, in order.
template <typename Visit>
inline void for_each_piece(const QuantizedFormat& format, int64_t begin, int64_t end, Visit visit) {
    int64_t size = format.group_segments(), last = format.groups() - 1, group = begin / size;
    if (group > last) group = last;
    for (int64_t at = begin; at < end; ++group) {
        int64_t group_end = group == last ? format.segments() : (group + 1) * size;
        int64_t stop = group_end < end ? group_end : end;
        visit(Piece{group, at, stop, at == group * size, stop == group_end});
        at = stop;
    }
}

// The header of a group, in its panel.
inline const uint8_t* header_at(const QuantizedFormat& format, const uint8_t* panel, int64_t group) {
    return panel + group * (format.header_bytes() + format.group_size / kSegment * format.segment_bytes());
}

// A segment of a group, in its panel.
inline const uint8_t* segment_at(const QuantizedFormat& format, const uint8_t* panel, int64_t group, int64_t segment) {
    return panel + (group + 1) * format.header_bytes() + segment * format.segment_bytes();
}

inline Floats load_half(const uint16_t* p) {
#if defined(__AVX512F__)
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
#else
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
#endif
}

}  // namespace wavetrain
