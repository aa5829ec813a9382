// SPDX-License-Identifier: Apache-2.0
// Causal attention over the paged KV cache, for decodes and chunks of prompts alike.
//
// Online softmax (Milakov and Gimelshein 2018; Dao et al. 2022) in steps of 128 keys, counted from position 0, with the
// steps of 1,024 keys summed apart and merged in order (Dao et al. 2023, "Flash-Decoding"). A query's result depends
// on its own context alone: not on who shares its tile, how its prompt was cut, or how many threads took part.
//
// The queries of a key-value head are lanes, 16 to a tile: of one token all the heads that share the key-value head, then
// those of the next token. Scores are computed transposed, S^T = K Q^T, so that keys go into the product as they lie in
// the cache and the softmax runs down the lanes.
#pragma once

#include "kv_cache.h"
#include "program.h"
#include "threads.h"
#include "tile.h"

namespace wavetrain {

constexpr int kKeys = 128;             // keys of a step
constexpr int kPartition = 1024;       // keys summed apart; a multiple of kKeys
constexpr int kMaxTiles = 4;           // tiles of lanes that share what is read of the cache
constexpr int kMaxHeadDim = 256;
#if defined(__AVX512F__)
constexpr int kKeysAtOnce = 8, kLanesAtOnce = 4;   // rows of a product without tiles that are summed beside each other
#else
constexpr int kKeysAtOnce = 4, kLanesAtOnce = 2;
#endif

struct Attention {
    bf16* out;                // [T, Hq, D], contiguous
    const bf16* query;        // [T, Hq, D], a token every query_stride
    const char* key_cache;    // [blocks, Hkv, block_size, D], as value_cache: bf16, or codes of one byte
    const char* value_cache;
    const bf16* key_scales;   // [blocks, Hkv, block_size], as value_scales; of codes
    const bf16* value_scales;
    Codes codes;
    const int32_t* query_start_loc;   // [B + 1]
    const int32_t* seq_lens;          // [B]
    const int32_t* block_tables;      // [B, table_stride]
    int64_t query_stride, table_stride, num_rows, num_heads, num_kv_heads, head_dim, block_size;
    int64_t sliding_window;   // 0: none
    int64_t count;            // tokens
    int64_t max_pieces;       // room in the workspace for partitions computed apart
    char* workspace;          // see Plan
    float scale, soft_cap;    // soft_cap 0: none

    void bind(const Step& step, int64_t) {
        query_start_loc = step.query_start_loc, seq_lens = step.seq_lens, block_tables = step.block_tables;
        table_stride = step.table_stride, num_rows = step.num_rows, count = step.num_tokens;
        workspace = step.workspace;
    }
    int64_t num_tokens() const { return count; }
    bool is_large() const { return true; }
    int64_t group() const { return num_heads / num_kv_heads; }
    int64_t depth_steps() const { return (head_dim + kDepth - 1) / kDepth; }
    int64_t padded_dim() const { return depth_steps() * kDepth; }
    bool has_scales() const { return codes != Codes::kNone; }
    int64_t row_bytes() const { return head_dim * (has_scales() ? 1 : (int64_t)sizeof(bf16)); }
};

// What one thread works on: up to kMaxTiles tiles of lanes of one row, of one key-value head or one tile of each of several.
struct Lanes {
    int64_t row, head, num_heads, first_lane, num_lanes;   // lane = token * group + query head within the group
    int64_t num_tiles() const { return (num_lanes + kLanes - 1) / kLanes; }
    Lanes of_head(int64_t i) const { return {row, head + i, 1, first_lane, num_lanes}; }
};

// One tile's sums over some keys: for each lane the largest score, the sum of weights, the weighted values.
struct alignas(64) Sums {
    float largest[kLanes];
    float weight[kLanes];
    float value[kLanes][kMaxHeadDim];   // the first padded_dim() of each
};

// A thread's own arrays.
struct alignas(64) AttentionScratch {
    bf16 queries[kMaxTiles][kMaxHeadDim / kDepth][kTileElements];       // tiles of B
    bf16 keys[kKeys * kMaxHeadDim];                                    // where the cache's own layout will not do
    bf16 values[kKeys / kDepth][kMaxHeadDim / kTile][kTileElements];    // tiles of B
    float scores[kKeys][kLanes];
    bf16 weights[kLanes][kKeys];                                       // tiles of A, side by side
    float positions[kMaxTiles][kLanes];
    float key_scales[kKeys], value_scales[kKeys];                      // of a quantized cache; 0 past the context
    Sums part[kMaxTiles], total[kMaxTiles];
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// Which row of the cache, of head_dim elements, has a position's key or value.
inline int64_t cached_row(const Attention& op, int64_t row, int64_t head, int64_t position) {
    // A division takes as long as loading the row it finds.
    bool is_power = (op.block_size & (op.block_size - 1)) == 0;
    int64_t index = is_power ? position >> __builtin_ctzll((uint64_t)op.block_size) : position / op.block_size;
    int64_t block = op.block_tables[row * op.table_stride + index];
    return (block * op.num_kv_heads + head) * op.block_size + position - index * op.block_size;
}

inline const char* cached(const Attention& op, const char* cache, int64_t row, int64_t head, int64_t position) {
    return cache + cached_row(op, row, head, position) * op.row_bytes();
}

// Walks over one head's rows of a cache, position by position.
class CachedRows {
  public:
    CachedRows(const Attention& op, const char* cache, const Lanes& lanes, int64_t position)
        : op_(op), cache_(cache), lanes_(lanes), position_(position), left_(op.block_size - position % op.block_size),
          row_bytes_(op.row_bytes()) {
        row_ = cached(op, cache, lanes.row, lanes.head, position);
    }
    const char* row() const { return row_; }
    // Must not go past the context: its last block is the last one the table has.
    void advance() {
        ++position_;
        if (--left_) {
            row_ += row_bytes_;
        } else {
            row_ = cached(op_, cache_, lanes_.row, lanes_.head, position_);
            left_ = op_.block_size;
        }
    }

  private:
    const Attention& op_;
    const char* cache_;
    const Lanes& lanes_;
    int64_t position_, left_, row_bytes_;
    const char* row_;
};

inline int64_t token_of(const Attention& op, const Lanes& lanes, int64_t lane) {
    return op.query_start_loc[lanes.row] + (lanes.first_lane + lane) / op.group();
}

inline int64_t head_of(const Attention& op, const Lanes& lanes, int64_t lane) {
    return lanes.head * op.group() + (lanes.first_lane + lane) % op.group();
}

inline int64_t position_of(const Attention& op, const Lanes& lanes, int64_t lane) {
    return op.seq_lens[lanes.row] - op.query_start_loc[lanes.row + 1] + token_of(op, lanes, lane);
}

// One tile of B from `count` dimensions of 16 lanes, from `first` on; the rest of the tile is zero. Null rows are zero.
inline void load_query_tile(bf16* tile, const bf16* const* rows, int64_t first, int64_t count) {
    alignas(64) bf16 lanes[kLanes][kDepth] = {};
    for (int i = 0; i < kLanes; ++i)
        if (rows[i]) memcpy(lanes[i], rows[i] + first, (size_t)count * sizeof(bf16));
#if defined(__AVX512F__)
    __m512i pairs[kLanes];
    for (int i = 0; i < kLanes; ++i) pairs[i] = _mm512_load_si512(lanes[i]);
    transpose(pairs);
    for (int i = 0; i < kLanes; ++i) _mm512_store_si512(tile + i * kTileRow, pairs[i]);
#else
    for (int i = 0; i < kLanes; ++i)
        for (int d = 0; d < kDepth; d += 2) memcpy(tile + d / 2 * kTileRow + i * 2, &lanes[i][d], 2 * sizeof(bf16));
#endif
}

// Queries of one head as tiles of B, from `slot` on: row r of a tile holds dimensions 2r and 2r + 1 of every lane. Unused lanes
// are zero.
inline void load_queries(const Attention& op, const Lanes& lanes, int64_t slot, AttentionScratch& scratch) {
    for (int64_t tile = 0; tile < lanes.num_tiles(); ++tile) {
        const bf16* rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
            int64_t lane = tile * kLanes + i, used = smaller(lane, lanes.num_lanes - 1);
            // Unused lanes stand where the last one does, so that they never are why a step needs a mask.
            scratch.positions[slot + tile][i] = (float)position_of(op, lanes, used);
            rows[i] = op.query + token_of(op, lanes, used) * op.query_stride + head_of(op, lanes, used) * op.head_dim;
            if (lane > used) rows[i] = nullptr;
        }
        for (int64_t step = 0; step < op.depth_steps(); ++step)
            load_query_tile(scratch.queries[slot + tile][step], rows, step * kDepth, smaller(kDepth, op.head_dim - step * kDepth));
    }
}

// scales [128] = those of positions [first, end) of one head, and zeros: what lies past a context may be NaN.
inline void load_scales(const Attention& op, const bf16* cache, const Lanes& lanes, int64_t first, int64_t end, float* scales) {
    for (int64_t position = first; position < end;) {
        const bf16* from = cache + cached_row(op, lanes.row, lanes.head, position);
        int64_t count = smaller(op.block_size - position % op.block_size, end - position);
        for (int64_t i = 0; i < count; i += kLanes) {
            int64_t some = smaller(kLanes, count - i);
            Floats x = some == kLanes ? load(from + i) : load(from + i, (int)some);
            store(scales + position - first + i, x, (int)some);
        }
        position += count;
    }
    for (int64_t i = end - first; i < kKeys; ++i) scales[i] = 0.0f;
}

// One tile of A per 16 keys and 32 dimensions: the cache itself where it holds whole tiles, else a padded copy.
struct KeyTiles {
    const bf16* start[kKeys / kTile];
    int64_t row_bytes;
};

inline KeyTiles load_keys(const Attention& op, const Lanes& lanes, int64_t first, int64_t end, AttentionScratch& scratch) {
    KeyTiles tiles;
    bool is_direct = op.block_size % kTile == 0 && op.head_dim % kDepth == 0;
    tiles.row_bytes = (is_direct ? op.head_dim : op.padded_dim()) * (int64_t)sizeof(bf16);
    for (int64_t i = 0; i < kKeys / kTile; ++i) {
        int64_t position = first + i * kTile;
        // Past the context: any valid address does, its scores are masked.
        if (is_direct) tiles.start[i] = (const bf16*)cached(op, op.key_cache, lanes.row, lanes.head, position < end ? position : first);
        else tiles.start[i] = scratch.keys + i * kTile * op.padded_dim();
    }
    if (!is_direct) {
        memset(scratch.keys, 0, (size_t)(kKeys * op.padded_dim()) * sizeof(bf16));
        for (int64_t position = first; position < smaller(end, first + kKeys); ++position)
            memcpy(scratch.keys + (position - first) * op.padded_dim(), cached(op, op.key_cache, lanes.row, lanes.head, position),
                   (size_t)op.head_dim * sizeof(bf16));
    }
    return tiles;
}

// The same from codes: widened, their scales beside them.
template <Codes kCodes>
inline KeyTiles load_key_codes(const Attention& op, const Lanes& lanes, int64_t first, int64_t end, AttentionScratch& scratch) {
    KeyTiles tiles;
    tiles.row_bytes = op.padded_dim() * (int64_t)sizeof(bf16);
    for (int64_t i = 0; i < kKeys / kTile; ++i) tiles.start[i] = scratch.keys + i * kTile * op.padded_dim();
    int64_t num_keys = smaller(end - first, kKeys);
    load_scales(op, op.key_scales, lanes, first, first + num_keys, scratch.key_scales);
    CachedRows cursor(op, op.key_cache, lanes, first);
    for (int64_t i = 0; i < num_keys; ++i) {
        if (i) cursor.advance();
        widen_row<kCodes>(scratch.keys + i * op.padded_dim(), (const uint8_t*)cursor.row(), op.head_dim);
    }
    return tiles;
}

// Two rows of values as one row of tiles of B: (a[d], b[d]) for 32 dimensions, 16 to each tile. A null row is zeros.
template <Codes kCodes>
inline void interleave(const char* a, const char* b, bf16* even, bf16* odd) {
#if defined(__AVX512BW__)
    alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                  8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __m512i x = a ? load_row<kCodes>(a) : _mm512_setzero_si512(), y = b ? load_row<kCodes>(b) : _mm512_setzero_si512();
    _mm512_store_si512(even, _mm512_permutex2var_epi16(x, low, y));
    _mm512_store_si512(odd, _mm512_permutex2var_epi16(x, high, y));
#else
    alignas(64) bf16 x[kDepth] = {}, y[kDepth] = {};
    if (a) load_row<kCodes>(x, a);
    if (b) load_row<kCodes>(y, b);
    for (int d = 0; d < kTile; ++d) {
        even[2 * d] = x[d];
        even[2 * d + 1] = y[d];
        odd[2 * d] = x[kTile + d];
        odd[2 * d + 1] = y[kTile + d];
    }
#endif
}

// Values of keys [first, first + kKeys) as tiles of B. Positions from `end` on are zeros, whatever the cache holds there.
template <Codes kCodes>
inline void load_values(const Attention& op, const Lanes& lanes, int64_t first, int64_t end, AttentionScratch& scratch) {
    constexpr int64_t kBytes = kCodes == Codes::kNone ? sizeof(bf16) : 1;
    bool is_padded = op.head_dim % kDepth != 0;
    alignas(64) char copies[2][kMaxHeadDim * kBytes];
    if (is_padded) memset(copies, 0, sizeof copies);
    int64_t used = smaller(kKeys, (end - first + kDepth - 1) / kDepth * kDepth);
    CachedRows cursor(op, op.value_cache, lanes, first);
    for (int64_t key = 0; key < used; key += 2) {
        const char* rows[2] = {nullptr, nullptr};
        for (int i = 0; i < 2 && first + key + i < end; ++i) {
            rows[i] = cursor.row();
            if (is_padded) rows[i] = (const char*)memcpy(copies[i], rows[i], (size_t)(op.head_dim * kBytes));
            if (first + key + i + 1 < end) cursor.advance();
        }
        bf16(*tiles)[kTileElements] = scratch.values[key / kDepth];
        int64_t at = key % kDepth / 2 * kTileRow;
        for (int64_t d = 0; d < op.padded_dim(); d += kDepth)
            interleave<kCodes>(rows[0] ? rows[0] + d * kBytes : nullptr, rows[1] ? rows[1] + d * kBytes : nullptr,
                               tiles[d / kTile] + at, tiles[d / kTile + 1] + at);
    }
}

// Keys and values of positions [first, first + kKeys), none from `end` on; returns where the keys are.
inline KeyTiles load_step(const Attention& op, const Lanes& lanes, int64_t first, int64_t end, AttentionScratch& scratch) {
    if (op.codes == Codes::kNone) {
        KeyTiles keys = load_keys(op, lanes, first, end, scratch);
        load_values<Codes::kNone>(op, lanes, first, end, scratch);
        return keys;
    }
    load_scales(op, op.value_scales, lanes, first, smaller(end, first + kKeys), scratch.value_scales);
    if (op.codes == Codes::kInt8) {
        load_values<Codes::kInt8>(op, lanes, first, end, scratch);
        return load_key_codes<Codes::kInt8>(op, lanes, first, end, scratch);
    }
    load_values<Codes::kE4m3>(op, lanes, first, end, scratch);
    return load_key_codes<Codes::kE4m3>(op, lanes, first, end, scratch);
}

// x, times the scale of a key or value where there is one.
template <bool kHasScales>
inline Floats weigh(Floats x, const float* scale) {
    return kHasScales ? mul(x, broadcast(*scale)) : x;
}

#if WAVETRAIN_AMX
// Scores of codes become those of keys.
inline void scale_scores(int64_t num_keys, AttentionScratch& scratch) {
    for (int64_t i = 0; i < num_keys; ++i) store(scratch.scores[i], mul(load(scratch.scores[i]), broadcast(scratch.key_scales[i])));
}
#else
// scores [kKeysAtOnce, 16] = as many keys times the queries of one tile: enough sums at once to hide the product's latency.
template <bool kHasScales>
inline void multiply_some_keys(float* scores, const bf16* keys, int64_t stride, const float* scales, const bf16* queries,
                               int64_t padded_dim) {
    Floats sums[kKeysAtOnce];
    for (Floats& one : sums) one = broadcast(0.0f);
    for (int64_t d = 0; d < padded_dim; d += 2)   // pair d of dimensions is row d of all tiles of the queries together
        for (int key = 0; key < kKeysAtOnce; ++key)
            sums[key] = multiply_pair(sums[key], pair_at(keys + key * stride + d), queries + d / 2 * kTileRow);
    for (int key = 0; key < kKeysAtOnce; ++key) store(scores + key * kLanes, weigh<kHasScales>(sums[key], scales + key));
}
#endif

// scores [128, 16] = keys times the queries of one tile, times the keys' scales if they have any; num_keys rounded up to 64.
inline void multiply_keys(const Attention& op, const KeyTiles& keys, int64_t tile, int64_t num_keys, AttentionScratch& scratch) {
#if WAVETRAIN_AMX
    constexpr int64_t stride = sizeof scratch.scores[0];
    for (int64_t i = 0; i * kTile < num_keys; i += 4) {   // four sums at once hide the product's latency
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t step = 0; step < op.depth_steps(); ++step) {
            _tile_loadd(4, scratch.queries[tile][step], 64);
            _tile_loadd(5, keys.start[i] + step * kDepth, keys.row_bytes);
            _tile_dpbf16ps(0, 5, 4);
            _tile_loadd(6, keys.start[i + 1] + step * kDepth, keys.row_bytes);
            _tile_dpbf16ps(1, 6, 4);
            _tile_loadd(7, keys.start[i + 2] + step * kDepth, keys.row_bytes);
            _tile_dpbf16ps(2, 7, 4);
            _tile_loadd(5, keys.start[i + 3] + step * kDepth, keys.row_bytes);
            _tile_dpbf16ps(3, 5, 4);
        }
        float* to = scratch.scores[i * kTile];
        _tile_stored(0, to, stride);
        _tile_stored(1, to + kTile * kLanes, stride);
        _tile_stored(2, to + 2 * kTile * kLanes, stride);
        _tile_stored(3, to + 3 * kTile * kLanes, stride);
    }
    if (op.has_scales()) scale_scores(num_keys, scratch);
#else
    for (int64_t i = 0; i < num_keys; i += kKeysAtOnce) {
        int64_t stride = keys.row_bytes / (int64_t)sizeof(bf16);
        const bf16* some = keys.start[i / kTile] + i % kTile * stride;
        const float* scales = scratch.key_scales + i;
        const bf16* queries = (const bf16*)scratch.queries[tile];
        if (op.has_scales()) multiply_some_keys<true>(scratch.scores[i], some, stride, scales, queries, op.padded_dim());
        else multiply_some_keys<false>(scratch.scores[i], some, stride, scales, queries, op.padded_dim());
    }
#endif
}

// Caps the scores, where the model does; afterwards they are to be multiplied by score_scale().
inline void cap_scores(const Attention& op, int64_t num_keys, AttentionScratch& scratch) {
    if (!(op.soft_cap > 0)) return;
    Floats scale = broadcast(op.scale / op.soft_cap);
    for (int64_t i = 0; i < num_keys; ++i) store(scratch.scores[i], tanh(mul(load(scratch.scores[i]), scale)));
}

// Scores are weighed in powers of two: exp(s) = 2^(s log2 e).
inline float score_scale(const Attention& op) { return (op.soft_cap > 0 ? op.soft_cap : op.scale) * kLog2e; }

// Sets scores of keys first + [0, num_keys) that a lane must not see to -inf.
inline void mask_scores(const Attention& op, int64_t tile, int64_t first, int64_t num_keys, AttentionScratch& scratch) {
    Floats position = load(scratch.positions[tile]), hidden = broadcast(-__builtin_inff());
    Floats oldest = op.sliding_window ? sub(position, broadcast((float)op.sliding_window - 1.0f)) : hidden;
    for (int64_t i = 0; i < num_keys; ++i) {
        Floats key = broadcast((float)(first + i)), score = load(scratch.scores[i]);
        store(scratch.scores[i], where_less(position, key, hidden, where_less(key, oldest, hidden, score)));
    }
}

// Whether every lane of a tile sees every key of first + [0, num_keys).
inline bool sees_all(const Attention& op, int64_t tile, int64_t first, int64_t num_keys, const AttentionScratch& scratch) {
    Floats position = load(scratch.positions[tile]);
    float last = -largest(sub(broadcast(0.0f), position));   // the earliest lane's
    if (last < (float)(first + num_keys - 1)) return false;
    return !op.sliding_window || largest(position) - (float)op.sliding_window < (float)first;
}

inline Floats largest_scores(int64_t num_keys, const AttentionScratch& scratch) {
    Floats best[4];
    for (Floats& one : best) one = broadcast(-__builtin_inff());
    int64_t i = 0;
    for (; i + 4 <= num_keys; i += 4)
        for (int j = 0; j < 4; ++j) best[j] = max(load(scratch.scores[i + j]), best[j]);
    for (; i < num_keys; ++i) best[0] = max(load(scratch.scores[i]), best[0]);
    return max(max(best[0], best[1]), max(best[2], best[3]));
}

// weights [16, 128] (tiles of A) = 2^(score * scale - base) times the values' scales, rounded; returns the sums of the powers,
// unrounded, per lane.
template <bool kHasScales>
inline Floats exponentiate(Floats scale, Floats base, int64_t num_keys, AttentionScratch& scratch) {
    Floats sums[2] = {broadcast(0.0f), broadcast(0.0f)}, offset = sub(broadcast(0.0f), base);
    int64_t padded = (num_keys + kDepth - 1) / kDepth * kDepth;
    for (int64_t key = num_keys; key < padded; ++key) store(scratch.scores[key], broadcast(-__builtin_inff()));
#if defined(__AVX512F__)
    for (int64_t first = 0; first < padded; first += kDepth) {
        __m512i pairs[kLanes];   // [pair of keys][lane]
        for (int i = 0; i < kLanes; ++i) {
            Floats even = exp2_down(fma(load(scratch.scores[first + 2 * i]), scale, offset));
            Floats odd = exp2_down(fma(load(scratch.scores[first + 2 * i + 1]), scale, offset));
            sums[0] = add(sums[0], even);
            sums[1] = add(sums[1], odd);
            const float* scales = scratch.value_scales + first + 2 * i;
            pairs[i] = narrow_pairs(weigh<kHasScales>(even, scales), weigh<kHasScales>(odd, scales + 1));
        }
        transpose(pairs);
        for (int i = 0; i < kLanes; ++i) _mm512_store_si512(&scratch.weights[i][first], pairs[i]);
    }
#else
    for (int64_t key = 0; key < padded; ++key) {
        Floats weight = exp2_down(fma(load(scratch.scores[key]), scale, offset));
        sums[key % 2] = add(sums[key % 2], weight);
        bf16 rounded[kLanes];
        store(rounded, weigh<kHasScales>(weight, scratch.value_scales + key));
        for (int i = 0; i < kLanes; ++i) scratch.weights[i][key] = rounded[i];
    }
#endif
    return add(sums[0], sums[1]);
}

#if WAVETRAIN_AMX
// value [16, kTiles * 16] += weights times values of dimensions [d, d + kTiles * 16).
template <int kTiles>
inline void multiply_value_tiles(float* value, int64_t d, int64_t steps, const AttentionScratch& scratch) {
    constexpr int64_t stride = kMaxHeadDim * sizeof(float);
    _tile_loadd(0, value, stride);
    _tile_loadd(1, value + kTile, stride);
    if (kTiles == 4) {
        _tile_loadd(2, value + 2 * kTile, stride);
        _tile_loadd(3, value + 3 * kTile, stride);
    }
    for (int64_t step = 0; step < steps; ++step) {
        const bf16(*tiles)[kTileElements] = scratch.values[step] + d / kTile;
        _tile_loadd(4, &scratch.weights[0][step * kDepth], sizeof scratch.weights[0]);
        _tile_loadd(5, tiles[0], 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, tiles[1], 64);
        _tile_dpbf16ps(1, 4, 6);
        if (kTiles == 4) {
            _tile_loadd(7, tiles[2], 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, tiles[3], 64);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, value, stride);
    _tile_stored(1, value + kTile, stride);
    if (kTiles == 4) {
        _tile_stored(2, value + 2 * kTile, stride);
        _tile_stored(3, value + 3 * kTile, stride);
    }
}
#else
// value [kCount, 32] += weights of lanes from `lane` on times values of dimensions [d, d + 32). Lanes past the last are
// computed along and never looked at.
template <int kCount>
inline void multiply_some_values(float* value, int64_t lane, int64_t d, int64_t steps, const AttentionScratch& scratch) {
    Floats sums[kCount][2];
    for (int i = 0; i < kCount; ++i)
        for (int half = 0; half < 2; ++half) sums[i][half] = load(value + i * kMaxHeadDim + half * kTile);
    for (int64_t step = 0; step < steps; ++step)
        for (int pair = 0; pair < kDepth / 2; ++pair) {
            const bf16 *low = &scratch.values[step][d / kTile][pair * kTileRow], *high = low + kTileElements;
            for (int i = 0; i < kCount; ++i) {
                int32_t weights = pair_at(&scratch.weights[lane + i][step * kDepth + pair * 2]);
                sums[i][0] = multiply_pair(sums[i][0], weights, low);
                sums[i][1] = multiply_pair(sums[i][1], weights, high);
            }
        }
    for (int i = 0; i < kCount; ++i)
        for (int half = 0; half < 2; ++half) store(value + i * kMaxHeadDim + half * kTile, sums[i][half]);
}
#endif

// sums.value = sums.value * factor + weights times values, for the lanes of one tile.
inline void multiply_values(const Attention& op, int64_t tile, int64_t lanes, int64_t num_keys, Floats factor, AttentionScratch& scratch) {
    float(*value)[kMaxHeadDim] = scratch.part[tile].value;
    if (any_differs(factor, broadcast(1.0f))) {
        float factors[kLanes];
        store(factors, factor);
        for (int64_t lane = 0; lane < lanes; ++lane)
            for (int64_t d = 0; d < op.padded_dim(); d += kLanes)
                store(value[lane] + d, mul(load(value[lane] + d), broadcast(factors[lane])));
    }
    int64_t steps = (num_keys + kDepth - 1) / kDepth;
#if WAVETRAIN_AMX
    int64_t d = 0;
    for (; d + 4 * kTile <= op.padded_dim(); d += 4 * kTile) multiply_value_tiles<4>(value[0] + d, d, steps, scratch);
    if (d < op.padded_dim()) multiply_value_tiles<2>(value[0] + d, d, steps, scratch);
#else
    for (int64_t lane = 0; lane < lanes; lane += kLanesAtOnce)
        for (int64_t d = 0; d < op.padded_dim(); d += 2 * kTile)
            lanes - lane == 1 ? multiply_some_values<1>(value[lane] + d, lane, d, steps, scratch)
                              : multiply_some_values<kLanesAtOnce>(value[lane] + d, lane, d, steps, scratch);
#endif
}

inline void clear(Sums& sums, const Attention& op) {
    store(sums.largest, broadcast(-__builtin_inff()));
    store(sums.weight, broadcast(0.0f));
    for (int lane = 0; lane < kLanes; ++lane) memset(sums.value[lane], 0, (size_t)op.padded_dim() * sizeof(float));
}

// 2^(from - to), where from <= to; 0 where nothing was seen yet.
inline Floats rescale(Floats from, Floats to) { return exp2(sub(from, to)); }

// A lane that sees no key yet has the largest score -inf: weights are then computed against 0, and are 0.
inline Floats finite(Floats largest) { return where_less(largest, broadcast(-3e38f), broadcast(0.0f), largest); }

inline void prefetch_lines(const void* from, int64_t bytes) {
    // Not __builtin_prefetch: GCC takes a function of nothing else for one without effect, and drops its calls.
    for (int64_t line = 0; line < bytes; line += 64) asm volatile("prefetcht1 %0" ::"m"(((const char*)from)[line]));
}

// Asks for the keys and values of a later step while this one is computed.
inline void prefetch(const Attention& op, const Lanes& lanes, int64_t first, int64_t end) {
    for (int64_t position = first; position < end; position += op.block_size) {
        int64_t count = smaller(op.block_size - position % op.block_size, end - position);
        int64_t row = cached_row(op, lanes.row, lanes.head, position);
        prefetch_lines(op.key_cache + row * op.row_bytes(), count * op.row_bytes());
        prefetch_lines(op.value_cache + row * op.row_bytes(), count * op.row_bytes());
        if (!op.has_scales()) continue;
        prefetch_lines(op.key_scales + row, count * (int64_t)sizeof(bf16));
        prefetch_lines(op.value_scales + row, count * (int64_t)sizeof(bf16));
    }
}

// scratch.part[slot] += the sums of keys first + [0, num_keys) for one tile of lanes, whose keys and values are loaded.
inline void sum_step(const Attention& op, const KeyTiles& keys, int64_t slot, int64_t lanes, int64_t first, int64_t num_keys,
                     AttentionScratch& scratch) {
    Sums& sums = scratch.part[slot];
    multiply_keys(op, keys, slot, num_keys, scratch);
    cap_scores(op, num_keys, scratch);
    if (!sees_all(op, slot, first, num_keys, scratch)) mask_scores(op, slot, first, num_keys, scratch);
    Floats scale = broadcast(score_scale(op)), before = load(sums.largest);
    Floats largest = max(mul(largest_scores(num_keys, scratch), scale), before);
    Floats base = finite(largest), factor = rescale(before, base);
    Floats weight = op.has_scales() ? exponentiate<true>(scale, base, num_keys, scratch)
                                    : exponentiate<false>(scale, base, num_keys, scratch);
    store(sums.largest, largest);
    store(sums.weight, fma(load(sums.weight), factor, weight));
    multiply_values(op, slot, lanes, num_keys, factor, scratch);
}

// scratch.part = the sums of keys [first, end) of one partition. Heads take turns, step by step: what they read lies side by side.
inline void sum_partition(const Attention& op, const Lanes& lanes, int64_t first, int64_t end, AttentionScratch& scratch) {
    for (int64_t slot = 0; slot < lanes.num_heads * lanes.num_tiles(); ++slot) clear(scratch.part[slot], op);
    for (int64_t start = first; start < end; start += kKeys) {
        int64_t num_keys = smaller(kKeys, end - start);
        for (int64_t i = 0; i < lanes.num_heads; ++i) {
            Lanes one = lanes.of_head(i);
            prefetch(op, one, start + num_keys, smaller(end, start + 2 * kKeys));
            KeyTiles keys = load_step(op, one, start, end, scratch);
            for (int64_t tile = 0; tile < one.num_tiles(); ++tile)
                sum_step(op, keys, i + tile, smaller(kLanes, lanes.num_lanes - tile * kLanes), start, num_keys, scratch);
        }
    }
}

// total = total and part together.
inline void merge(Sums& total, const Sums& part, const Attention& op) {
    Floats one = load(total.largest), two = load(part.largest), largest = max(two, one), base = finite(largest);
    float ones[kLanes], twos[kLanes];
    store(ones, rescale(one, base));
    store(twos, rescale(two, base));
    store(total.largest, largest);
    store(total.weight, fma(load(part.weight), load(twos), mul(load(total.weight), load(ones))));
    for (int lane = 0; lane < kLanes; ++lane)
        for (int64_t d = 0; d < op.padded_dim(); d += kLanes) {
            float* value = total.value[lane] + d;
            Floats before = mul(load(value), broadcast(ones[lane]));
            store(value, fma(load(part.value[lane] + d), broadcast(twos[lane]), before));
        }
}

inline void copy(Sums& to, const Sums& from, const Attention& op) {
    memcpy(to.largest, from.largest, sizeof to.largest);
    memcpy(to.weight, from.weight, sizeof to.weight);
    for (int lane = 0; lane < kLanes; ++lane) memcpy(to.value[lane], from.value[lane], (size_t)op.padded_dim() * sizeof(float));
}

inline void write_out(const Attention& op, const Lanes& lanes, int64_t tile, const Sums& sums) {
    for (int64_t i = 0; i < smaller(kLanes, lanes.num_lanes - tile * kLanes); ++i) {
        int64_t lane = tile * kLanes + i;
        Floats weight = broadcast(sums.weight[i]);
        bf16* to = op.out + (token_of(op, lanes, lane) * op.num_heads + head_of(op, lanes, lane)) * op.head_dim;
        for (int64_t d = 0; d < op.head_dim; d += kLanes) {
            Floats value = div(load(sums.value[i] + d), weight);
            if (op.head_dim - d >= kLanes) store(to + d, value);
            else store(to + d, value, (int)(op.head_dim - d));
        }
    }
}

// Some lanes over keys [begin, end); `part`: where the sums of one partition go, null where the lanes are done whole.
struct Unit {
    Lanes lanes;
    int64_t begin, end;
    Sums* part;
};

// Hands the sums of every tile of a unit, as they are after all its keys, to where they go.
inline void finish_unit(const Attention& op, const Unit& unit, const Sums* sums) {
    for (int64_t i = 0; i < unit.lanes.num_heads; ++i)
        for (int64_t tile = 0; tile < unit.lanes.num_tiles(); ++tile)
            if (unit.part) copy(*unit.part, sums[i + tile], op);
            else write_out(op, unit.lanes.of_head(i), tile, sums[i + tile]);
}

inline void run_unit(const Attention& op, const Unit& unit, AttentionScratch& scratch) {
    int64_t slots = unit.lanes.num_heads * unit.lanes.num_tiles();
    for (int64_t i = 0; i < unit.lanes.num_heads; ++i) load_queries(op, unit.lanes.of_head(i), i, scratch);
    const Sums* sums = scratch.part;
    for (int64_t begin = unit.begin; begin < unit.end;) {
        int64_t end = smaller(unit.end, (begin / kPartition + 1) * kPartition);
        sum_partition(op, unit.lanes, begin, end, scratch);
        if (begin != unit.begin || end != unit.end) {
            for (int64_t slot = 0; slot < slots; ++slot)
                if (begin == unit.begin) copy(scratch.total[slot], scratch.part[slot], op);
                else merge(scratch.total[slot], scratch.part[slot], op);
            sums = scratch.total;
        }
        begin = end;
    }
    finish_unit(op, unit, sums);
}

// The keys that some lanes see, from the start of a step on.
inline void set_keys(const Attention& op, Unit& unit) {
    unit.end = position_of(op, unit.lanes, unit.lanes.num_lanes - 1) + 1;
    int64_t oldest = op.sliding_window ? position_of(op, unit.lanes, 0) - op.sliding_window + 1 : 0;
    unit.begin = greater(oldest, 0) / kKeys * kKeys;
}

// Lists the work of all rows and heads, long contexts first within a row; returns how much there is.
// heads_at_once: key-value heads that rows of a single tile are given to a thread by.
inline int64_t list_units(const Attention& op, int64_t heads_at_once, Unit* units) {
    int64_t count = 0;
    for (int64_t row = 0; row < op.num_rows; ++row) {
        int64_t num_lanes = (op.query_start_loc[row + 1] - op.query_start_loc[row]) * op.group();
        int64_t pieces = (num_lanes + kMaxTiles * kLanes - 1) / (kMaxTiles * kLanes);
        int64_t step = num_lanes <= kLanes ? heads_at_once : 1;
        for (int64_t piece = pieces - 1; piece >= 0; --piece)
            for (int64_t head = 0; head < op.num_kv_heads; head += step) {
                int64_t first = piece * kMaxTiles * kLanes;
                Unit& unit = units[count++];
                unit.lanes = {row, head, smaller(step, op.num_kv_heads - head), first, smaller(kMaxTiles * kLanes, num_lanes - first)};
                unit.part = nullptr;
                set_keys(op, unit);
            }
    }
    return count;
}

// Puts the partitions of a unit, consecutive in `pieces`, together in their order.
inline void join_pieces(const Attention& op, const Unit& unit, const Unit* piece) {
    Sums total;
    copy(total, *piece->part, op);
    for (int64_t end = piece->end; end < unit.end; end = piece->end) merge(total, *(++piece)->part, op);
    write_out(op, unit.lanes, 0, total);
}

// How the work of one call is cut up, at the start of its workspace; the arrays follow.
struct alignas(64) Plan {
    int64_t num_units, num_pieces;   // no pieces: every unit is done whole
    Sums* parts;                     // [max_pieces]
    Unit *pieces, *units;            // [max_pieces], one for every 64 lanes of a row and key-value head
};

// Cuts units of one tile into partitions where there are too few to go round; returns how many there are then, or 0.
inline int64_t split_units(const Plan& plan, int64_t max_pieces) {
    int64_t num_pieces = 0;
    for (int64_t i = 0; i < plan.num_units; ++i) {
        const Unit& unit = plan.units[i];
        if (unit.lanes.num_tiles() > 1) return 0;
        for (int64_t begin = unit.begin; begin < unit.end;) {
            if (num_pieces == max_pieces) return 0;
            int64_t end = smaller(unit.end, (begin / kPartition + 1) * kPartition);
            plan.pieces[num_pieces] = {unit.lanes, begin, end, plan.parts + num_pieces};
            begin = end;
            ++num_pieces;
        }
    }
    return num_pieces == plan.num_units ? 0 : num_pieces;
}

inline void make_plan(const Attention& op, Plan& plan) {
    constexpr int64_t kUnitsPerThread = 4;
    plan.parts = (Sums*)(op.workspace + sizeof(Plan));
    plan.pieces = (Unit*)(plan.parts + op.max_pieces);
    plan.units = plan.pieces + op.max_pieces;
    int64_t enough = kUnitsPerThread * omp_get_num_threads();
    // Two heads of 64 dimensions and a block of 16 tokens are a page of 4 KiB, within which the processor prefetches.
    plan.num_units = list_units(op, op.num_rows * op.num_kv_heads >= 2 * enough ? 2 : 1, plan.units);
    plan.num_pieces = plan.num_units < enough ? split_units(plan, op.max_pieces) : 0;
}

inline void run(const Attention& op) {
    Plan& plan = *(Plan*)op.workspace;
#pragma omp single
    make_plan(op, plan);
    AttentionScratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < (plan.num_pieces ? plan.num_pieces : plan.num_units); ++i)
        run_unit(op, plan.num_pieces ? plan.pieces[i] : plan.units[i], scratch);
    if (!plan.num_pieces) return;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < plan.num_units; ++i) {
        const Unit *unit = plan.units + i, *piece = plan.pieces;
        while (piece->lanes.row != unit->lanes.row || piece->lanes.head != unit->lanes.head) ++piece;
        join_pieces(op, *unit, piece);
    }
}

}  // namespace wavetrain
