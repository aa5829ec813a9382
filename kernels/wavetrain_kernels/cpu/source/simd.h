// SPDX-License-Identifier: Apache-2.0
// Sixteen floats as one value, on AVX-512 or AVX2. Every kernel is written over this width.
//
// bf16 is the upper half of a float32; rounding is to nearest, ties to even, and a NaN stays one.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace wavetrain {

using bf16 = uint16_t;

constexpr int kLanes = 16;

#if defined(__AVX512F__)

struct Floats {
    __m512 v;
};

inline __mmask16 first(int count) { return (__mmask16)(count >= 16 ? 0xffff : (1u << count) - 1); }

inline Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats load(const float* p, int count) { return {_mm512_maskz_loadu_ps(first(count), p)}; }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline void store(float* p, Floats x, int count) { _mm512_mask_storeu_ps(p, first(count), x.v); }
inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
// a * b + c
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The larger; the second where either is NaN.
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats round_to_int(Floats a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for integral n; 0 where that is too small.
inline Floats scale_by_power(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }
// x where a < b, else y; also y where either is NaN.
inline Floats where_less(Floats a, Floats b, Floats x, Floats y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
inline bool any_differs(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ) != 0; }
// Bit i: whether a is at least b in lane i; not where either is NaN.
inline uint32_t at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }

inline Floats widen(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
inline Floats load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }

inline __m256i narrow(Floats x) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(x.v);
#else
    __m512i bits = _mm512_castps_si512(x.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 is_nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
#endif
}
inline void store(bf16* p, Floats x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }

// (even, odd) of each lane as a pair of bf16.
inline __m512i narrow_pairs(Floats even, Floats odd) {
#if defined(__AVX512BF16__)
    alignas(64) static const uint16_t kOrder[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v));
#else
    return _mm512_or_si512(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(odd)), 16), _mm512_cvtepu16_epi32(narrow(even)));
#endif
}

// Rows become columns, of 16 x 16 values of 32 bits.
inline void transpose(__m512i rows[16]) {
    __m512i pairs[16], quads[16], halves[16];
    for (int i = 0; i < 8; ++i) {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) {
            quads[4 * i + 2 * j] = _mm512_unpacklo_epi64(pairs[4 * i + j], pairs[4 * i + 2 + j]);
            quads[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[4 * i + j], pairs[4 * i + 2 + j]);
        }
    for (int i = 0; i < 4; ++i) {
        halves[i] = _mm512_shuffle_i32x4(quads[i], quads[4 + i], 0x88);
        halves[4 + i] = _mm512_shuffle_i32x4(quads[i], quads[4 + i], 0xdd);
        halves[8 + i] = _mm512_shuffle_i32x4(quads[8 + i], quads[12 + i], 0x88);
        halves[12 + i] = _mm512_shuffle_i32x4(quads[8 + i], quads[12 + i], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        rows[i] = _mm512_shuffle_i32x4(halves[i], halves[8 + i], 0x88);
        rows[8 + i] = _mm512_shuffle_i32x4(halves[i], halves[8 + i], 0xdd);
    }
}

// 32 values, `low` before `high`.
inline void store_pair(bf16* p, Floats low, Floats high) {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
#else
    store(p, low);
    store(p + kLanes, high);
#endif
}

// 1 / x, relative error below 3e-7: a division of this width takes eight times as long.
inline Floats reciprocal(Floats x) {
    __m512 y = _mm512_rcp14_ps(x.v);
    // The last step would make NaN of the reciprocals of 0 and infinity.
    __m512 better = _mm512_fmadd_ps(_mm512_fnmadd_ps(x.v, y, _mm512_set1_ps(1.0f)), y, y);
    return {_mm512_mask_mov_ps(better, _mm512_fpclass_ps_mask(y, 0x1e), y)};
}

#else  // AVX2: two halves

struct Floats {
    __m256 low, high;
};

inline Floats broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats load(const float* p, int count) {
    float whole[kLanes] = {};
    memcpy(whole, p, (size_t)(count < kLanes ? count : kLanes) * sizeof(float));
    return load(whole);
}
inline void store(float* p, Floats x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}
inline void store(float* p, Floats x, int count) {
    float whole[kLanes];
    store(whole, x);
    memcpy(p, whole, (size_t)(count < kLanes ? count : kLanes) * sizeof(float));
}
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats round_to_int(Floats a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.low, mode), _mm256_round_ps(a.high, mode)};
}
inline __m256 scale_half(__m256 a, __m256 n) {
    // Below the normal numbers the result is 0; 2^n is made from its exponent bits, in two steps so that n <= 128 fits.
    __m256 is_normal = _mm256_cmp_ps(n, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
    __m256i half = _mm256_srai_epi32(_mm256_cvtps_epi32(n), 1);
    __m256i rest = _mm256_sub_epi32(_mm256_cvtps_epi32(n), half);
    __m256i bias = _mm256_set1_epi32(127);
    __m256 first_power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    __m256 second_power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
    return _mm256_and_ps(_mm256_mul_ps(_mm256_mul_ps(a, first_power), second_power), is_normal);
}
inline Floats scale_by_power(Floats a, Floats n) { return {scale_half(a.low, n.low), scale_half(a.high, n.high)}; }
inline float sum(Floats a) {
    __m256 both = _mm256_add_ps(a.low, a.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(Floats a) {
    __m256 both = _mm256_max_ps(a.low, a.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline Floats where_less(Floats a, Floats b, Floats x, Floats y) {
    return {_mm256_blendv_ps(y.low, x.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
            _mm256_blendv_ps(y.high, x.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
}
inline bool any_differs(Floats a, Floats b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, _CMP_NEQ_UQ)) |
           _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, _CMP_NEQ_UQ));
}
inline uint32_t at_least(Floats a, Floats b) {
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ)) |
           (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ)) << 8;
}

inline __m256 widen_half(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline Floats load(const bf16* p) {
    return {widen_half(_mm_loadu_si128((const __m128i*)p)), widen_half(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline __m256i rounded_half(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
}
inline void store(bf16* p, Floats x) {
    __m256i packed = _mm256_packus_epi32(rounded_half(x.low), rounded_half(x.high));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}

#endif

#if !defined(__AVX512F__)
inline void store_pair(bf16* p, Floats low, Floats high) {
    store(p, low);
    store(p + kLanes, high);
}
inline Floats reciprocal(Floats x) { return div(broadcast(1.0f), x); }
#endif

inline Floats load(const bf16* p, int count) {
    bf16 whole[kLanes] = {};
    memcpy(whole, p, (size_t)(count < kLanes ? count : kLanes) * sizeof(bf16));
    return load(whole);
}

inline void store(bf16* p, Floats x, int count) {
    bf16 whole[kLanes];
    store(whole, x);
    memcpy(p, whole, (size_t)(count < kLanes ? count : kLanes) * sizeof(bf16));
}

// x as an element of type T holds it.
template <typename T>
inline Floats rounded(Floats x) {
    return x;
}
#if defined(__AVX512F__)
template <>
inline Floats rounded<bf16>(Floats x) {
    return widen(narrow(x));
}
#else
template <>
inline Floats rounded<bf16>(Floats x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(rounded_half(x.low), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(rounded_half(x.high), 16))};
}
#endif

// 2^(n + f) for integral n and f in [-1/2, 1/2].
inline Floats exp2_of(Floats n, Floats f) {
    // Taylor coefficients ln(2)^k / k!: the seventh term is below 2e-8.
    Floats p = broadcast(1.5403530393381609e-4f);
    p = fma(p, f, broadcast(1.3333558146428443e-3f));
    p = fma(p, f, broadcast(9.6181291076284772e-3f));
    p = fma(p, f, broadcast(5.5504108664821580e-2f));
    p = fma(p, f, broadcast(2.4022650695910072e-1f));
    p = fma(p, f, broadcast(6.9314718055994531e-1f));
    p = fma(p, f, broadcast(1.0f));
    // Too small for a normal number, a result would cost the processor a hundred cycles and more for each vector:
    // attention over 2,000 keys took eight times as long where masked scores came to that.
    Floats lowest = broadcast(-126.0f);
    return where_less(n, lowest, broadcast(0.0f), scale_by_power(p, max(lowest, n)));
}

// 2^x, relative error below 2e-7; 0 below -126; NaN stays NaN.
inline Floats exp2(Floats x) {
    x = max(broadcast(-200.0f), min(broadcast(128.0f), x));
    Floats n = round_to_int(x);
    return exp2_of(n, sub(x, n));
}

// 2^x for x <= 0 (or a little above, by rounding), relative error below 4e-6: for sums whose terms are rounded to bf16.
inline Floats exp2_down(Floats x) {
    Floats n = round_to_int(x), f = sub(x, n);
    // Minimax on [-1/2, 1/2].
    Floats p = broadcast(9.5828529e-3f);
    p = fma(p, f, broadcast(5.5906426e-2f));
    p = fma(p, f, broadcast(2.4024099e-1f));
    p = fma(p, f, broadcast(6.9312418e-1f));
    p = fma(p, f, broadcast(1.0f));
#if defined(__AVX512F__)
    __mmask16 is_normal = _mm512_cmp_ps_mask(n.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return {_mm512_maskz_scalef_ps(is_normal, p.v, n.v)};
#else
    return scale_by_power(p, n);
#endif
}

constexpr float kLog2e = 1.4426950408889634f;

// e^x, relative error below 3e-7; 0 below -87, infinity above 89; NaN stays NaN.
inline Floats exp(Floats x) {
    x = max(broadcast(-130.0f), min(broadcast(89.0f), x));
    Floats n = round_to_int(mul(x, broadcast(kLog2e)));
    // The product in two parts: its rounding error would be one of the exponent.
    Floats f = fma(x, broadcast(1.925963e-8f), fma(x, broadcast(kLog2e), sub(broadcast(0.0f), n)));
    return exp2_of(n, f);
}

// 1 - 2 / (exp(2x) + 1): exact at both ends, absolute error below 2e-7.
inline Floats tanh(Floats x) {
    Floats e = exp2(mul(x, broadcast(2.0f * kLog2e)));
    return sub(broadcast(1.0f), div(broadcast(2.0f), add(e, broadcast(1.0f))));
}

inline Floats silu(Floats x) { return mul(x, reciprocal(add(broadcast(1.0f), exp2(mul(x, broadcast(-kLog2e)))))); }

// The tanh approximation (Hendrycks and Gimpel 2016).
inline Floats gelu_tanh(Floats x) {
    Floats cubic = fma(mul(mul(x, x), x), broadcast(0.044715f), x);
    Floats t = tanh(mul(cubic, broadcast(0.7978845608028654f)));
    return mul(mul(broadcast(0.5f), x), add(broadcast(1.0f), t));
}

}  // namespace wavetrain
