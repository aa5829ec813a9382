// SPDX-License-Identifier: Apache-2.0
// What rows of x are made into before they are multiplied with a quantized weight: blocks of bf16 or int8, and sums of groups.
#pragma once

#include <math.h>

#include "memory.h"
#include "quantized_format.h"
#include "quantized_integers.h"

namespace wavetrain {

// The sums of a row's bf16 in each group.
inline void sum_groups(const QuantizedFormat& format, const PreparedRows& rows, int64_t row) {
    const char* x = rows.row(row);
    float* sums = rows.sums + row * rows.groups;
    for_each_piece(format, 0, format.segments(), [&](const Piece& piece) {
        Floats total = broadcast(0.0f);
        for (int64_t at = piece.begin; at < piece.end; ++at)
            total = add(total, load((const bf16*)(x + at / 2 * rows.kStepBytes + at % 2 * 32)));
        sums[piece.group] = sum(total);
    });
}

inline void pack_in_order(const QuantizedLinear& op, const PreparedRows& rows, int64_t row) {
    constexpr int64_t kInputs = kRowBytes / (int64_t)sizeof(bf16);
    const bf16* x = (const bf16*)op.target.x + row * op.target.x_stride;
    char* to = rows.row(row);
    for (int64_t at = 0; at < op.format.k; at += kInputs, to += rows.kStepBytes) {
        bf16* line = (bf16*)to;
        int64_t count = op.format.k - at < kInputs ? op.format.k - at : kInputs;
        for (int64_t i = 0; i < count; ++i) line[i] = x[op.order[at + i]];
        for (int64_t i = count; i < kInputs; ++i) line[i] = 0;
    }
}

// A row in the weight's order, zeros up to whole steps.
inline const bf16* ordered_row(const QuantizedLinear& op, int64_t row) {
    int64_t k = op.format.k, padded = op.format.steps() * op.format.step_inputs();
    const bf16* x = (const bf16*)op.target.x + row * op.target.x_stride;
    if (!op.order && padded == k) return x;
    bf16* ordered = (bf16*)thread_memory().reserve(padded * (int64_t)sizeof(bf16));
    if (op.order)
        for (int64_t at = 0; at < k; ++at) ordered[at] = x[op.order[at]];
    else
        memcpy(ordered, x, (size_t)k * sizeof(bf16));
    memset(ordered + k, 0, (size_t)(padded - k) * sizeof(bf16));
    return ordered;
}

// The largest of bits, none of which is negative.
inline uint16_t largest_bits(__m256i bits) {
    // The smallest of 8 words is one instruction.
    __m128i all = _mm_set1_epi16(-1);
    __m128i most = _mm_max_epu16(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    return (uint16_t)~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(most, all)));
}

// The scale of `count` inputs, a multiple of 16: what was given, or the largest size over 127. NaN where an input is no number.
inline float scale_of(const QuantizedLinear& op, const bf16* x, int64_t count) {
    // Without their signs bf16 are in the order of their bits; infinity and NaN come last.
    constexpr uint16_t kInfinity = 0x7f80;
    __m256i size = _mm256_set1_epi16(0x7fff), most = _mm256_setzero_si256();
    for (int64_t at = 0; at < count; at += kLanes)
        most = _mm256_max_epu16(most, _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(x + at)), size));
    uint32_t bits = largest_bits(most);
    float largest;
    if (bits >= kInfinity) return NAN;
    bits <<= 16;
    memcpy(&largest, &bits, sizeof largest);
    float scale = op.input_scale ? *op.input_scale : largest / 127.0f;
    return scale == 0.0f ? 1.0f : scale;
}

// 16 inputs over a scale as bytes, rounded to even; returns them as integers.
inline Ints round_inputs(int8_t* to, const bf16* x, float scale) {
    // In this order of operands what is no number becomes 127.
    Floats scaled = max(min(div(load(x), broadcast(scale)), broadcast(127.0f)), broadcast(-127.0f));
#if defined(__AVX512F__)
    __m512i integers = _mm512_cvtps_epi32(scaled.v);
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(integers));
    return {integers};
#else
    __m256i low = _mm256_cvtps_epi32(scaled.low), high = _mm256_cvtps_epi32(scaled.high);
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    _mm_storeu_si128((__m128i*)to, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    return {low, high};
#endif
}

inline int32_t sum(Ints a) {
    alignas(64) int32_t lanes[kLanes];
    store(lanes, a);
    int32_t total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
    return total;
}

// A row of int8, its scales and its sums, and what sums of products with a weight plus its center start with.
inline void quantize_row(const QuantizedLinear& op, const PreparedRows& rows, int64_t row) {
    const QuantizedFormat& format = op.format;
    const bf16* x = ordered_row(op, row);
    char* to = rows.row(row);
    int32_t center = format.is_four_bit() ? Int4Quads::center() : Int8Quads::center();
    int64_t input_groups = ceil_div(format.k, format.input_group_size);
    int64_t each = format.input_group_size / format.group_size;   // groups of the weight in one of the inputs
    float scale = 0.0f;
    for_each_piece(format, 0, format.segments(), [&](const Piece& piece) {
        if (input_groups == 1 ? piece.group == 0 : piece.group % each == 0) {
            int64_t begin = piece.begin * kSegment, whole = format.segments() * kSegment;
            int64_t end = input_groups == 1 || begin + format.input_group_size > whole ? whole : begin + format.input_group_size;
            scale = scale_of(op, x + begin, end - begin);
        }
        Ints total = broadcast_ints(0);
        for (int64_t at = piece.begin; at < piece.end; ++at)
            total = add(total, round_inputs((int8_t*)to + at / 4 * rows.kStepBytes + at % 4 * kSegment, x + at * kSegment, scale));
        int64_t place = row * rows.groups + piece.group;
        int32_t x_sum = sum(total);
        rows.sums[place] = (float)x_sum * scale;
        rows.scales[place] = scale;
        rows.starts[place] = -center * x_sum;
    });
}

// Makes rows [begin, end) of x into what is multiplied.
inline void prepare_rows(const QuantizedLinear& op, int64_t begin, int64_t end, bool needs_sums) {
    PreparedRows rows = op.prepared();
    if (op.format.has_int_inputs) {
        for (int64_t row = begin; row < end; ++row) quantize_row(op, rows, row);
        return;
    }
    if (!op.order) pack_rows(op.target.workspace, op.target.x, op.target.x_stride, begin, end, op.format.k);
    for (int64_t row = begin; row < end; ++row) {
        if (op.order) pack_in_order(op, rows, row);
        if (needs_sums) sum_groups(op.format, rows, row);
    }
}

}  // namespace wavetrain
