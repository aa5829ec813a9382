// SPDX-License-Identifier: Apache-2.0
// Rows times panels of a quantized weight, on vectors.
#pragma once

#include <type_traits>

#include "quantized_group.h"

namespace wavetrain {

constexpr int64_t kStreamBytes = 8 << 10;   // of a panel that many rows pass by
constexpr int kAhead = 4096;   // bytes of a panel that are asked for before they are read

// What is asked for beside products: nothing; what few rows read next, whole; or half of what all rows read next, for the
// second-level cache.
enum class Fetch { kNone, kNear, kHalf };

// Asks for what kRows rows read soon after `line`.
template <typename Data, int kRows>
inline void fetch_ahead(const uint8_t* line) {
    // One row and bytes that need no decoding: a line is a load and a product. So many of them wait for the first-level
    // cache that others are held up; from the second-level one two cores of an EPYC read 53 to 56 GB/s in place of 37 to 52.
    // Where a line takes longer, the first-level cache is the faster way: 46 over 39 GB/s of bytes that become bf16.
    constexpr bool kIsDecoded = !Data::kIsInt || Data::kBytes < kSegment * kPanel || sizeof(typename Data::Weights) > 64;
    constexpr bool kIsLight = kRows == 1 && !kIsDecoded;
    _mm_prefetch((const char*)line + kAhead, kIsLight ? _MM_HINT_T1 : _MM_HINT_T0);
}

// sums (+)= kRows rows of x times a segment of a panel. next: what kHalf asks for; it moves on.
template <typename Data, int kRows, Fetch kFetch>
[[gnu::always_inline]]
inline void multiply_segment(typename Data::Sum (&sums)[kRows][2], const Data& data, const char* x, const uint8_t* b,
                             const uint8_t*& next) {
    constexpr int kUnitBytes = Data::kBytes / Data::kUnits;
#pragma GCC unroll 4
    for (int unit = 0; unit < Data::kUnits; ++unit) {
        if (kFetch == Fetch::kNear && unit * kUnitBytes % 64 == 0)
            for (int line = 0; line < kUnitBytes; line += 64) fetch_ahead<Data, kRows>(b + unit * kUnitBytes + line);
        if (kFetch == Fetch::kHalf && unit * kUnitBytes % 128 == 0)
            for (int line = 0; line < kUnitBytes; line += 128, next += 64) _mm_prefetch((const char*)next, _MM_HINT_T1);
        typename Data::Weights weights[2];
        data.decode(weights, b, unit);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
            int32_t four;
            memcpy(&four, x + row * kRowBytes + unit * 4, sizeof four);
            typename Data::Input input = Data::input(four);
            for (int half = 0; half < 2; ++half) sums[row][half] = multiply(sums[row][half], input, weights[half]);
        }
    }
}

// What the sums of a row and a group, number `at` of all, start with.
template <typename Sum>
inline Sum start_of(const PreparedRows& rows, int64_t at) {
    if constexpr (std::is_same_v<Sum, Ints>) return broadcast_ints(rows.starts[at]);
    else return broadcast(0.0f);
}

// Where sums are put while other rows are computed.
template <typename Sum>
inline Sum load_sum(const float* p) {
    if constexpr (std::is_same_v<Sum, Ints>) return load_ints((const int32_t*)p);
    else return load(p);
}
inline void store_sum(float* p, Floats x) { store(p, x); }
inline void store_sum(float* p, Ints x) { store((int32_t*)p, x); }

// Rows of x against segments of a panel: those of the weight, or decoded ones.
template <typename Data>
struct Product {
    const QuantizedFormat& format;
    const PreparedRows& rows;
    const Data& data;
    Correction left;
    const uint8_t* panel;
    const uint8_t* decoded;   // segments from `first_segment` on, or null: they are read from the panel
    int64_t first_segment;
    int64_t row;              // the first one
    const uint8_t* next = nullptr;   // what Fetch::kHalf asks for

    const uint8_t* at(int64_t group, int64_t segment) const {
        return decoded ? decoded + (segment - first_segment) * Data::kBytes : segment_at(format, panel, group, segment);
    }

    // totals and partial sums [kRows][32] of the rows of one piece.
    template <int kRows, Fetch kFetch>
    void run_piece(const Piece& piece, float* totals, float* partial) {
        constexpr int kInSteps = kRowBytes / (4 * Data::kUnits);   // segments of a step
        using Sum = typename Data::Sum;
        Sum sums[kRows][2];
        // Loops over rows are unrolled: indexed by a variable, sums would lie in memory.
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half)
                sums[i][half] = piece.is_first ? start_of<Sum>(rows, (row + i) * rows.groups + piece.group)
                                               : load_sum<Sum>(partial + i * kPanel + half * kTile);
        const char* x = rows.row(row);
        const uint8_t *b = at(piece.group, piece.begin), *ahead = next;
        for (uint64_t segment = (uint64_t)piece.begin; segment < (uint64_t)piece.end; ++segment, b += Data::kBytes) {
            const char* here = x + segment / kInSteps * rows.kStepBytes + segment % kInSteps * 4 * Data::kUnits;
            multiply_segment<Data, kRows, kFetch>(sums, data, here, b, ahead);
        }
        next = ahead;
        if (!piece.is_last) {
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) store_sum(partial + i * kPanel + half * kTile, sums[i][half]);
            return;
        }
        Group group(format, panel, piece.group, left.factor);
        add_group(rows, group, left, piece.group, row, format.has_offsets, sums, totals);
    }

    template <int kRows, Fetch kFetch>
    void run(int64_t begin, int64_t end, float* totals, float* partial) {
        if (begin == 0) memset(totals, 0, kRows * kPanel * sizeof(float));
        for_each_piece(format, begin, end, [&](const Piece& piece) { run_piece<kRows, kFetch>(piece, totals, partial); });
    }

    // At most as many rows as registers hold.
    template <Fetch kFetch>
    void run_rows(int64_t count, int64_t begin, int64_t end, float* totals, float* partial) {
        switch (count) {
            case 1: return run<1, kFetch>(begin, end, totals, partial);
            case 2: return run<2, kFetch>(begin, end, totals, partial);
#if defined(__AVX512F__)
            case 3: case 4: return run<4, kFetch>(begin, end, totals, partial);
            case 5: case 6: return run<6, kFetch>(begin, end, totals, partial);
            default: return run<8, kFetch>(begin, end, totals, partial);
#endif
        }
    }
};

// Few rows: a panel from its begin to its end, in the order of memory.
template <typename Source>
inline void multiply_few_rows(const QuantizedLinear& op, const Source& source, float* totals, int64_t row, int64_t count,
                              int64_t panel) {
    const uint8_t* start = op.packed + panel * op.format.panel_bytes();
    PreparedRows rows = op.prepared();
    Product<Source> product{op.format, rows, source, Correction(source), start, nullptr, 0, row};
    product.template run_rows<Fetch::kNear>(count, 0, op.format.segments(), totals, nullptr);
    finish_panel(op.target, totals, row, count, panel);
}

// Segments of a panel, decoded one after the other.
template <typename Source>
inline void decode_segments(const QuantizedLinear& op, const Source& source, uint8_t* to, const uint8_t* panel, int64_t begin,
                            int64_t end) {
    for_each_piece(op.format, begin, end, [&](const Piece& piece) {
        const uint8_t* from = segment_at(op.format, panel, piece.group, piece.begin);
        for (int64_t at = piece.begin; at < piece.end; ++at, from += Source::kBytes) {
#pragma GCC unroll 2
            for (int unit = 0; unit < Source::kUnits; ++unit) {
                typename Source::Weights weights[2];
                source.decode(weights, from, unit);
                for (int half = 0; half < 2; ++half, to += sizeof weights[0]) store(to, weights[half]);
            }
        }
    });
}

// Many rows: some segments at a time, which stay in the first-level cache. They are decoded for each eight rows, beside the
// products; but where decoding takes as long as those, once for all.
template <typename Source>
inline void multiply_many_rows(const QuantizedLinear& op, const Source& source, float* totals, float* partial, uint8_t* decoded,
                               int64_t row, int64_t count, int64_t panel) {
    constexpr bool kIsDecoded = !Source::kIsInt && sizeof(Pairs) > 64;
    constexpr int64_t kSegments = kIsDecoded ? kDecodedBytes / 2 / DecodedPairs::kBytes : kStreamBytes / Source::kBytes;
    Correction left(source);
    PreparedRows prepared = op.prepared();
    const uint8_t* start = op.packed + panel * op.format.panel_bytes();
    int64_t segments = op.format.segments();
    for (int64_t begin = 0; begin < segments; begin += kSegments) {
        int64_t end = segments - begin < kSegments ? segments : begin + kSegments;
        int64_t half = (end - begin) * Source::kBytes / 2;
        const uint8_t* behind = start + end * Source::kBytes + end / op.format.group_segments() * op.format.header_bytes();
        if constexpr (kIsDecoded) decode_segments(op, source, decoded, start, begin, end);
        for (int64_t i = 0; i < count; i += kRowsAtOnce) {
            int64_t rows = count - i < kRowsAtOnce ? count - i : kRowsAtOnce;
            float *sums = totals + i * kPanel, *parts = partial + i * kPanel;
            if constexpr (kIsDecoded) {
                Product<DecodedPairs>{op.format, prepared, DecodedPairs(), left, start, decoded, begin, row + i}
                    .template run_rows<Fetch::kNone>(rows, begin, end, sums, parts);
            } else {
                Product<Source> product{op.format, prepared, source, left, start, nullptr, 0, row + i, behind + (i ? half : 0)};
                if (i < 2 * kRowsAtOnce) product.template run_rows<Fetch::kHalf>(rows, begin, end, sums, parts);
                else product.template run_rows<Fetch::kNone>(rows, begin, end, sums, parts);
            }
            if (end == segments) finish_panel(op.target, sums, row + i, rows, panel);
        }
    }
}

}  // namespace wavetrain
