// SPDX-License-Identifier: Apache-2.0
// AMX tile instructions in terms of AVX-512, for testing what is written for them on machines that have none.
//
// As Intel's manual defines them for whole tiles of 16 rows of 64 bytes: bf16 products are summed in two float32 sums, of the
// even and of the odd ones, which are then added to the result.
#pragma once

#include "simd.h"

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define _tile_zero(to) (wavetrain::tiles()[to] = {})
#define _tile_loadd(to, from, stride) wavetrain::tiles()[to].load((const char*)(from), (stride))
#define _tile_stored(from, to, stride) wavetrain::tiles()[from].store((char*)(to), (stride))
#define _tile_dpbf16ps(sums, a, b) wavetrain::tiles()[sums].add_bf16(wavetrain::tiles()[a], wavetrain::tiles()[b])
#define _tile_dpbsud(sums, a, b) wavetrain::tiles()[sums].add_bytes(wavetrain::tiles()[a], wavetrain::tiles()[b])

namespace wavetrain {

struct EmulatedTile {
    __m512i rows[16];

    void load(const char* from, int64_t stride) {
        for (int row = 0; row < 16; ++row) rows[row] = _mm512_loadu_si512(from + row * stride);
    }
    void store(char* to, int64_t stride) const {
        for (int row = 0; row < 16; ++row) _mm512_storeu_si512(to + row * stride, rows[row]);
    }
    static int32_t at(const __m512i& row, int column) {
        int32_t value;
        memcpy(&value, (const char*)&row + column * 4, sizeof value);
        return value;
    }
    static __m512 even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
    static __m512 odd(__m512i pairs) {
        return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int32_t)0xffff0000)));
    }
    void add_bf16(const EmulatedTile& a, const EmulatedTile& b) {
        for (int row = 0; row < 16; ++row) {
            __m512 evens = _mm512_setzero_ps(), odds = evens;
            for (int k = 0; k < 16; ++k) {
                __m512i both = _mm512_set1_epi32(at(a.rows[row], k));
                evens = _mm512_fmadd_ps(even(both), even(b.rows[k]), evens);
                odds = _mm512_fmadd_ps(odd(both), odd(b.rows[k]), odds);
            }
            __m512 sums = _mm512_add_ps(_mm512_castsi512_ps(rows[row]), _mm512_add_ps(evens, odds));
            rows[row] = _mm512_castps_si512(sums);
        }
    }
    // Signed bytes of a, unsigned ones of b.
    void add_bytes(const EmulatedTile& a, const EmulatedTile& b) {
        for (int row = 0; row < 16; ++row)
            for (int k = 0; k < 16; ++k)
                for (int byte = 0; byte < 4; ++byte) {
                    int32_t x = (int8_t)(at(a.rows[row], k) >> byte * 8);
                    __m512i w = _mm512_and_si512(_mm512_srli_epi32(b.rows[k], (unsigned)byte * 8), _mm512_set1_epi32(0xff));
                    rows[row] = _mm512_add_epi32(rows[row], _mm512_mullo_epi32(w, _mm512_set1_epi32(x)));
                }
    }
};

// Of this thread.
inline EmulatedTile* tiles() {
    static thread_local EmulatedTile all[8];
    return all;
}

}  // namespace wavetrain
