// SPDX-License-Identifier: Apache-2.0
// Heads of a quantized KV cache: codes of 8 bits times a bf16 scale. wavetrain_kernels/kv_cache.py says what they mean, and
// wavetrain_kernels/reference/kv_cache.py how a head is rounded to them; here it is done to the same bits.
#pragma once

#include "simd.h"

namespace wavetrain {

// What a cache holds; wavetrain_kernels/cpu/kv_cache.py has the same numbers.
enum class Codes : int { kNone, kInt8, kE4m3 };

constexpr int64_t kMostQuantized = 1024;   // elements of a head that is written as codes
constexpr int kCodesAtOnce = 32;

#if defined(__AVX512BW__)

// 32 codes as bf16, exactly.
template <Codes kCodes>
inline __m512i widened(__m256i codes) {
    if (kCodes == Codes::kInt8) {
        __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
        __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
#if defined(__AVX512BF16__)
        return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
        __m256i first = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(low), 16));
        __m256i second = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(high), 16));
        return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
#endif
    }
    // A normal number's exponent and mantissa keep their bits, the bias grows from 7 to 127; multiples of 2^-9 are looked up.
    alignas(64) static const uint16_t kSubnormal[32] = {
        0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60,
        0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
    __m512i wide = _mm512_cvtepu8_epi16(codes), magnitude = _mm512_and_si512(wide, _mm512_set1_epi16(0x7f));
    __mmask32 is_subnormal = _mm512_cmplt_epi16_mask(magnitude, _mm512_set1_epi16(8));
    __m512i bits = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    bits = _mm512_mask_permutexvar_epi16(bits, is_subnormal, wide, _mm512_load_si512(kSubnormal));
    __m512i sign = _mm512_slli_epi16(_mm512_sub_epi16(wide, magnitude), 8);
    return _mm512_or_si512(bits, sign);
}

// 32 elements of a row as bf16, which they are where there are no codes.
template <Codes kCodes>
inline __m512i load_row(const void* row) {
    return kCodes == Codes::kNone ? _mm512_loadu_si512(row) : widened<kCodes>(_mm256_loadu_si256((const __m256i*)row));
}

template <Codes kCodes>
inline void widen_some(bf16* to, const uint8_t* codes) {
    _mm512_storeu_si512(to, load_row<kCodes>(codes));
}

#else

template <Codes kCodes>
inline __m256i widened_half(__m128i codes) {
    if (kCodes == Codes::kInt8) {
        __m256i low = _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)));
        __m256i high = _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8))));
        __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(low, 16), _mm256_srli_epi32(high, 16));
        return _mm256_permute4x64_epi64(packed, 0xd8);
    }
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    __m256i wide = _mm256_cvtepu8_epi16(codes), magnitude = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
    __m256i bits = _mm256_add_epi16(_mm256_slli_epi16(magnitude, 4), _mm256_set1_epi16(120 << 7));
    // Bytes 2m and 2m + 1 of the table; where the number is none of it, of no matter.
    __m256i places = _mm256_add_epi16(_mm256_mullo_epi16(magnitude, _mm256_set1_epi16(0x0202)), _mm256_set1_epi16(0x0100));
    __m256i is_subnormal = _mm256_cmpgt_epi16(_mm256_set1_epi16(8), magnitude);
    bits = _mm256_blendv_epi8(bits, _mm256_shuffle_epi8(table, places), is_subnormal);
    return _mm256_or_si256(bits, _mm256_slli_epi16(_mm256_sub_epi16(wide, magnitude), 8));
}

template <Codes kCodes>
inline void widen_some(bf16* to, const uint8_t* codes) {
    for (int i = 0; i < kCodesAtOnce; i += 16)
        _mm256_storeu_si256((__m256i*)(to + i), widened_half<kCodes>(_mm_loadu_si128((const __m128i*)(codes + i))));
}

// 32 elements of a row as bf16, which they are where there are no codes.
template <Codes kCodes>
inline void load_row(bf16* to, const void* row) {
    if (kCodes == Codes::kNone) memcpy(to, row, kCodesAtOnce * sizeof(bf16));
    else widen_some<kCodes>(to, (const uint8_t*)row);
}

#endif

// `size` codes as bf16, and zeros up to a multiple of 32 of them.
template <Codes kCodes>
inline void widen_row(bf16* to, const uint8_t* codes, int64_t size) {
    int64_t at = 0;
    for (; at + kCodesAtOnce <= size; at += kCodesAtOnce) widen_some<kCodes>(to + at, codes + at);
    if (at == size) return;
    uint8_t rest[kCodesAtOnce] = {};
    memcpy(rest, codes + at, (size_t)(size - at));
    widen_some<kCodes>(to + at, rest);
}

// 16 numbers of at most 448, rounded to e4m3.
inline void round_to_e4m3(uint8_t* codes, const float* numbers) {
    constexpr float kLeastNormal = 0.015625f, kSubnormalShift = 16384.0f;   // 2^-6; 2^14, whose last bit is worth 2^-9
    constexpr uint32_t kShiftBits = (127 + 14) << 23;
    float magnitudes[kLanes], shifted[kLanes];
    uint32_t bits[kLanes], subnormal[kLanes], signs[kLanes];
    memcpy(signs, numbers, sizeof signs);
    for (int i = 0; i < kLanes; ++i) magnitudes[i] = __builtin_fabsf(numbers[i]);
    for (int i = 0; i < kLanes; ++i) shifted[i] = magnitudes[i] + kSubnormalShift;
    memcpy(bits, magnitudes, sizeof bits);
    memcpy(subnormal, shifted, sizeof subnormal);
    for (int i = 0; i < kLanes; ++i) {
        uint32_t normal = ((bits[i] + 0x7ffff + ((bits[i] >> 20) & 1)) >> 20) - ((127 - 7) << 3);
        uint32_t code = magnitudes[i] < kLeastNormal ? subnormal[i] - kShiftBits : normal;
        codes[i] = (uint8_t)(code | ((signs[i] >> 24) & 0x80));
    }
}

// codes = a head of `size` elements; returns their scale. NaN, and codes of zero, where an element is not finite.
template <typename T>
inline bf16 quantize_head(uint8_t* codes, const T* head, int64_t size, Codes kind) {
    constexpr float kSmallestScale = 7.888609052210118e-31f;   // 2^-100
    Floats zero = broadcast(0.0f), best = zero, poison = zero;
    for (int64_t at = 0; at < size; at += kLanes) {
        Floats x = size - at >= kLanes ? load(head + at) : load(head + at, (int)(size - at));
        best = max(max(x, sub(zero, x)), best);
        poison = fma(x, zero, poison);
    }
    float not_finite = sum(poison);
    if (not_finite != not_finite) {
        memset(codes, 0, (size_t)size);
        return 0x7fc0;
    }
    float largest_code = kind == Codes::kInt8 ? 127.0f : 448.0f;
    float scale = largest(best) * (float)(1.0 / largest_code);
    if (scale < kSmallestScale) scale = kSmallestScale;
    uint32_t bits;
    memcpy(&bits, &scale, sizeof bits);
    bits = (bits + 0xffff) & 0xffff0000;   // rounded up
    memcpy(&scale, &bits, sizeof bits);
    Floats inverse = broadcast(1.0f / scale);
    for (int64_t at = 0; at < size; at += kLanes) {
        Floats x = size - at >= kLanes ? load(head + at) : load(head + at, (int)(size - at));
        float numbers[kLanes];
        uint8_t some[kLanes];
        if (kind == Codes::kInt8) {
            store(numbers, round_to_int(mul(x, inverse)));
            for (int i = 0; i < kLanes; ++i) some[i] = (uint8_t)(int8_t)(int32_t)numbers[i];
        } else {
            store(numbers, mul(x, inverse));
            round_to_e4m3(some, numbers);
        }
        memcpy(codes + at, some, (size_t)(size - at < kLanes ? size - at : kLanes));
    }
    return (bf16)(bits >> 16);
}

}  // namespace wavetrain
