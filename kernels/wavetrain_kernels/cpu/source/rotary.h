// SPDX-License-Identifier: Apache-2.0
// Rotary embedding, half-split, of a step's queries and keys, the keys and values going straight into the paged cache.
//
// T is the type of queries, keys, values and caches that are not quantized, C that of the table. The sums are taken in the wider of the two: where both are
// bf16, each product is rounded, as PyTorch has it.
#pragma once

#include "kv_cache.h"
#include "norm.h"
#include "program.h"
#include "simd.h"
#include "threads.h"

namespace wavetrain {

// Rows of `heads` vectors each, where token and head need not lie side by side.
template <typename T>
struct Heads {
    T* start;
    int64_t token_stride, head_stride, num_heads;

    T* at(int64_t token, int64_t head) const { return start + token * token_stride + head * head_stride; }
};

template <typename T, typename C>
struct Rotation {
    T* out;  // [count, query heads, size], contiguous: the rotated queries
    Heads<const T> query, key, value;
    const int64_t* positions;
    const C* table;        // [max_position, 2, half]: cosines, then sines
    void *key_cache, *value_cache;       // [num_blocks, heads, block_size, size]: T, or codes of one byte
    bf16 *key_scales, *value_scales;     // [num_blocks, heads, block_size] of codes
    Codes codes;
    const int64_t* slots;  // -1: the token's key and value are not stored
    const T *query_norm, *key_norm;  // [size], by which heads are normalized before they are rotated; null: they are not
    int64_t count, size, half, block_size;   // count: tokens
    float eps;

    void bind(const Step& step, int64_t) { positions = step.positions, slots = step.slots, count = step.num_tokens; }
    int64_t num_tokens() const { return count; }
    bool is_large() const { return is_worth_threads(count * (query.num_heads + 2 * key.num_heads) * size); }
};

template <typename T, typename C>
struct WiderOf {
    using type = float;
};
template <>
struct WiderOf<bf16, bf16> {
    using type = bf16;
};

// Rotates the first 2 * half of `size` elements and copies the others; out may be x.
template <typename T, typename C>
inline void rotate_head(T* out, const T* x, const C* cosines, const C* sines, int64_t half, int64_t size) {
    using Wide = typename WiderOf<T, C>::type;
    auto product = [](Floats a, Floats b) { return rounded<Wide>(mul(a, b)); };
    int64_t at = 0;
    for (; at + kLanes <= half; at += kLanes) {
        Floats first = load(x + at), second = load(x + half + at), cosine = load(cosines + at), sine = load(sines + at);
        store(out + at, sub(product(first, cosine), product(second, sine)));
        store(out + half + at, add(product(second, cosine), product(first, sine)));
    }
    if (at < half) {
        int count = (int)(half - at);
        Floats first = load(x + at, count), second = load(x + half + at, count);
        Floats cosine = load(cosines + at, count), sine = load(sines + at, count);
        store(out + at, sub(product(first, cosine), product(second, sine)), count);
        store(out + half + at, add(product(second, cosine), product(first, sine)), count);
    }
    if (out != x) memcpy(out + 2 * half, x + 2 * half, (size_t)(size - 2 * half) * sizeof(T));
}

// The same after the norm, where there is one: what it makes is rounded and put in place, and rotated there.
template <typename T, typename C>
inline void norm_and_rotate_head(T* out, const T* x, const T* norm, const C* cosines, const C* sines, const Rotation<T, C>& op) {
    if (norm) {
        Norm<T> row{};
        row.weight = norm, row.size = op.size, row.eps = op.eps;
        normalize_row<T>(out, x, nullptr, nullptr, row);
        x = out;
    }
    rotate_head(out, x, cosines, sines, op.half, op.size);
}

template <typename T, typename C>
inline void rotate_token(const Rotation<T, C>& op, int64_t token) {
    const C* cosines = op.table + op.positions[token] * 2 * op.half;
    const C* sines = cosines + op.half;
    T* out = op.out + token * op.query.num_heads * op.size;
    for (int64_t head = 0; head < op.query.num_heads; ++head)
        norm_and_rotate_head(out + head * op.size, op.query.at(token, head), op.query_norm, cosines, sines, op);
    int64_t slot = op.slots[token];
    if (slot < 0) return;
    for (int64_t head = 0; head < op.key.num_heads; ++head) {
        int64_t row = (slot / op.block_size * op.key.num_heads + head) * op.block_size + slot % op.block_size;
        if (op.codes == Codes::kNone) {
            norm_and_rotate_head((T*)op.key_cache + row * op.size, op.key.at(token, head), op.key_norm, cosines, sines, op);
            memcpy((T*)op.value_cache + row * op.size, op.value.at(token, head), (size_t)op.size * sizeof(T));
        } else {
            T key[kMostQuantized];
            norm_and_rotate_head(key, op.key.at(token, head), op.key_norm, cosines, sines, op);
            op.key_scales[row] = quantize_head((uint8_t*)op.key_cache + row * op.size, key, op.size, op.codes);
            const T* value = op.value.at(token, head);
            op.value_scales[row] = quantize_head((uint8_t*)op.value_cache + row * op.size, value, op.size, op.codes);
        }
    }
}

template <typename T, typename C>
inline void run(const Rotation<T, C>& op) {
    Range tokens = share(op.count);
    for (int64_t token = tokens.begin; token < tokens.end; ++token) rotate_token(op, token);
}

}  // namespace wavetrain
