// SPDX-License-Identifier: Apache-2.0
// Linear layers over packed weights: out = x times weight transposed, with what follows it done before it is stored.
//
// Packed weights: panels of 32 outputs, each [k / 32][2] tiles of B, so that a step reads its weights once, in order.
// In a gated layer (gate and up projections stacked) the two tiles of a panel are 16 gates and their 16 ups.
// Both sizes are padded with zeros: k to 32, outputs to whole tiles.
#pragma once

#include "program.h"
#include "threads.h"
#include "tile.h"

namespace wavetrain {

constexpr int kPanel = 2 * kTile;                  // outputs of a panel
constexpr int kBlock = 2 * kTile;                  // rows that are multiplied together
constexpr int kBlockElements = 2 * kTileElements;  // of a step of a panel, and of a block
constexpr int kLineElements = 32;                  // of a line of memory
constexpr int kMaxRows = 512;                      // rows that a panel is multiplied with before the next one

enum class Activation : int { kNone = 0, kSilu = 1, kGeluTanh = 2 };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The row of weight [n, k] behind output `column` of tile `half` in `panel`; past n where there is none.
inline int64_t weight_row(int64_t panel, int half, int column, int64_t n, bool is_gated) {
    if (!is_gated) return panel * kPanel + half * kTile + column;
    int64_t output = panel * kTile + column;
    return output < n / 2 ? half * (n / 2) + output : n;
}

inline int64_t num_panels(int64_t n, bool is_gated) { return ceil_div(is_gated ? n / 2 : n, is_gated ? kTile : kPanel); }

inline void pack_weight(bf16* packed, const bf16* weight, int64_t stride, int64_t n, int64_t k, bool is_gated) {
    int64_t steps = ceil_div(k, kDepth);
#pragma omp parallel
    {
        Range panels = share(num_panels(n, is_gated));
        for (int64_t panel = panels.begin; panel < panels.end; ++panel)
            for (int half = 0; half < 2; ++half)
                for (int column = 0; column < kTile; ++column) {
                    int64_t row = weight_row(panel, half, column, n, is_gated);
                    bf16* to = packed + (panel * steps * 2 + half) * kTileElements + column * 2;
                    const bf16* from = weight + row * stride;
                    for (int64_t step = 0; step < steps; ++step, to += 2 * kTileElements)
                        for (int pair = 0; pair < kDepth / 2; ++pair) {
                            int64_t at = step * kDepth + pair * 2;
                            to[pair * kPanel] = row < n && at < k ? from[at] : 0;
                            to[pair * kPanel + 1] = row < n && at + 1 < k ? from[at + 1] : 0;
                        }
                }
    }
}

// Rows of a table [n, k], plain or packed without gates, times a scale.
struct Embedding {
    bf16* out;             // [num_rows, k]
    const bf16* table;
    const int64_t* rows;   // [num_rows]
    int64_t num_rows, k;
    float scale;
    bool is_packed;

    void bind(const Step& step, int64_t) { rows = step.token_ids, num_rows = step.num_tokens; }
    int64_t num_tokens() const { return num_rows; }
    bool is_large() const { return is_worth_threads(num_rows * k); }
};

inline void run(const Embedding& op) {
    int64_t steps = ceil_div(op.k, kDepth);
    Floats scale = broadcast(op.scale);
    Range range = share(op.num_rows);
    for (int64_t i = range.begin; i < range.end; ++i) {
        bf16* out = op.out + i * op.k;
        if (op.is_packed) {
            int64_t panel = op.rows[i] / kPanel, half = op.rows[i] % kPanel / kTile, column = op.rows[i] % kTile;
            const bf16* from = op.table + (panel * steps * 2 + half) * kTileElements + column * 2;
            for (int64_t at = 0; at < op.k; ++at)
                out[at] = from[at / kDepth * 2 * kTileElements + at % kDepth / 2 * kPanel + at % 2];
        } else {
            memcpy(out, op.table + op.rows[i] * op.k, (size_t)op.k * sizeof(bf16));
        }
        if (op.scale == 1.0f) continue;
        int64_t at = 0;
        for (; at + kLanes <= op.k; at += kLanes) store(out + at, mul(load(out + at), scale));
        if (at < op.k) store(out + at, mul(load(out + at, (int)(op.k - at)), scale), (int)(op.k - at));
    }
}

// Rows of what a step has computed so far: those it wants.
struct Selection : Embedding {};

// Rows [begin, end) of x as tiles of A: [rows / 32][steps][2] tiles, so that two tiles of rows are one stream.
inline void pack_rows(bf16* packed, const bf16* x, int64_t stride, int64_t begin, int64_t end, int64_t k) {
    int64_t steps = ceil_div(k, kDepth);
    for (int64_t row = begin; row < end; ++row) {
        bf16* to = packed + row / kBlock * steps * kBlockElements + row % kBlock * kDepth;
        const bf16* from = x + row * stride;
        int64_t step = 0;
        for (; (step + 1) * kDepth <= k; ++step) memcpy(to + step * kBlockElements, from + step * kDepth, kDepth * sizeof(bf16));
        if (step < steps) {
            size_t rest = (size_t)(k - step * kDepth);
            memset(to + step * kBlockElements, 0, kDepth * sizeof(bf16));
            memcpy(to + step * kBlockElements, from + step * kDepth, rest * sizeof(bf16));
        }
    }
}

#if WAVETRAIN_AMX
// c [kTiles * 16, 32] (+)= tiles of A times `steps` steps of a panel: two tiles of B, kNext bytes apart, whose rows are kStride
// bytes apart. kIsInt: signed bytes times unsigned ones, c int32. kAhead: how many steps ahead to ask for the panel.
template <bool kIsInt, int kTiles, int kAhead, int kStride, int kNext>
inline void multiply_tiles(float* c, const char* a, const char* b, int64_t steps, bool is_first) {
    constexpr int64_t kRow = kPanel * sizeof(float);
    constexpr int kStepBytes = kBlockElements * (int)sizeof(bf16);
    if (is_first) {
        _tile_zero(0);
        _tile_zero(1);
        if (kTiles == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, c, kRow);
        _tile_loadd(1, c + kTile, kRow);
        if (kTiles == 2) {
            _tile_loadd(2, c + kTile * kPanel, kRow);
            _tile_loadd(3, c + kTile * kPanel + kTile, kRow);
        }
    }
    for (int64_t step = 0; step < steps; ++step, a += kStepBytes, b += kStepBytes) {
        if (kAhead)
            for (int line = 0; line < kStepBytes; line += 64)
                asm volatile("prefetcht0 %0" ::"m"(b[kAhead * kStepBytes + line]));
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, kStride);
        if constexpr (kIsInt) _tile_dpbsud(0, 4, 6);
        else _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + kNext, kStride);
        if constexpr (kIsInt) _tile_dpbsud(1, 4, 7);
        else _tile_dpbf16ps(1, 4, 7);
        if (kTiles == 2) {
            _tile_loadd(5, a + kStepBytes / 2, 64);
            if constexpr (kIsInt) {
                _tile_dpbsud(2, 5, 6);
                _tile_dpbsud(3, 5, 7);
            } else {
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, c, kRow);
    _tile_stored(1, c + kTile, kRow);
    if (kTiles == 2) {
        _tile_stored(2, c + kTile * kPanel, kRow);
        _tile_stored(3, c + kTile * kPanel + kTile, kRow);
    }
}

// The same of packed weights.
template <int kTiles, int kAhead>
inline void multiply_packed(float* c, const bf16* a, const bf16* b, int64_t steps, bool is_first) {
    constexpr int kNext = kTileElements * (int)sizeof(bf16);
    multiply_tiles<false, kTiles, kAhead, 64, kNext>(c, (const char*)a, (const char*)b, steps, is_first);
}
#endif

#if !WAVETRAIN_AMX
// c [kRows, 32] (+)= kRows rows of tiles of A times `steps` steps of one panel. Beside each pair of inputs, which are two
// lines of the panel, kLines lines from `ahead` on are asked for: two for the first-level cache, one for the second-level one.
template <int kRows, int kLines>
inline void multiply_rows(float* c, const bf16* a, const bf16* b, const bf16* ahead, int64_t steps, bool is_first) {
    Floats sums[kRows][2];
    for (int row = 0; row < kRows; ++row)
        for (int half = 0; half < 2; ++half) sums[row][half] = is_first ? broadcast(0.0f) : load(c + row * kPanel + half * kTile);
    for (int64_t step = 0; step < steps; ++step) {
        const bf16* rows = a + step * kBlockElements;
        for (int pair = 0; pair < kDepth / 2; ++pair) {
            const bf16* tiles = b + step * kBlockElements + pair * kTileRow;
            // Line by line in the order of memory, between products: in bursts of a step, or in the order of use, the
            // same lines come at 18 to 22 GB/s.
            for (int line = 0; line < kLines; ++line, ahead += kLineElements)
                _mm_prefetch((const char*)ahead, kLines == 2 ? _MM_HINT_T0 : _MM_HINT_T1);
            for (int row = 0; row < kRows; ++row) {
                int32_t values = pair_at(rows + row * kDepth + pair * 2);
                sums[row][0] = multiply_pair(sums[row][0], values, tiles);
                sums[row][1] = multiply_pair(sums[row][1], values, tiles + kTileElements);
            }
        }
    }
    for (int row = 0; row < kRows; ++row)
        for (int half = 0; half < 2; ++half) store(c + row * kPanel + half * kTile, sums[row][half]);
}

// As multiply_rows, for at most as many rows as registers hold.
template <int kLines>
inline void multiply_few_rows(float* c, const bf16* a, const bf16* b, const bf16* ahead, int64_t steps, int64_t rows, bool is_first) {
    switch (rows) {
        // A row alone is read 15 % slower than two: it asks for memory in bursts.
        case 1: case 2: return multiply_rows<2, kLines>(c, a, b, ahead, steps, is_first);
#if defined(__AVX512F__)
        case 3: return multiply_rows<3, kLines>(c, a, b, ahead, steps, is_first);
        case 4: return multiply_rows<4, kLines>(c, a, b, ahead, steps, is_first);
        case 5: case 6: return multiply_rows<6, kLines>(c, a, b, ahead, steps, is_first);
        default: return multiply_rows<8, kLines>(c, a, b, ahead, steps, is_first);
#endif
    }
}

// As many rows at a time as registers hold. Of a cold panel the memory behind these steps comes meanwhile, half of it beside
// each of the first two passes: where the first one fetched it all, it waited for memory and the others computed alone
// (16 rows: 188 GFLOP/s on a core of an EPYC in the place of 207; 201 with the first-level cache asked, which is full).
inline void multiply_some_rows(float* c, const bf16* a, const bf16* b, int64_t steps, int64_t rows, bool is_first, bool is_cold) {
    if (is_cold && rows <= kRowsAtOnce) {
        // Two cores of an EPYC read 30 to 36 GB/s so, 18 GB/s left to themselves.
        constexpr int kStepsAhead = 4;
        return multiply_few_rows<2>(c, a, b, b + kStepsAhead * kBlockElements, steps, rows, is_first);
    }
    const bf16* ahead = b + steps * kBlockElements;
    for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
        int64_t some = rows - row < kRowsAtOnce ? rows - row : kRowsAtOnce;
        float* sums = c + row * kPanel;
        const bf16* from = a + row * kDepth;
        if (is_cold && row < 2 * kRowsAtOnce) {
            multiply_few_rows<1>(sums, from, b, ahead, steps, some, is_first);
            ahead += steps * kTileElements;
        } else {
            multiply_few_rows<0>(sums, from, b, ahead, steps, some, is_first);
        }
    }
}
#endif

// c [rows, 32] (+)= a block of at most 32 rows times `steps` steps of one panel. c has room for 32 rows.
// is_cold: the panel, or what comes behind these steps of it, is asked for.
inline void multiply_block(float* c, const bf16* a, const bf16* b, int64_t steps, int64_t rows, bool is_first, bool is_cold) {
#if WAVETRAIN_AMX
    // 4 KiB ahead of a panel from memory, 26 of the 27 GB/s come through that two cores of a Xeon read.
    constexpr int kAhead = 2;
    if (rows > kTile) is_cold ? multiply_packed<2, kAhead>(c, a, b, steps, is_first) : multiply_packed<2, 0>(c, a, b, steps, is_first);
    else is_cold ? multiply_packed<1, kAhead>(c, a, b, steps, is_first) : multiply_packed<1, 0>(c, a, b, steps, is_first);
#else
    multiply_some_rows(c, a, b, steps, rows, is_first, is_cold);
#endif
}

inline Floats activate(Floats x, Activation activation) {
    return activation == Activation::kSilu ? silu(x) : gelu_tanh(x);
}

struct Linear {
    void* out;             // [m, n] bf16 or float32; [m, n / 2] in a gated layer
    const bf16* x;         // [m, k]
    const bf16* packed;
    const bf16* bias;      // [n], or null
    bf16* workspace;       // ceil(m / 32) * ceil(k / 32) blocks
    int64_t out_stride, x_stride, m, k, n;
    Activation activation; // other than kNone: a gated layer
    bool is_float_out;

    bool is_gated() const { return activation != Activation::kNone; }
    void bind(const Step& step, int64_t) { m = step.num_tokens, workspace = (bf16*)step.workspace; }
    int64_t num_tokens() const { return m; }
    bool is_large() const { return true; }
};

inline Floats bias_at(const Linear& op, int64_t first_row) {
    int64_t count = op.n - first_row;
    return op.bias && count > 0 ? load(op.bias + first_row, (int)(count < kTile ? count : kTile)) : broadcast(0.0f);
}

inline int64_t width(const Linear& op) { return op.is_gated() ? op.n / 2 : op.n; }

inline void store_tile(const Linear& op, int64_t row, int64_t column, Floats values) {
    int count = (int)(width(op) - column < kTile ? width(op) - column : kTile);
    if (count <= 0) return;
    int64_t at = row * op.out_stride + column;
    if (op.is_float_out) {
        if (count == kTile) store((float*)op.out + at, values);
        else store((float*)op.out + at, values, count);
    } else if (count == kTile) {
        store((bf16*)op.out + at, values);
    } else {
        store((bf16*)op.out + at, values, count);
    }
}

// Stores rows [row, row + count) of one panel's sums c [count, 32].
inline void finish_panel(const Linear& op, const float* c, int64_t row, int64_t count, int64_t panel) {
    if (op.is_gated()) {
        int64_t column = panel * kTile;
        Floats gate_bias = bias_at(op, column), up_bias = bias_at(op, op.n / 2 + column);
        for (int64_t i = 0; i < count; ++i) {
            Floats gate = add(load(c + i * kPanel), gate_bias), up = add(load(c + i * kPanel + kTile), up_bias);
            store_tile(op, row + i, column, mul(activate(gate, op.activation), up));
        }
        return;
    }
    int64_t column = panel * kPanel;
    Floats low = bias_at(op, column), high = bias_at(op, column + kTile);
    if (!op.is_float_out && column + kPanel <= op.n) {   // the usual case: whole lines
        bf16* to = (bf16*)op.out + row * op.out_stride + column;
        for (int64_t i = 0; i < count; ++i, to += op.out_stride)
            store_pair(to, add(load(c + i * kPanel), low), add(load(c + i * kPanel + kTile), high));
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        store_tile(op, row + i, column, add(load(c + i * kPanel), low));
        store_tile(op, row + i, column + kTile, add(load(c + i * kPanel + kTile), high));
    }
}

// Rows that are multiplied with a panel before the next one: their tiles stay in a core's second-level cache. A multiple of
// kBlock; all chunks of a call are about as long, as a short one would read the weights for little.
inline int64_t rows_at_once(int64_t m, int64_t k) {
    constexpr int64_t kCacheBytes = 3 << 19;
    int64_t fitting = kCacheBytes / (k * (int64_t)sizeof(bf16));
    int64_t most = fitting < 2 * kBlock ? 2 * kBlock : fitting > kMaxRows ? kMaxRows : fitting / kBlock * kBlock;
    return ceil_div(ceil_div(m, ceil_div(m, most)), kBlock) * kBlock;
}

// Steps of a panel that all rows pass before the next ones: as much (16 KiB) as the first-level cache keeps beside the rows
// that pass by, while what comes next is asked for. Rows that are multiplied at once pass the whole panel.
inline int64_t steps_at_once(int64_t count, int64_t steps) {
    constexpr int64_t kStepsAtOnce = 8;
#if WAVETRAIN_AMX
    constexpr int64_t kRows = kBlock;
#else
    constexpr int64_t kRows = kRowsAtOnce;
#endif
    return count > kRows ? kStepsAtOnce : steps;
}

#if WAVETRAIN_AMX
// Asks for steps [begin, end) of what is at `weights`; past the end of the weights that does no harm.
inline void prefetch_weights(const bf16* weights, int64_t begin, int64_t end) {
    for (int64_t at = begin * kBlockElements; at < end * kBlockElements; at += 32) asm volatile("prefetcht1 %0" ::"m"(weights[at]));
}
#endif

// Products of `count` rows of tiles at `a` and one panel, handed to finish(sums, first row, rows) a block at a time; c: room
// for the sums [count, 32].
template <typename Finish>
inline void multiply_panel(float* c, const bf16* a, const bf16* b, int64_t steps, int64_t count, Finish finish) {
    int64_t at_once = steps_at_once(count, steps);
    for (int64_t step = 0; step < steps; step += at_once) {
        int64_t some = steps - step < at_once ? steps - step : at_once;
        for (int64_t i = 0; i < count; i += kBlock) {
            int64_t rows = count - i < kBlock ? count - i : kBlock;
#if WAVETRAIN_AMX
            bool is_cold = count <= kBlock;
            if (!is_cold) prefetch_weights(b + (step + some) * kBlockElements, some * i / count, some * (i + rows) / count);
#else
            bool is_cold = i == 0;   // then what comes next is asked for, and the other blocks find it
#endif
            multiply_block(c + i * kPanel, a + (i / kBlock * steps + step) * kBlockElements, b + step * kBlockElements, some, rows,
                           step == 0, is_cold);
            if (step + some == steps) finish(c + i * kPanel, i, rows);
        }
    }
}

// Computes and stores rows [row, row + count) times one panel; c: room for the sums [count, 32].
inline void multiply_panel(const Linear& op, float* c, int64_t row, int64_t count, int64_t panel) {
    int64_t steps = ceil_div(op.k, kDepth);
    multiply_panel(c, op.workspace + row * steps * kDepth, op.packed + panel * steps * kBlockElements, steps, count,
                   [&](const float* sums, int64_t first, int64_t some) { finish_panel(op, sums, row + first, some, panel); });
}

inline void run(const Linear& op) {
    Range rows = share(op.m);
    pack_rows(op.workspace, op.x, op.x_stride, rows.begin, rows.end, op.k);
#pragma omp barrier
    alignas(64) float c[kMaxRows * kPanel];
    int64_t panels = num_panels(op.n, op.is_gated()), chunk = rows_at_once(op.m, op.k);
    Range units = share(ceil_div(op.m, chunk) * panels);
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
        int64_t panel = unit % panels, row = unit / panels * chunk;
        int64_t count = op.m - row < chunk ? op.m - row : chunk;
        multiply_panel(op, c, row, count, panel);
    }
}

}  // namespace wavetrain
