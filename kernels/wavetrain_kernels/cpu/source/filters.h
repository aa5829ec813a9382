// SPDX-License-Identifier: Apache-2.0
// What looks for the largest of a row of logits: min_p, top_k and top_p, and the top log-probabilities. Nothing here sorts the vocabulary.
//
// All filters keep a logit if it is at least some threshold, so that equals of the last one kept are kept too. The k
// largest of a row are among those that reach the k-th largest of the maxima of its spans: few, as a rule.
#pragma once

#include <algorithm>
#include <functional>

#include "memory.h"
#include "sampling.h"

namespace wavetrain {

constexpr int64_t kSpan = 64;

inline int64_t num_spans(int64_t size) { return (size + kSpan - 1) / kSpan; }

// maxima [num_spans] of a row; returns the largest of all.
inline Largest span_maxima(float* maxima, const float* x, int64_t size) {
    Largest all = {-kInfinity, false};
    for (int64_t span = 0; span < num_spans(size); ++span) {
        Largest part = largest_of(x + span * kSpan, std::min(kSpan, size - span * kSpan));
        maxima[span] = part.value;
        all.value = std::max(all.value, part.value);
        all.has_nan |= part.has_nan;
    }
    return all;
}

// Calls `take` with the place of every x that is at least `lowest`, in order.
template <typename Take>
inline void for_each_at_least(const float* x, int64_t size, float lowest, Take take) {
    int64_t at = 0;
    for (; at + kLanes <= size; at += kLanes)
        for (uint32_t lanes = at_least(load(x + at), broadcast(lowest)); lanes; lanes &= lanes - 1) take(at + __builtin_ctz(lanes));
    for (; at < size; ++at)
        if (x[at] >= lowest) take(at);
}

// No more than the k-th largest of a row, and near it; k in [1, size]. Leaves the maxima in another order.
inline float near_kth_largest(float* maxima, int64_t size, int64_t k) {
    if (k * 2 > num_spans(size)) return -kInfinity;
    std::nth_element(maxima, maxima + k - 1, maxima + num_spans(size), std::greater<float>());
    return maxima[k - 1];
}

// The sums of exp((x - most)) over x >= cuts[i], for each of the cuts.
template <int kCuts>
inline void masses(double (&sums)[kCuts], const float* x, int64_t size, float most, const float (&cuts)[kCuts]) {
    constexpr int64_t kPart = 4096;  // summed in float32; the parts in double
    for (double& total : sums) total = 0.0;
    for (int64_t begin = 0; begin < size; begin += kPart) {
        int64_t end = std::min(size, begin + kPart);
        Floats parts[kCuts];
        for (Floats& part : parts) part = broadcast(0.0f);
        for (int64_t at = begin; at < end; at += kLanes) {
            float padded[kLanes];
            const float* from = x + at;
            if (end - at < kLanes) {
                for (int i = 0; i < kLanes; ++i) padded[i] = at + i < end ? x[at + i] : -kInfinity;
                from = padded;
            }
            Floats value = load(from), weight = exp(sub(value, broadcast(most)));
            for (int i = 0; i < kCuts; ++i)
                parts[i] = add(parts[i], where_less(value, broadcast(cuts[i]), broadcast(0.0f), weight));
        }
        for (int i = 0; i < kCuts; ++i) sums[i] += (double)sum(parts[i]);
    }
}

// The smallest value above which less than `target` of the weights lies. Values [count], not empty, end up in another order.
inline float last_kept(float* values, float* weights, int64_t count, double target) {
    float kept = values[0];
    double above = 0.0;
    for (int64_t begin = 0, end = count; begin < end;) {
        float low = std::min(values[begin], values[end - 1]), high = std::max(values[begin], values[end - 1]);
        float pivot = std::max(low, std::min(high, values[begin + (end - begin) / 2]));
        // Larger ones to the front, smaller ones to the back.
        int64_t larger = begin, at = begin, smaller = end;
        double larger_mass = 0.0, equal_mass = 0.0;
        auto swap = [&](int64_t a, int64_t b) {
            std::swap(values[a], values[b]);
            std::swap(weights[a], weights[b]);
        };
        while (at < smaller) {
            if (values[at] > pivot) {
                larger_mass += (double)weights[at];
                swap(at++, larger++);
            } else if (values[at] < pivot) {
                swap(at, --smaller);
            } else {
                equal_mass += (double)weights[at++];
            }
        }
        if (larger > begin && above + larger_mass >= target) {
            end = larger;
        } else {
            kept = pivot;
            above += larger_mass + equal_mass;
            if (above >= target) break;
            begin = smaller;
        }
    }
    return kept;
}

struct Filters {
    float* lowest;              // [num_rows], what a logit must reach once divided by the temperature
    const float* logits;        // [num_rows, size]
    const float* temperatures;  // [num_rows]; 0: nothing is excluded
    const int64_t* top_k;       // each [num_rows], or null
    const float *top_p, *min_p;
    int64_t stride, num_rows, size;
};

// What a row must reach: at least `lowest`, and the top_p of what does. `values` and `weights` are [size] of workspace.
inline float top_p_threshold(const float* x, int64_t size, float most, float lowest, float top_p, float* values, float* weights) {
    // Where the distribution has a peak, few tokens make up top_p: they are looked for among those near the largest.
    const float cuts[] = {lowest, std::max(lowest, most - 2.0f), std::max(lowest, most - 5.0f), std::max(lowest, most - 10.0f)};
    double sums[4];
    masses(sums, x, size, most, cuts);
    double target = (double)top_p * sums[0];
    float cut = sums[1] > target ? cuts[1] : sums[2] > target ? cuts[2] : sums[3] > target ? cuts[3] : cuts[0];
    int64_t count = 0;
    for_each_at_least(x, size, cut, [&](int64_t at) {
        if (x[at] > -kInfinity) values[count++] = x[at];
    });
    for (int64_t at = 0; at < count; at += kLanes) {
        int part = (int)std::min((int64_t)kLanes, count - at);
        store(weights + at, exp(sub(load(values + at, part), broadcast(most))), part);
    }
    return last_kept(values, weights, count, target);
}

inline float lowest_of_row(const Filters& op, int64_t row) {
    int64_t size = op.size, top_k = op.top_k ? op.top_k[row] : 0;
    float top_p = op.top_p ? op.top_p[row] : 1.0f, min_p = op.min_p ? op.min_p[row] : 0.0f, temperature = op.temperatures[row];
    bool has_top_k = top_k > 0 && top_k < size;
    if (temperature == 0.0f || (!has_top_k && !(top_p < 1.0f) && !(min_p > 0.0f))) return -kInfinity;
    const float* x = op.logits + row * op.stride;
    float* maxima = (float*)thread_memory().reserve((num_spans(size) + 3 * size) * (int64_t)sizeof(float));
    float *values = maxima + num_spans(size), *weights = values + size;
    if (temperature != 1.0f) {
        float* scaled = weights + size;
        for (int64_t i = 0; i < size; ++i) scaled[i] = x[i] / temperature;
        x = scaled;
    }
    Largest most = span_maxima(maxima, x, size);
    if (most.has_nan || !isfinite(most.value)) return -kInfinity;  // nothing can be drawn from this row
    float lowest = min_p > 0.0f ? most.value + logf(min_p) : -kInfinity;
    if (has_top_k) {
        int64_t count = 0;
        for_each_at_least(x, size, near_kth_largest(maxima, size, top_k), [&](int64_t at) { values[count++] = x[at]; });
        std::nth_element(values, values + top_k - 1, values + count, std::greater<float>());
        lowest = std::max(lowest, values[top_k - 1]);
    }
    if (top_p < 1.0f) lowest = std::max(lowest, top_p_threshold(x, size, most.value, lowest, top_p, values, weights));
    return lowest;
}

inline void filter_thresholds(const Filters& op) {
#pragma omp parallel if (is_worth_threads(op.num_rows * op.size))
    {
        Range rows = share(op.num_rows);
        for (int64_t row = rows.begin; row < rows.end; ++row) op.lowest[row] = lowest_of_row(op, row);
    }
}

struct TopLogprobs {
    int64_t* ids;            // [num_rows, 1 + k]
    float* logprobs;         // [num_rows, 1 + k]
    int64_t* ranks;          // [num_rows]
    const float* logits;     // [num_rows, size]
    const int64_t* token_ids;
    int64_t num_rows, size, k, stride;
};

// Sorts as the float does, and of equals the smaller index first, when the largest come first.
inline uint64_t sort_key(float value, int64_t index) {
    uint32_t bits;
    value += 0.0f;  // -0 is 0
    memcpy(&bits, &value, sizeof bits);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~(uint32_t)index;
}

// Log-probabilities of a row with NaN or without a finite largest logit: NaN, of whichever tokens.
inline void fill_invalid_row(const TopLogprobs& op, int64_t row) {
    for (int64_t i = 0; i <= op.k; ++i) {
        op.ids[row * (op.k + 1) + i] = i ? i - 1 : op.token_ids[row];
        op.logprobs[row * (op.k + 1) + i] = __builtin_nanf("");
    }
    op.ranks[row] = 1;
}

inline void top_logprobs_of_row(const TopLogprobs& op, int64_t row) {
    const float* x = op.logits + row * op.stride;
    uint64_t* found = (uint64_t*)thread_memory().reserve(op.size * (int64_t)sizeof(uint64_t) + num_spans(op.size) * (int64_t)sizeof(float));
    float* maxima = (float*)(found + op.size);
    Largest most = span_maxima(maxima, x, op.size);
    if (most.has_nan || !isfinite(most.value)) {
        fill_invalid_row(op, row);
        return;
    }
    double total[1];
    masses(total, x, op.size, most.value, {-kInfinity});
    float log_total = (float)log(total[0]);
    auto logprob = [&](int64_t index) { return x[index] - most.value - log_total; };
    int64_t *ids = op.ids + row * (op.k + 1), token_id = op.token_ids[row], num_reaching = 0, num_equal = 0;
    float* logprobs = op.logprobs + row * (op.k + 1);
    for_each_at_least(x, op.size, x[token_id], [&](int64_t at) {
        ++num_reaching;
        num_equal += x[at] == x[token_id];
    });
    op.ranks[row] = num_reaching - num_equal + 1;
    ids[0] = token_id;
    logprobs[0] = logprob(token_id);
    if (!op.k) return;
    int64_t count = 0;
    for_each_at_least(x, op.size, near_kth_largest(maxima, op.size, op.k), [&](int64_t at) { found[count++] = sort_key(x[at], at); });
    std::partial_sort(found, found + op.k, found + count, std::greater<uint64_t>());
    for (int64_t i = 0; i < op.k; ++i) {
        ids[1 + i] = (int64_t)(uint32_t)~(uint32_t)found[i];
        logprobs[1 + i] = logprob(ids[1 + i]);
    }
}

inline void top_logprobs(const TopLogprobs& op) {
#pragma omp parallel if (is_worth_threads(op.num_rows * op.size))
    {
        Range rows = share(op.num_rows);
        for (int64_t row = rows.begin; row < rows.end; ++row) top_logprobs_of_row(op, row);
    }
}

}  // namespace wavetrain
