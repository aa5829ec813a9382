// SPDX-License-Identifier: Apache-2.0
// Products of small bf16 matrices with float32 sums: on AMX tiles where the instruction set has them, else on vectors.
//
// One order of addition: an element of a product is summed over k upwards, two at a time, whatever else is computed
// beside it. That makes every kernel above independent of the batch a row is in.
//
// A "tile" of A is 16 rows of 32 bf16; a tile of B is 16 rows, row r holding (B[2r][n], B[2r + 1][n]) for 16 columns n.
#pragma once

#include "simd.h"

#if defined(WAVETRAIN_EMULATE_TILES)
#include "tile_emulation.h"
#define WAVETRAIN_AMX 1
#elif defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define WAVETRAIN_AMX 1
#else
#define WAVETRAIN_AMX 0
#endif

namespace wavetrain {

constexpr int kTile = 16;            // rows of a tile, and columns of a product
constexpr int kDepth = 32;           // k of one tile
constexpr int kTileElements = 512;   // 16 x 32 bf16, 1 KiB
constexpr int kTileRow = 32;         // bf16 of a row, of A as of B

// Tiles belong to a thread and other libraries set them up in their own way, so every parallel region does it anew.
class TileScope {
  public:
    TileScope() {
#if WAVETRAIN_AMX
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
#endif
    }
    ~TileScope() {
#if WAVETRAIN_AMX
        _tile_release();
#endif
    }
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;
};

#if !WAVETRAIN_AMX

inline int32_t pair_at(const bf16* p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return pair;
}

// c + a[0] * b[even] + a[1] * b[odd] for 16 columns; `a` is a pair of bf16.
inline Floats multiply_pair(Floats c, int32_t a, const bf16* b) {
#if defined(__AVX512BF16__)
    return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_set1_epi32(a), (__m512bh)_mm512_loadu_si512(b))};
#elif defined(__AVX512F__)
    __m512i pairs = _mm512_loadu_si512(b);
    __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int32_t)0xffff0000)));
    __m512i both = _mm512_set1_epi32(a);
    __m512 a_even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    __m512 a_odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int32_t)0xffff0000)));
    return {_mm512_fmadd_ps(a_odd, odd, _mm512_fmadd_ps(a_even, even, c.v))};
#else
    const __m256i mask = _mm256_set1_epi32((int32_t)0xffff0000);
    __m256i low = _mm256_loadu_si256((const __m256i*)b), high = _mm256_loadu_si256((const __m256i*)(b + 16));
    __m256i both = _mm256_set1_epi32(a);
    __m256 a_even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    __m256 a_odd = _mm256_castsi256_ps(_mm256_and_si256(both, mask));
    c.low = _mm256_fmadd_ps(a_even, _mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), c.low);
    c.high = _mm256_fmadd_ps(a_even, _mm256_castsi256_ps(_mm256_slli_epi32(high, 16)), c.high);
    c.low = _mm256_fmadd_ps(a_odd, _mm256_castsi256_ps(_mm256_and_si256(low, mask)), c.low);
    c.high = _mm256_fmadd_ps(a_odd, _mm256_castsi256_ps(_mm256_and_si256(high, mask)), c.high);
    return c;
#endif
}

// Rows of a product that fit into the registers beside two tiles of B.
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 8;
#else
constexpr int kRowsAtOnce = 2;
#endif

#endif

}  // namespace wavetrain
