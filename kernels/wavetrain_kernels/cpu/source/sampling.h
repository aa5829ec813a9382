// SPDX-License-Identifier: Apache-2.0
// From float32 logits [rows, size] to tokens: the likeliest one, penalties, the seeded draw. Filters are in filters.h.
//
// A row's result depends on that row alone, also where its vocabulary is divided between threads.
#pragma once

#include <math.h>

#include "simd.h"
#include "threads.h"

namespace wavetrain {

constexpr float kInfinity = __builtin_inff();

struct Best {
    float value;
    int64_t index;
};

// NaN counts as largest; of equals the first is the best.
inline bool is_better(Best a, Best b) {
    bool a_is_nan = isnan(a.value), b_is_nan = isnan(b.value);
    if (a_is_nan != b_is_nan) return a_is_nan;
    if (!a_is_nan && a.value != b.value) return a.value > b.value;
    return a.index < b.index;
}

struct Largest {
    float value;  // -infinity where there is nothing but NaN
    bool has_nan;
};

inline Largest largest_of(const float* x, int64_t size) {
    constexpr int kChains = 4;
    Floats most[kChains];
    for (Floats& chain : most) chain = broadcast(-kInfinity);
    bool has_nan = false;
    int64_t at = 0;
    for (; at + kChains * kLanes <= size; at += kChains * kLanes)
        for (int chain = 0; chain < kChains; ++chain) {
            Floats values = load(x + at + chain * kLanes);
            has_nan |= any_differs(values, values);
            most[chain] = max(values, most[chain]);
        }
    float value = largest(max(max(most[0], most[1]), max(most[2], most[3])));
    for (; at < size; ++at) {
        has_nan |= isnan(x[at]);
        if (x[at] > value) value = x[at];
    }
    return {value, has_nan};
}

// Of at least one value.
inline Best best_of(const float* x, int64_t size) {
    constexpr int64_t kBlock = 1024;
    Best best = {-kInfinity, 0};
    int64_t start = 0, stop = size < kBlock ? size : kBlock;  // where the best is looked for in the end
    for (int64_t begin = 0; begin < size; begin += kBlock) {
        int64_t end = size - begin < kBlock ? size : begin + kBlock;
        Largest block = largest_of(x + begin, end - begin);
        if (block.has_nan) {
            while (!isnan(x[begin])) ++begin;
            return {x[begin], begin};
        }
        if (block.value > best.value) {
            best.value = block.value;
            start = begin;
            stop = end;
        }
    }
    for (best.index = start; best.index < stop - 1 && x[best.index] != best.value;) ++best.index;
    return best;
}

inline void sample_greedy(int64_t* token_ids, float* best, const float* logits, int64_t stride, int64_t num_rows, int64_t size) {
    for (int64_t row = 0; row < num_rows; ++row) {
        token_ids[row] = size;
        best[row] = -kInfinity;
    }
#pragma omp parallel if (is_worth_threads(num_rows * size))
    {
        // Of all logits in a row of rows: a thread may begin and end within one.
        Range logit = share(num_rows * size);
        for (int64_t at = logit.begin; at < logit.end;) {
            int64_t row = at / size, column = at % size;
            int64_t count = size - column < logit.end - at ? size - column : logit.end - at;
            Best found = best_of(logits + row * stride + column, count);
            found.index += column;
#pragma omp critical(wavetrain_greedy)
            if (is_better(found, {best[row], token_ids[row]})) {
                best[row] = found.value;
                token_ids[row] = found.index;
            }
            at += count;
        }
    }
}

struct Penalties {
    float* logits;             // [num_rows, size]
    const int64_t* token_ids;  // [num_rows, count]; where an id occurs again it has the same output count
    const int32_t* output_counts;
    const float *repetition, *presence, *frequency;
    float* workspace;          // [num_rows, count]
    int64_t num_rows, size, count;
};

inline void apply_penalties(const Penalties& op) {
#pragma omp parallel if (is_worth_threads(op.num_rows * op.count))
    {
        Range rows = share(op.num_rows);
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            float* logits = op.logits + row * op.size;
            const int64_t* token_ids = op.token_ids + row * op.count;
            const int32_t* output_counts = op.output_counts + row * op.count;
            float* penalized = op.workspace + row * op.count;
            // All are read before any is written, as an id may occur twice.
            for (int64_t i = 0; i < op.count; ++i) {
                float logit = logits[token_ids[i]];
                logit = logit > 0.0f ? logit / op.repetition[row] : logit * op.repetition[row];
                float presence = output_counts[i] > 0 ? op.presence[row] : 0.0f;
                penalized[i] = logit - (presence + op.frequency[row] * (float)output_counts[i]);
            }
            for (int64_t i = 0; i < op.count; ++i) logits[token_ids[i]] = penalized[i];
        }
    }
}

// The generator and the draw of reference/gumbel.py, in other words: the largest log p + g, with g = -log(-log u), is where
// -log(u) / p is smallest. That takes one logarithm instead of three, and as -log(u) >= 1 - u, seldom even one.
constexpr int64_t kGroup = 128;

inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// The place of the smallest -log(u) / p among `count` weights p, whose counters go up or down by one; 0 where no weight is positive.
inline int64_t draw(const float* weights, int64_t count, uint64_t key, uint64_t first_counter, uint64_t counter_step) {
    double smallest = (double)kInfinity;
    int64_t chosen = 0;
    for (int64_t begin = 0; begin < count; begin += kGroup) {
        int64_t part = count - begin < kGroup ? count - begin : kGroup;
        double uniform[kGroup];
        for (int64_t i = 0; i < part; ++i) {
            uint64_t counter = first_counter + (uint64_t)(begin + i) * counter_step;
            uniform[i] = ((double)(int64_t)(mix(key + (counter + 1) * 0x9E3779B97F4A7C15u) >> 12) + 0.5) * 0x1p-52;
        }
        for (int64_t i = 0; i < part; ++i) {
            double weight = weights[begin + i];
            if (!(weight > 0.0) || 1.0 - uniform[i] >= smallest * weight) continue;
            double candidate = -log(uniform[i]) / weight;
            if (candidate < smallest) {
                smallest = candidate;
                chosen = begin + i;
            }
        }
    }
    return chosen;
}

// exp((x - most) / temperature) of a group, which may be short; 0 for what is below `lowest` once divided, and for all where
// the temperature is 0. Returns the largest x of the group; NaN if there is one.
inline float weigh_group(Floats (&weights)[kGroup / kLanes], const float* x, int64_t count, float temperature, float lowest) {
    float padded[kGroup];
    if (count < kGroup) {
        for (int64_t i = 0; i < kGroup; ++i) padded[i] = i < count ? x[i] : -kInfinity;
        x = padded;
    }
    Floats most = broadcast(-kInfinity);
    bool has_nan = false;
    for (int i = 0; i < kGroup / kLanes; ++i) {
        Floats values = load(x + i * kLanes);
        has_nan |= any_differs(values, values);
        most = max(values, most);
    }
    float raw = largest(most), value = raw / temperature;  // also the largest of the divided: a larger x is never divided to less
    bool is_empty = temperature == 0.0f || has_nan || value == -kInfinity || value < lowest;
    for (int i = 0; i < kGroup / kLanes; ++i) {
        if (is_empty) {
            weights[i] = broadcast(0.0f);
            continue;
        }
        Floats scaled = load(x + i * kLanes);
        if (temperature != 1.0f) scaled = div(scaled, broadcast(temperature));
        scaled = where_less(scaled, broadcast(lowest), broadcast(-kInfinity), scaled);
        weights[i] = exp(sub(scaled, broadcast(value)));
    }
    return has_nan ? __builtin_nanf("") : raw;
}

struct Sample {
    int64_t* token_ids;
    float* best;               // the largest logit of each row; NaN counts as largest
    const float* logits;       // [num_rows, size]
    const int64_t *seeds, *positions;
    const float* temperatures; // 0: the likeliest token
    const float* lowest;       // what a logit must reach, divided by the temperature; null: any will do
    float* workspace;          // [num_rows, 2, groups]
    int64_t stride, num_rows, size;

    int64_t num_groups() const { return (size + kGroup - 1) / kGroup; }
    int64_t count(int64_t group) const { return size - group * kGroup < kGroup ? size - group * kGroup : kGroup; }
};

inline float weigh(const Sample& op, Floats (&weights)[kGroup / kLanes], int64_t row, int64_t group) {
    float lowest = op.lowest ? op.lowest[row] : -kInfinity;
    return weigh_group(weights, op.logits + row * op.stride + group * kGroup, op.count(group), op.temperatures[row], lowest);
}

// The first of a row's largest logits, of which the group maxima are known.
inline Best likeliest(const Sample& op, int64_t row, const float* most) {
    Best best = {most[0], 0};
    for (int64_t group = 1; group < op.num_groups(); ++group)
        if (is_better({most[group], group}, best)) best = {most[group], group};
    const float* x = op.logits + row * op.stride;
    bool is_nan = isnan(best.value);
    for (best.index *= kGroup; is_nan ? !isnan(x[best.index]) : x[best.index] != best.value;) ++best.index;
    return best;
}

inline int64_t draw_token(const Sample& op, int64_t row) {
    uint64_t key = mix(mix((uint64_t)op.seeds[row]) + (uint64_t)op.positions[row]);
    int64_t num_groups = op.num_groups();
    float *sums = op.workspace + row * 2 * num_groups, *most = sums + num_groups;
    Floats temperature = broadcast(op.temperatures[row]), largest_logit = div(broadcast(largest_of(most, num_groups).value), temperature);
    for (int64_t at = 0; at < num_groups; at += kLanes) {
        int count = (int)(num_groups - at < kLanes ? num_groups - at : kLanes);
        Floats scaled = div(load(most + at, count), temperature);
        store(sums + at, mul(load(sums + at, count), exp(sub(scaled, largest_logit))), count);
    }
    int64_t group = draw(sums, num_groups, key, (uint64_t)-2, (uint64_t)-1);
    Floats weights[kGroup / kLanes];
    weigh(op, weights, row, group);
    float within[kGroup];
    for (int i = 0; i < kGroup / kLanes; ++i) store(within + i * kLanes, weights[i]);
    return group * kGroup + draw(within, op.count(group), key, (uint64_t)(group * kGroup), 1);
}

inline void sample(const Sample& op) {
#pragma omp parallel if (is_worth_threads(op.num_rows * op.size))
    {
        int64_t num_groups = op.num_groups();
        Range groups = share(op.num_rows * num_groups);
        for (int64_t at = groups.begin; at < groups.end; ++at) {
            int64_t row = at / num_groups, group = at % num_groups;
            Floats weights[kGroup / kLanes];
            float* sums = op.workspace + row * 2 * num_groups;
            sums[num_groups + group] = weigh(op, weights, row, group);
            for (int i = 1; i < kGroup / kLanes; ++i) weights[0] = add(weights[0], weights[i]);
            sums[group] = sum(weights[0]);
        }
#pragma omp barrier
        Range rows = share(op.num_rows);
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            Best best = likeliest(op, row, op.workspace + (row * 2 + 1) * num_groups);
            op.best[row] = best.value;
            op.token_ids[row] = op.temperatures[row] == 0.0f ? best.index : draw_token(op, row);
        }
    }
}

}  // namespace wavetrain
