// SPDX-License-Identifier: Apache-2.0
// Sources (see quantized_values.h) for x of int8: four signed bytes of x times four unsigned ones of the weight, sums int32.
//
// A sum of 66,000 inputs cannot leave 31 bits: 255 * 127 * 66,000.
#pragma once

#include "quantized_values.h"

namespace wavetrain {

#if defined(__AVX512F__)
struct Ints {
    __m512i v;
};
inline Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline Ints broadcast_ints(int32_t a) { return {_mm512_set1_epi32(a)}; }
inline void store(int32_t* p, Ints a) { _mm512_storeu_si512(p, a.v); }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
#else
struct Ints {
    __m256i low, high;
};
inline Ints load_ints(const int32_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
inline Ints broadcast_ints(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
inline void store(int32_t* p, Ints a) {
    _mm256_storeu_si256((__m256i*)p, a.low);
    _mm256_storeu_si256((__m256i*)p + 1, a.high);
}
inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
#endif

#if defined(__AVX512VNNI__)
using Quads = Ints;
using QuadInput = __m512i;
inline Quads quads_of(Ints bytes) { return bytes; }
inline QuadInput quad_input(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints multiply(Ints c, QuadInput x, Quads w) { return {_mm512_dpbusd_epi32(c.v, w.v, x)}; }
#elif defined(__AVX512F__)
// As words: the instruction that multiplies bytes holds a sum of two in 16 bits, which is too few.
struct Quads {
    __m512i even, odd;
};
using QuadInput = Quads;
inline Quads quads_of(Ints bytes) {
    return {_mm512_and_si512(bytes.v, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(bytes.v, 8)};
}
inline QuadInput quad_input(int32_t x) {
    __m512i all = _mm512_set1_epi32(x);
    return {_mm512_srai_epi16(_mm512_slli_epi16(all, 8), 8), _mm512_srai_epi16(all, 8)};
}
inline Ints multiply(Ints c, QuadInput x, Quads w) {
    __m512i both = _mm512_add_epi32(_mm512_madd_epi16(w.even, x.even), _mm512_madd_epi16(w.odd, x.odd));
    return {_mm512_add_epi32(c.v, both)};
}
#else
struct Quads {
    Ints even, odd;
};
struct QuadInput {
    __m256i even, odd;
};
inline Quads quads_of(Ints bytes) {
    __m256i mask = _mm256_set1_epi16(0xff);
    return {{_mm256_and_si256(bytes.low, mask), _mm256_and_si256(bytes.high, mask)},
            {_mm256_srli_epi16(bytes.low, 8), _mm256_srli_epi16(bytes.high, 8)}};
}
inline QuadInput quad_input(int32_t x) {
    __m256i all = _mm256_set1_epi32(x);
    return {_mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), _mm256_srai_epi16(all, 8)};
}
inline Ints multiply(Ints c, QuadInput x, Quads w) {
    __m256i low = _mm256_add_epi32(_mm256_madd_epi16(w.even.low, x.even), _mm256_madd_epi16(w.odd.low, x.odd));
    __m256i high = _mm256_add_epi32(_mm256_madd_epi16(w.even.high, x.even), _mm256_madd_epi16(w.odd.high, x.odd));
    return {_mm256_add_epi32(c.low, low), _mm256_add_epi32(c.high, high)};
}
#endif

inline void store(uint8_t* p, Ints bytes) { store((int32_t*)p, bytes); }

struct QuadSource {
    static constexpr int kUnits = 4;
    static constexpr float kFactor = 1.0f;
    static constexpr bool kIsInt = true;
    using Sum = Ints;
    using Input = QuadInput;
    using Weights = Quads;
    static Input input(int32_t x) { return quad_input(x); }
};

// A unit is two lines, of a half each; of each output four bytes, each value plus 128.
class Int8Quads : public QuadSource {
  public:
    static constexpr int kBytes = 512;
    static constexpr int32_t center() { return 128; }
    uint8_t code(uint8_t value) const { return value ^ 0x80; }
    static void put(uint8_t* segment, int half, int column, int input, uint8_t code) {
        segment[input / 4 * 128 + half * 64 + column * 4 + input % 4] = code;
    }
    Ints bytes(const uint8_t* p, int unit, int half) const { return load_ints((const int32_t*)(p + unit * 128 + half * 64)); }
    void decode(Quads w[2], const uint8_t* p, int unit) const {
        for (int half = 0; half < 2; ++half) w[half] = quads_of(bytes(p, unit, half));
    }
};

// A unit is a line: the first half's values in the low four bits of its bytes.
class Int4Quads : public QuadSource {
  public:
    static constexpr int kBytes = 256;
    static constexpr int32_t center() { return 8; }
    static void put(uint8_t* segment, int half, int column, int input, uint8_t code) {
        segment[input / 4 * 64 + column * 4 + input % 4] |= (uint8_t)(code << half * 4);
    }
    Ints bytes(const uint8_t* p, int unit, int half) const {
        Ints line = load_ints((const int32_t*)(p + unit * 64));
#if defined(__AVX512F__)
        return {_mm512_and_si512(half ? _mm512_srli_epi16(line.v, 4) : line.v, _mm512_set1_epi8(15))};
#else
        __m256i mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(half ? _mm256_srli_epi16(line.low, 4) : line.low, mask),
                _mm256_and_si256(half ? _mm256_srli_epi16(line.high, 4) : line.high, mask)};
#endif
    }
    void decode(Quads w[2], const uint8_t* p, int unit) const {
        for (int half = 0; half < 2; ++half) w[half] = quads_of(bytes(p, unit, half));
    }
};

}  // namespace wavetrain
