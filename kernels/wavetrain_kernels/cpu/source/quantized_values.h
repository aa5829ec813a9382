// SPDX-License-Identifier: Apache-2.0
// Values of quantized weights as registers multiply them: of each format and instruction set, how a segment lies in memory
// and what is made of it.
//
// A "unit" is what four bytes of x are multiplied with: two inputs (of bf16 x) or four (of int8 x) of 32 outputs. A source is
// a class with
//     kUnits, kBytes         units and bytes of a segment
//     Sum, Input, Weights    registers: sums of 16 outputs, one row's four bytes, and what they are multiplied with
//     kFactor, center()      value = kFactor * (what is multiplied - center)
//     decode(w, p, unit)     w[0], w[1]: weights of outputs 0 to 15 and 16 to 31, of the segment at p
//     code(), put()          for packing: how a value is held, and where
// Sources for bf16 x are here, those for int8 x in quantized_integers.h.
// Whatever a value is multiplied as, it is so exactly: bf16 has all 4-bit integers, int8 plus a half, and e4m3.
#pragma once

#include "simd.h"
#include "tile.h"

namespace wavetrain {

// What a unit of bf16 x is multiplied with: pairs of bf16, or on levels without such products pairs of float.

#if defined(__AVX512BF16__)
struct Pairs {
    __m512i v;
};
using PairInput = __m512i;
inline PairInput pair_input(int32_t x) { return _mm512_set1_epi32(x); }
inline Floats multiply(Floats c, PairInput x, Pairs w) { return {_mm512_dpbf16_ps(c.v, (__m512bh)x, (__m512bh)w.v)}; }
inline void store(uint8_t* p, Pairs w) { _mm512_storeu_si512(p, w.v); }
#else
struct Pairs {
    Floats even, odd;
};
using PairInput = Pairs;
inline PairInput pair_input(int32_t x) {
#if defined(__AVX512F__)
    __m512i all = _mm512_set1_epi32(x);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(all, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(all, _mm512_set1_epi32((int32_t)0xffff0000)))}};
#else
    __m256i all = _mm256_set1_epi32(x);
    __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(all, 16));
    __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(all, _mm256_set1_epi32((int32_t)0xffff0000)));
    return {{even, even}, {odd, odd}};
#endif
}
// In the order of multiply_pair in tile.h.
inline Floats multiply(Floats c, PairInput x, Pairs w) { return fma(x.odd, w.odd, fma(x.even, w.even, c)); }
inline void store(uint8_t* p, Pairs w) {
    store((float*)p, w.even);
    store((float*)p + kLanes, w.odd);
}
#endif

struct PairSource {
    static constexpr int kUnits = 8;
    static constexpr float kFactor = 1.0f;
    static constexpr bool kIsInt = false;
    using Sum = Floats;
    using Input = PairInput;
    using Weights = Pairs;
    static Input input(int32_t x) { return pair_input(x); }
};

// What is decoded once for many rows: units of two halves as they are multiplied.
struct DecodedPairs : PairSource {
    static constexpr int kHalfBytes = sizeof(Pairs), kBytes = kUnits * 2 * kHalfBytes;
    void decode(Pairs w[2], const uint8_t* p, int unit) const {
        p += unit * 2 * kHalfBytes;
        for (int half = 0; half < 2; ++half, p += kHalfBytes)
#if defined(__AVX512BF16__)
            w[half] = {_mm512_loadu_si512(p)};
#else
            w[half] = {load((const float*)p), load((const float*)p + kLanes)};
#endif
    }
};

// A line has two units. Its words are (output, input) pairs; a word's four bits number `unit % 2 * 2 + half` are a value.
struct Int4Place {
    static constexpr int kBytes = 256;
    static void put(uint8_t* segment, int half, int column, int input, uint8_t code) {
        int unit = input / 2, number = unit % 2 * 2 + half;
        segment[unit / 2 * 64 + (column * 2 + input % 2) * 2 + number / 2] |= (uint8_t)(code << number % 2 * 4);
    }
};

#if defined(__AVX512BF16__)
class Int4Pairs : public PairSource, public Int4Place {
  public:
    explicit Int4Pairs(const float numbers[16]) {
        // Twice, so that a fifth bit, which is the next value's, makes no difference.
        Floats row = load(numbers);
        bf16 table[32];
        store(table, row), store(table + 16, row);
        table_ = _mm512_loadu_si512(table);
    }
    static constexpr float center() { return 0.0f; }
    void decode(Pairs w[2], const uint8_t* p, int unit) const {
        __m512i line = _mm512_loadu_si512(p + unit / 2 * 64);
        w[0] = {_mm512_permutexvar_epi16(unit % 2 ? _mm512_srli_epi16(line, 8) : line, table_)};
        w[1] = {_mm512_permutexvar_epi16(_mm512_srli_epi16(line, unit % 2 ? 12 : 4), table_)};
    }

  private:
    __m512i table_;
};
using CodebookPairs = Int4Pairs;
#elif defined(__AVX512F__)
class Int4Pairs : public PairSource, public Int4Place {
  public:
    explicit Int4Pairs(const float numbers[16]) : table_(load(numbers)) {}
    static constexpr float center() { return 0.0f; }
    void decode(Pairs w[2], const uint8_t* p, int unit) const {
        __m512i line = _mm512_loadu_si512(p + unit / 2 * 64);
        for (int half = 0; half < 2; ++half) {
            unsigned shift = (unsigned)(unit % 2 * 8 + half * 4);
            w[half] = {{_mm512_permutexvar_ps(_mm512_srli_epi32(line, shift), table_.v)},
                       {_mm512_permutexvar_ps(_mm512_srli_epi32(line, shift + 16), table_.v)}};
        }
    }

  private:
    Floats table_;
};
using CodebookPairs = Int4Pairs;
#else
// Numbers of a code book, or the four bits as they are: less work than a table of 16 here.
template <bool kIsCodebook>
class FourBitPairs : public PairSource, public Int4Place {
  public:
    explicit FourBitPairs(const float numbers[16]) : table_(load(numbers)) {}
    static constexpr float center() { return kIsCodebook ? 0.0f : 8.0f; }
    void decode(Pairs w[2], const uint8_t* p, int unit) const {
        const __m256i* line = (const __m256i*)(p + unit / 2 * 64);
        __m256i low = _mm256_loadu_si256(line), high = _mm256_loadu_si256(line + 1);
        for (int half = 0; half < 2; ++half) {
            int shift = unit % 2 * 8 + half * 4;
            w[half] = {{number(low, shift), number(high, shift)}, {number(low, shift + 16), number(high, shift + 16)}};
        }
    }

  private:
    __m256 number(__m256i line, int shift) const {
        __m256i at = _mm256_srli_epi32(line, shift);
        if (!kIsCodebook) return _mm256_cvtepi32_ps(_mm256_and_si256(at, _mm256_set1_epi32(15)));
        __m256 is_upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));   // the fourth bit, as a sign
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table_.low, at), _mm256_permutevar8x32_ps(table_.high, at), is_upper);
    }

    Floats table_;
};
using Int4Pairs = FourBitPairs<false>;
using CodebookPairs = FourBitPairs<true>;
#endif

#if defined(__AVX512BF16__)
// Bytes are a sign and seven bits that a table of 128 makes a bf16 of, its two halves one after the other. A line is a unit.
//
// An int8 v is held as v + 1/2: all of them then have a negative.
class BytePairs : public PairSource {
  public:
    static constexpr int kBytes = 512;
    static BytePairs of_int8() {
        float numbers[128];
        for (int at = 0; at < 128; ++at) numbers[at] = (float)at + 0.5f;
        return BytePairs(numbers, 0.5f);
    }
    static BytePairs of_fp8() {
        float numbers[128];
        for (int at = 0; at < 128; ++at) {
            int exponent = at >> 3, mantissa = at & 7;
            float one = exponent ? (float)(8 + mantissa) : (float)mantissa;   // times 2^(exponent - 10), of at least 1 - 10
            for (int power = exponent ? exponent : 1; power < 10; ++power) one *= 0.5f;
            for (int power = 10; power < exponent; ++power) one *= 2.0f;
            numbers[at] = one;
        }
        return BytePairs(numbers, 0.0f);
    }
    float center() const { return center_; }
    uint8_t code(uint8_t value) const { return center_ != 0.0f && value & 0x80 ? value ^ 0x7f : value; }
    static void put(uint8_t* segment, int half, int column, int input, uint8_t code) {
        // What unpacks to words in order.
        int word = column * 2 + input % 2;
        segment[input / 2 * 64 + word / 8 * 16 + half * 8 + word % 8] = code;
    }
    void decode(Pairs w[2], const uint8_t* p, int unit) const {
        __m512i line = _mm512_loadu_si512(p + unit * 64);
        __m512i low = _mm512_permutex2var_epi8(low_[0], line, low_[1]), high = _mm512_permutex2var_epi8(high_[0], line, high_[1]);
        constexpr int kOrAnd = 0xf8;   // a | (b & c)
        high = _mm512_ternarylogic_epi32(high, line, _mm512_set1_epi8((char)0x80), kOrAnd);
        w[0] = {_mm512_unpacklo_epi8(low, high)};
        w[1] = {_mm512_unpackhi_epi8(low, high)};
    }

  private:
    BytePairs(const float (&numbers)[128], float center) : center_(center) {
        uint8_t low[128], high[128];
        for (int at = 0; at < 128; ++at) {
            uint32_t bits;
            memcpy(&bits, &numbers[at], sizeof bits);
            low[at] = (uint8_t)(bits >> 16), high[at] = (uint8_t)(bits >> 24);
        }
        for (int part = 0; part < 2; ++part)
            low_[part] = _mm512_loadu_si512(low + part * 64), high_[part] = _mm512_loadu_si512(high + part * 64);
    }

    __m512i low_[2], high_[2];
    float center_;
};
inline BytePairs int8_pairs() { return BytePairs::of_int8(); }
inline BytePairs fp8_pairs() { return BytePairs::of_fp8(); }
#else
// 16 outputs' even inputs, then their odd ones, of each half.
struct BytePlace {
    static constexpr int kBytes = 512;
    static void put(uint8_t* segment, int half, int column, int input, uint8_t code) {
        segment[input / 2 * 64 + half * 32 + input % 2 * 16 + column] = code;
    }
};

class Int8Pairs : public PairSource, public BytePlace {
  public:
    static constexpr float center() { return 0.0f; }
    uint8_t code(uint8_t value) const { return value; }
    void decode(Pairs w[2], const uint8_t* p, int unit) const {
        for (int half = 0; half < 2; ++half) {
            const __m128i* at = (const __m128i*)(p + unit * 64 + half * 32);
            w[half] = {numbers(_mm_loadu_si128(at)), numbers(_mm_loadu_si128(at + 1))};
        }
    }

  private:
    static Floats numbers(__m128i bytes) {
#if defined(__AVX512F__)
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
#else
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
#endif
    }
};

// e4m3 is a float16 with fewer bits behind the exponent, whose bias is 8 less.
class Fp8Pairs : public PairSource, public BytePlace {
  public:
    static constexpr float kFactor = 256.0f;
    static constexpr float center() { return 0.0f; }
    uint8_t code(uint8_t value) const { return value; }
    void decode(Pairs w[2], const uint8_t* p, int unit) const {
        for (int half = 0; half < 2; ++half) {
            const __m128i* at = (const __m128i*)(p + unit * 64 + half * 32);
            w[half] = {numbers(_mm_loadu_si128(at)), numbers(_mm_loadu_si128(at + 1))};
        }
    }

  private:
    static Floats numbers(__m128i bytes) {
        __m256i words = _mm256_cvtepi8_epi16(bytes);   // the sign in all upper bits
        __m256i halves = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(0x3f80)),
                                         _mm256_and_si256(words, _mm256_set1_epi16((int16_t)0x8000)));
#if defined(__AVX512F__)
        return {_mm512_cvtph_ps(halves)};
#else
        return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
#endif
    }
};
inline Int8Pairs int8_pairs() { return {}; }
inline Fp8Pairs fp8_pairs() { return {}; }
#endif

}  // namespace wavetrain
