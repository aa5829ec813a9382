// SPDX-License-Identifier: Apache-2.0
// Rows times panels of a quantized weight, on AMX tiles: some segments are decoded into tiles, for all rows of a chunk.
//
// A tile of B is 16 units. Units of another group than the one that is summed are zeros, so that groups may begin anywhere.
#pragma once

#include "quantized_group.h"

namespace wavetrain {

constexpr int64_t kDecodedTileBytes = 2 * kTileElements * (int64_t)sizeof(bf16);   // of both halves of a step

// partial [kTiles * 16, 32] (+)= tiles of A times decoded tiles, the two halves' rows taking turns.
template <bool kIsInt, int kTiles>
inline void multiply_decoded(float* partial, const char* a, const uint8_t* b, int64_t steps, bool is_first) {
    multiply_tiles<kIsInt, kTiles, 0, 128, 64>(partial, a, (const char*)b, steps, is_first);
}

inline void store_decoded(uint8_t* to, Pairs weights) { store(to, weights); }
inline void store_decoded(uint8_t* to, Quads weights) { store((int32_t*)to, weights); }

// Which tiles of B a piece of a group needs.
template <typename Source>
struct TileRange {
    static constexpr int64_t kSegments = kTile / Source::kUnits;   // of a tile
    int64_t begin, end;
    explicit TileRange(const Piece& piece) : begin(piece.begin / kSegments), end(ceil_div(piece.end, kSegments)) {}
};

// Decodes a piece into whole tiles; returns where they end. What comes next in memory is asked for meanwhile.
template <typename Source>
inline uint8_t* decode_tiles(const QuantizedLinear& op, const Source& source, uint8_t* to, const uint8_t* panel, const Piece& piece) {
    constexpr int kAhead = 4096;
    TileRange<Source> tiles(piece);
    const uint8_t* from = segment_at(op.format, panel, piece.group, piece.begin);
    for (int64_t segment = tiles.begin * tiles.kSegments; segment < tiles.end * tiles.kSegments; ++segment) {
        constexpr int kBytes = Source::kUnits * 128;
        if (segment < piece.begin || segment >= piece.end) {
            memset(to, 0, kBytes);
            to += kBytes;
            continue;
        }
        for (int byte = 0; byte < Source::kBytes; byte += 64) _mm_prefetch((const char*)from + byte + kAhead, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int unit = 0; unit < Source::kUnits; ++unit, to += 128) {
            typename Source::Weights weights[2];
            source.decode(weights, from, unit);
            store_decoded(to, weights[0]);
            store_decoded(to + 64, weights[1]);
        }
        from += Source::kBytes;
    }
    return to;
}

// A piece of a group, times at most 32 rows; the totals get it when the group is done.
template <typename Source>
inline void multiply_piece(const QuantizedFormat& format, const PreparedRows& prepared, const Correction& left, const Piece& piece,
                           const uint8_t* panel, const uint8_t* tiles, int64_t row, int64_t rows, float* totals, float* partial) {
    TileRange<Source> range(piece);
    const char* a = prepared.row(row) + range.begin * prepared.kStepBytes;
    if (rows > kTile) multiply_decoded<Source::kIsInt, 2>(partial, a, tiles, range.end - range.begin, piece.is_first);
    else multiply_decoded<Source::kIsInt, 1>(partial, a, tiles, range.end - range.begin, piece.is_first);
    if (!piece.is_last) return;
    Group group(format, panel, piece.group, left.factor);
    if (piece.group == 0) memset(totals, 0, (size_t)(rows * kPanel) * sizeof(float));
    for (int64_t i = 0; i < rows; ++i) {
        const float* from = partial + i * kPanel;
        typename Source::Sum sums[1][2];
        for (int half = 0; half < 2; ++half)
            if constexpr (Source::kIsInt) {
                Ints start = broadcast_ints(prepared.starts[(row + i) * prepared.groups + piece.group]);
                sums[0][half] = add(start, load_ints((const int32_t*)from + half * kTile));
            } else {
                sums[0][half] = load(from + half * kTile);
            }
        add_group(prepared, group, left, piece.group, row + i, format.has_offsets, sums, totals + i * kPanel);
    }
}

// Computes and stores rows [row, row + count) times one panel.
template <typename Source>
inline void multiply_on_tiles(const QuantizedLinear& op, const Source& source, float* totals, float* partial, uint8_t* decoded,
                              int64_t row, int64_t count, int64_t panel) {
    constexpr int64_t kInTile = TileRange<Source>::kSegments;
    PreparedRows prepared = op.prepared();
    const uint8_t* start = op.packed + panel * op.format.panel_bytes();
    // Of groups that do not fill tiles each needs its own, of which there is room for 16.
    int64_t segments = op.format.segments(), at_once = op.format.group_segments() % kInTile ? 8 : 8 * kInTile;
    for (int64_t begin = 0; begin < segments; begin += at_once) {
        int64_t end = segments - begin < at_once ? segments : begin + at_once;
        uint8_t* to = decoded;
        for_each_piece(op.format, begin, end, [&](const Piece& piece) { to = decode_tiles(op, source, to, start, piece); });
        for (int64_t i = 0; i < count; i += kBlock) {
            int64_t rows = count - i < kBlock ? count - i : kBlock;
            const uint8_t* tiles = decoded;
            for_each_piece(op.format, begin, end, [&](const Piece& piece) {
                multiply_piece<Source>(op.format, prepared, Correction(source), piece, start, tiles, row + i, rows,
                                       totals + i * kPanel, partial + i * kPanel);
                TileRange<Source> range(piece);
                tiles += (range.end - range.begin) * kDecodedTileBytes;
            });
            if (end == segments) finish_panel(op.target, totals + i * kPanel, row + i, rows, panel);
        }
    }
}

}  // namespace wavetrain
