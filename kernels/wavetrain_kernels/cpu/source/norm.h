// SPDX-License-Identifier: Apache-2.0
// Root-mean-square normalization, alone or with the residual addition before it; T is bf16 or float.
//
// A row is summed in one order whatever its neighbours are. The normalized row is rounded to T before the product with the
// weight, as Llama has it; with a weight offset (Gemma) the product is taken in float32.
#pragma once

#include <math.h>

#include "program.h"
#include "simd.h"
#include "threads.h"

namespace wavetrain {

template <typename T>
struct Norm {
    T* out;              // [outer * inner, size], contiguous
    T* residual_out;     // likewise: x + residual; null: there is no residual
    const T* x;          // row (i, j) begins at i * outer_stride + j * inner_stride
    const T* residual;   // contiguous
    const T* weight;     // [size]
    int64_t outer, inner, outer_stride, inner_stride, size;
    float eps, weight_offset;

    void bind(const Step& step, int64_t) { outer = step.num_tokens; }
    int64_t num_tokens() const { return outer; }
    bool is_large() const { return is_worth_threads(outer * inner * size); }
};

// The sum of squares of a row; with a residual, of x + residual, which it stores.
template <typename T>
inline float sum_of_squares(const T* x, const T* residual, T* total, int64_t size) {
    constexpr int kChains = 4;
    Floats sums[kChains];
    for (Floats& chain : sums) chain = broadcast(0.0f);
    auto value_at = [&](int64_t at, int count) {
        Floats value = count == kLanes ? load(x + at) : load(x + at, count);
        if (!residual) return value;
        value = rounded<T>(add(value, count == kLanes ? load(residual + at) : load(residual + at, count)));
        if (count == kLanes) store(total + at, value);
        else store(total + at, value, count);
        return value;
    };
    int64_t at = 0;
    for (; at + kChains * kLanes <= size; at += kChains * kLanes)
        for (int chain = 0; chain < kChains; ++chain) {
            Floats value = value_at(at + chain * kLanes, kLanes);
            sums[chain] = fma(value, value, sums[chain]);
        }
    for (; at < size; at += kLanes) {
        Floats value = value_at(at, (int)(size - at < kLanes ? size - at : kLanes));
        sums[0] = fma(value, value, sums[0]);
    }
    return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

template <typename T>
inline void normalize_row(T* out, const T* x, const T* residual, T* total, const Norm<T>& op) {
    Floats scale = broadcast(1.0f / sqrtf(sum_of_squares(x, residual, total, op.size) / (float)op.size + op.eps));
    Floats offset = broadcast(op.weight_offset);
    const T* from = residual ? total : x;
    bool has_offset = op.weight_offset != 0.0f;
    int64_t at = 0;
    for (; at + kLanes <= op.size; at += kLanes) {
        Floats value = mul(load(from + at), scale), weight = load(op.weight + at);
        store(out + at, has_offset ? mul(value, add(weight, offset)) : mul(rounded<T>(value), weight));
    }
    if (at < op.size) {
        int count = (int)(op.size - at);
        Floats value = mul(load(from + at, count), scale), weight = load(op.weight + at, count);
        store(out + at, has_offset ? mul(value, add(weight, offset)) : mul(rounded<T>(value), weight), count);
    }
}

template <typename T>
inline void run(const Norm<T>& op) {
    Range rows = share(op.outer * op.inner);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const T* x = op.x + row / op.inner * op.outer_stride + row % op.inner * op.inner_stride;
        int64_t at = row * op.size;
        if (op.residual_out) normalize_row(op.out + at, x, op.residual + at, op.residual_out + at, op);
        else normalize_row<T>(op.out + at, x, nullptr, nullptr, op);
    }
}

}  // namespace wavetrain
