// Attention over a paged KV cache: decode and chunked prefill alike, float32 sums, grouped-query heads.
//
// A work item is some query rows of one request with one or more KV heads. It walks the request's keys in tiles of 64,
// counted from the first key of each span of virtual positions and from the first real token, never from the chunk or
// the block, and keeps for each row a running peak, sum and weighted values (the online softmax of Milakov and
// Gimelshein 2018, arXiv:1805.02867). What a row computes is a function of its query, its own visible keys, in their
// order, and the log-gates of their spans:
//   score = the chain over the head's elements, capped, plus the log-gate;
//   sum = one chain per lane over the tiles; out = the chain over the keys.
// Rows computed together only share loads. A key that a row does not see has no part in its sums, not even a 0.
#include "lanes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include <omp.h>

namespace weft {
namespace {

constexpr int TILE = 64;        // keys
constexpr int GROUPS = TILE / 16;
constexpr int ROWS = 4;         // query rows whose sums stay in registers
constexpr int64_t CHUNK_ROWS = 64;          // query rows that share the packing of a tile
constexpr int64_t SERIAL_BELOW = 64 << 10;  // multiply-adds under which waking a second thread costs more than it saves
constexpr float NEVER = -std::numeric_limits<float>::infinity();

struct Cache {
    const void *keys, *values;
    int64_t num_blocks, block_size, kv_heads, head;
};

struct Batch {
    const int32_t *query_start, *context_lens, *virtual_lens, *block_tables;
    const float *log_gates;     // by query row and span; null where all are 0
    int64_t num_requests, table_stride, num_spans, num_gate_rows;  // the stride: columns of the block table
};

struct Call {
    const void *query;
    int64_t token_stride, head_stride;
    void *out;
    int64_t num_tokens, query_heads, is_bf16, window, threads;
    double scale, softcap;
    Cache cache;
    Batch batch;
};

static inline int64_t blocks_of(int64_t tokens, int64_t block_size) { return (tokens + block_size - 1) / block_size; }

static inline float largest(f32x16 v) {
    auto fold = [&v](i32x16 order) {
        f32x16 w = __builtin_shuffle(v, order);
        v = w > v ? w : v;
    };
    fold(i32x16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    fold(i32x16{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    fold(i32x16{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    fold(i32x16{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
    return v[0];
}

// Sixteen rows of sixteen words become sixteen columns, written `stride` words apart.
static inline void transpose(const void *const rows[16], int64_t offset, uint32_t *to, int64_t stride) {
    u32x16 a[16], b[16];
    constexpr i32x16 LOW1 = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
    constexpr i32x16 HIGH1 = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
    constexpr i32x16 LOW2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    constexpr i32x16 HIGH2 = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
    constexpr i32x16 EVEN4 = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    constexpr i32x16 ODD4 = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
    EACH(i, 16) a[i] = read<u32x16>((const char *)rows[i] + offset);
    EACH(i, 8) {  // pairs of rows
        b[2 * i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], LOW1);
        b[2 * i + 1] = __builtin_shuffle(a[2 * i], a[2 * i + 1], HIGH1);
    }
    EACH(i, 4) {  // quads of rows: a[4 i + j] has, in its quarter q, word 4 q + j of rows 4 i .. 4 i + 3
        a[4 * i] = __builtin_shuffle(b[4 * i], b[4 * i + 2], LOW2);
        a[4 * i + 1] = __builtin_shuffle(b[4 * i], b[4 * i + 2], HIGH2);
        a[4 * i + 2] = __builtin_shuffle(b[4 * i + 1], b[4 * i + 3], LOW2);
        a[4 * i + 3] = __builtin_shuffle(b[4 * i + 1], b[4 * i + 3], HIGH2);
    }
    EACH(j, 4) {
        u32x16 even_low = __builtin_shuffle(a[j], a[4 + j], EVEN4);  // words j and 8 + j of rows 0-3, then of rows 4-7
        u32x16 odd_low = __builtin_shuffle(a[j], a[4 + j], ODD4);    // words 4 + j and 12 + j
        u32x16 even_high = __builtin_shuffle(a[8 + j], a[12 + j], EVEN4);  // the same of rows 8-11, 12-15
        u32x16 odd_high = __builtin_shuffle(a[8 + j], a[12 + j], ODD4);
        write(to + j * stride, __builtin_shuffle(even_low, even_high, EVEN4));
        write(to + (8 + j) * stride, __builtin_shuffle(even_low, even_high, ODD4));
        write(to + (4 + j) * stride, __builtin_shuffle(odd_low, odd_high, EVEN4));
        write(to + (12 + j) * stride, __builtin_shuffle(odd_low, odd_high, ODD4));
    }
}

// The cache lines of the next tile. All at once they would wait for memory as long as this tile takes to compute;
// so they are asked for a few at a time, between the computations.
struct Ahead {
    static constexpr int STEP = 8;
    std::vector<const char *> lines;
    const char **next, **end;  // a multiple of STEP apart

    explicit Ahead(int64_t lines_max) : lines(lines_max), next(lines.data()), end(next) {}

    template <int COUNT>
    void pull() {
        static_assert(STEP % COUNT == 0, "as many as are left, or none");
        if (next == end) return;
        EACH(i, COUNT) __builtin_prefetch(next[i], 0, 2);
        next += COUNT;
    }
};

// scores[r][key] = q[r] . key, for R rows and G groups of sixteen keys. `keys`: [head][TILE] float32, or
// [head / 2][TILE] pairs of bfloat16.
template <int R, int G, class T>
void score(const float *q, int64_t q_stride, const uint32_t *keys, int64_t head, float *scores, Ahead &ahead) {
    f32x16 acc[R][G] = {};
    if (sizeof(T) == 2) {
        for (int64_t d = 0; d < head; d += 2, keys += TILE) {
            ahead.pull<2>();
            EACH(g, G) {
                u32x16 pair = read<u32x16>(keys + g * 16);
                f32x16 first = even(pair), second = odd(pair);
                EACH(r, R) {
                    acc[r][g] = fma(q[r * q_stride + d], first, acc[r][g]);
                    acc[r][g] = fma(q[r * q_stride + d + 1], second, acc[r][g]);
                }
            }
        }
    } else {
        for (int64_t d = 0; d < head; d++, keys += TILE) {
            ahead.pull<2>();
            EACH(g, G) {
                f32x16 key = read<f32x16>(keys + g * 16);
                EACH(r, R) acc[r][g] = fma(q[r * q_stride + d], key, acc[r][g]);
            }
        }
    }
    EACH(r, R) {
        EACH(g, G) write(scores + r * TILE + g * 16, acc[r][g]);
    }
}

template <int R, class T>
void score(const float *q, int64_t q_stride, const uint32_t *keys, int64_t head, float *scores, int groups,
           Ahead &ahead) {
    if (groups == 1) score<R, 1, T>(q, q_stride, keys, head, scores, ahead);
    else if (groups == 2) score<R, 2, T>(q, q_stride, keys, head, scores, ahead);
    else score<R, GROUPS, T>(q, q_stride, keys, head, scores, ahead);
}

// acc[r] += sum over the keys begin .. end - 1 of weights[r][key] * values[key], for R rows.
template <int R, int U, class T>
void weigh(const float *weights, const T *const *values, int begin, int end, int64_t head, float *acc, int64_t d,
           Ahead &ahead) {
    constexpr Order ORDER = order_of<T>();
    f32x16 lo[R][U], hi[R][U];
    EACH(r, R) {
        EACH(u, U) {
            lo[r][u] = read<f32x16>(acc + r * head + d + u * UNIT);
            hi[r][u] = read<f32x16>(acc + r * head + d + u * UNIT + 16);
        }
    }
    for (int j = begin; j < end; j++) {
        ahead.pull<sizeof(T)>();
        EACH(u, U) {
            Unit value = load<ORDER>(values[j] + d + u * UNIT);
            EACH(r, R) {
                lo[r][u] = fma(weights[r * TILE + j], value.lo, lo[r][u]);
                hi[r][u] = fma(weights[r * TILE + j], value.hi, hi[r][u]);
            }
        }
    }
    EACH(r, R) {
        EACH(u, U) {
            write(acc + r * head + d + u * UNIT, lo[r][u]);
            write(acc + r * head + d + u * UNIT + 16, hi[r][u]);
        }
    }
}

template <int R, class T>
void weigh(const float *weights, const T *const *values, int begin, int end, int64_t head, float *acc, Ahead &ahead) {
    if (begin >= end) return;
    int64_t d = 0;
    for (; d + 2 * UNIT <= head; d += 2 * UNIT) weigh<R, 2, T>(weights, values, begin, end, head, acc, d, ahead);
    if (d < head) weigh<R, 1, T>(weights, values, begin, end, head, acc, d, ahead);
}

// Sixty-four places for keys, of which from .. to - 1 are read.
struct Tile {
    const int32_t *blocks;
    int64_t start, from, to, keys_end;
};

// The queries first .. first + count - 1 of a request with the KV heads head_begin .. head_end - 1.
struct Item {
    int64_t request, first, count, head_begin, head_end, cost;
};

// Computes items; its scratch serves one thread for the whole call. Rows are ordered by KV head, token, query head.
template <class T>
struct Worker {
    const Call &call;
    const int64_t group, head, padded;  // query heads per KV head; head size, and that rounded up to whole units
    std::vector<float> q, acc, sums;    // [rows, padded], the same in the order of T, [rows, 16]
    std::vector<float> peaks;           // [rows]
    std::vector<uint32_t> packed_keys;  // [padded] or [padded / 2] by TILE
    std::vector<T> padded_rows;         // [TILE + 1, padded]: keys or values copied out of the cache, and zeros
    const T *keys[TILE], *values[TILE];
    Ahead ahead;
    const Item *next = nullptr;

    Worker(const Call &call, int64_t rows)
        : call(call),
          group(call.query_heads / call.cache.kv_heads),
          head(call.cache.head),
          padded((head + UNIT - 1) / UNIT * UNIT),
          q(rows * padded),
          acc(rows * padded),
          sums(rows * 16),
          peaks(rows),
          packed_keys(padded * TILE * sizeof(T) / 4),
          padded_rows((TILE + 1) * padded),
          ahead(2 * (TILE + call.cache.kv_heads) * (head * sizeof(T) / 64 + 1) + Ahead::STEP) {}

    // `following` is what this thread most likely computes next, or null.
    void run(const Item &item, const Item *following) {
        next = following;
        const Batch &b = call.batch;
        const int64_t start = b.query_start[item.request], queries = b.query_start[item.request + 1] - start;
        const int64_t rows = item.count * group, all_rows = (item.head_end - item.head_begin) * rows;
        auto offset_of = [&](int64_t row, int64_t token_stride, int64_t head_stride) {  // of a row's query or result
            const int64_t token = start + item.first + row % rows / group;
            return token * token_stride + ((item.head_begin + row / rows) * group + row % group) * head_stride;
        };
        std::fill_n(acc.begin(), all_rows * padded, 0.0f);
        std::fill_n(sums.begin(), all_rows * 16, 0.0f);
        std::fill_n(peaks.begin(), all_rows, NEVER);
        for (int64_t r = 0; r < all_rows; r++) {
            const T *from = (const T *)call.query + offset_of(r, call.token_stride, call.head_stride);
            for (int64_t d = 0; d < head; d++) q[r * padded + d] = as_float(from[d]) * float(call.scale);
        }

        const int32_t *blocks = b.block_tables + item.request * b.table_stride;
        const int32_t *lengths = b.virtual_lens + item.request * b.num_spans;
        const int64_t first_real = b.context_lens[item.request] - queries + item.first;  // index of the first query
        int64_t position = first_real + std::accumulate(lengths, lengths + b.num_spans, int64_t(0));
        for (int64_t s = 0; s < b.num_spans; s++) {
            const float *gates = b.log_gates ? b.log_gates + (start + item.first) * b.num_spans + s : nullptr;
            walk(item, blocks, lengths[s], position, false, gates);
            blocks += blocks_of(lengths[s], call.cache.block_size);
            position -= lengths[s];
        }
        walk(item, blocks, first_real + item.count, first_real, true, nullptr);

        for (int64_t r = 0; r < all_rows; r++) {
            const f32x16 share = splat(1.0f / sum(read<f32x16>(&sums[r * 16])));
            T *to = (T *)call.out + offset_of(r, call.query_heads * head, head);
            for (int64_t d = 0; d < head; d += UNIT) {
                const float *from = &acc[r * padded + d];
                const Unit v = {read<f32x16>(from) * share, read<f32x16>(from + 16) * share};
                if (d + UNIT <= head) store<order_of<T>()>(to + d, v);
                else store_part<order_of<T>()>(to + d, head - d, v);
            }
        }
    }

    // The keys 0 .. keys_end - 1 of one span, or the real ones. Counted like them, the item's first query is at
    // `position`; a query sees the keys less than a window before it and, where `is_causal`, none after it. `gates`
    // has the log-gate of the item's first query, and a row of spans further the next one's; null means 0 for all.
    void walk(const Item &item, const int32_t *blocks, int64_t keys_end, int64_t position, bool is_causal,
              const float *gates) {
        const int64_t window = call.window ? call.window : std::numeric_limits<int64_t>::max() / 2;
        const int64_t begin = std::max<int64_t>(0, position - window + 1), rows = item.count * group;
        auto gate_of = [&](int64_t query) { return gates ? gates[query * call.batch.num_spans] : 0.0f; };
        bool is_seen = false;
        for (int64_t query = 0; query < item.count; query++) is_seen |= gate_of(query) != NEVER;
        if (!is_seen) return;
        for (int64_t start = begin / TILE * TILE; start < keys_end; start += TILE) {
            const Tile tile = {blocks, start, std::max(begin, start), std::min(start + TILE, keys_end), keys_end};
            for (int64_t h = item.head_begin; h < item.head_end; h++) {
                look_ahead(tile, item, h, is_causal);
                gather(tile, h, rows);
                for (int64_t r = 0; r < rows; r += ROWS) {
                    const int here = int(std::min<int64_t>(ROWS, rows - r));
                    int begins[ROWS], ends[ROWS];
                    float shifts[ROWS];
                    for (int i = 0; i < here; i++) {
                        const int64_t p = position + (r + i) / group, end = is_causal ? p + 1 : keys_end;
                        shifts[i] = gate_of((r + i) / group);
                        begins[i] = int(std::clamp<int64_t>(p - window + 1 - start, 0, TILE));
                        ends[i] = shifts[i] == NEVER ? 0 : int(std::clamp<int64_t>(end - start, 0, tile.to - start));
                    }
                    step((h - item.head_begin) * rows + r, here, begins, ends, shifts);
                }
            }
        }
    }

    static float as_float(float v) { return v; }
    static float as_float(bf16 v) { return bits_as<float>(uint32_t(v.bits) << 16); }

    // Calls take(index, row) for the keys or values index .. end - 1 of a KV head.
    template <class Take>
    void locate(const void *cache, const int32_t *blocks, int64_t h, int64_t index, int64_t end, Take take) const {
        const Cache &c = call.cache;
        while (index < end) {
            const int64_t block = index / c.block_size, block_end = std::min(end, (block + 1) * c.block_size);
            const int64_t token = blocks[block] * c.block_size + index % c.block_size;
            const T *row = (const T *)cache + (token * c.kv_heads + h) * head;
            for (; index < block_end; index++, row += c.kv_heads * head) take(index, row);
        }
    }

    // List the next tile's lines: with each head an equal share of its tokens, each with all the item's heads, since
    // these lie side by side. After an item's last tile comes the first one of the next item.
    void look_ahead(const Tile &tile, const Item &item, int64_t h, bool is_last_walk) {
        const int64_t heads = item.head_end - item.head_begin, share = (TILE + heads - 1) / heads;
        const int64_t begin = (h - item.head_begin) * share;
        const char **last = ahead.next = ahead.end = ahead.lines.data();
        auto list = [&](const int32_t *blocks, int64_t head_begin, int64_t from, int64_t to) {
            auto take = [&](int64_t, const T *row) {
                for (int64_t d = 0; d < heads * head; d += 64 / sizeof(T)) *last++ = (const char *)(row + d);
            };
            locate(call.cache.keys, blocks, head_begin, from, to, take);
            locate(call.cache.values, blocks, head_begin, from, to, take);
        };
        if (tile.to < tile.keys_end) {
            list(tile.blocks, item.head_begin, tile.to + begin, std::min(tile.to + begin + share, tile.keys_end));
        } else if (is_last_walk && next && next->head_end - next->head_begin == heads && !call.window) {
            const Batch &b = call.batch;
            const int64_t real = b.context_lens[next->request];
            const int64_t end = b.num_spans ? b.virtual_lens[next->request * b.num_spans] : 0;
            list(b.block_tables + next->request * b.table_stride, next->head_begin, begin,
                 std::min({begin + share, int64_t(TILE), end ? end : real}));
        }
        for (; (last - ahead.next) % Ahead::STEP; last++) *last = last[-1];
        ahead.end = last;
    }

    // Point `values` at the tile's rows and pack its keys. Rows outside from .. to - 1 are never read but stood in for.
    void gather(const Tile &tile, int64_t h, int64_t rows) {
        auto point = [&](const void *cache, const T **at) {
            std::fill_n(at, TILE, &padded_rows[TILE * padded]);
            auto take = [&](int64_t index, const T *row) { at[index - tile.start] = row; };
            locate(cache, tile.blocks, h, tile.from, tile.to, take);
        };
        auto copy = [&](const T **at) {  // one after another, each in whole units with zeros at its end
            for (int64_t j = 0; j < TILE; j++) {
                memcpy(&padded_rows[j * padded], at[j], head * sizeof(T));
                at[j] = &padded_rows[j * padded];
            }
        };
        point(call.cache.keys, keys);
        if (head != padded) copy(keys);
        const int64_t words = padded * sizeof(T) / 4;
        for (int64_t g = (tile.from - tile.start) / 16; g * 16 < tile.to - tile.start; g++)
            for (int64_t w = 0; w < words; w += 16) {
                ahead.pull<8>();
                transpose((const void *const *)&keys[g * 16], w * 4, &packed_keys[w * TILE + g * 16], TILE);
            }
        point(call.cache.values, values);
        if (head != padded || rows > 2 * ROWS) copy(values);  // many rows read them many times: keep them in L1
    }

    // One tile for the rows r .. r + here - 1, of which row r + i sees the keys begins[i] .. ends[i] - 1 of the tile,
    // with shifts[i] added to their scores.
    void step(int64_t r, int here, const int *begins, const int *ends, const float *shifts) {
        float scores[ROWS * TILE];
        int common_begin = 0, common_end = TILE, last = 0;
        for (int i = 0; i < here; i++) {
            if (begins[i] >= ends[i]) continue;
            last = std::max(last, ends[i]);
            common_begin = std::max(common_begin, begins[i]);
            common_end = std::min(common_end, ends[i]);
        }
        if (last == 0) return;
        const int groups = (last + 15) / 16;
        const float *queries = &q[r * padded];
        if (here == 4) score<4, T>(queries, padded, packed_keys.data(), head, scores, groups, ahead);
        else if (here == 3) score<3, T>(queries, padded, packed_keys.data(), head, scores, groups, ahead);
        else if (here == 2) score<2, T>(queries, padded, packed_keys.data(), head, scores, groups, ahead);
        else score<1, T>(queries, padded, packed_keys.data(), head, scores, groups, ahead);

        bool is_together = true;
        for (int i = 0; i < here; i++) {
            if (begins[i] < ends[i]) weights_of(r + i, scores + i * TILE, begins[i], ends[i], groups, shifts[i]);
            else is_together = false;
        }
        float *sums_of = &acc[r * padded];
        if (is_together && common_begin < common_end) {
            for (int i = 0; i < here; i++)
                weigh<1, T>(scores + i * TILE, values, begins[i], common_begin, padded, sums_of + i * padded, ahead);
            if (here == 4) weigh<4, T>(scores, values, common_begin, common_end, padded, sums_of, ahead);
            else if (here == 3) weigh<3, T>(scores, values, common_begin, common_end, padded, sums_of, ahead);
            else if (here == 2) weigh<2, T>(scores, values, common_begin, common_end, padded, sums_of, ahead);
            else weigh<1, T>(scores, values, common_begin, common_end, padded, sums_of, ahead);
            for (int i = 0; i < here; i++)
                weigh<1, T>(scores + i * TILE, values, common_end, ends[i], padded, sums_of + i * padded, ahead);
        } else {
            for (int i = 0; i < here; i++)
                weigh<1, T>(scores + i * TILE, values, begins[i], ends[i], padded, sums_of + i * padded, ahead);
        }
    }

    // Scores become weights relative to the row's running peak; what it has summed so far is brought to that peak.
    void weights_of(int64_t row, float *scores, int begin, int end, int groups, float shift) {
        constexpr i32x16 LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const float cap = float(call.softcap);
        f32x16 s[GROUPS], top = splat(NEVER);
        for (int g = begin / 16; g < groups; g++) {
            s[g] = read<f32x16>(scores + g * 16);
            if (cap != 0.0f) s[g] = cap * tanh_of(s[g] / cap);
            s[g] += shift;
            const i32x16 key = LANE + g * 16;
            s[g] = (key >= begin) & (key < end) ? s[g] : splat(NEVER);
            top = s[g] > top ? s[g] : top;
        }
        const float before = peaks[row], peak = std::max(before, largest(top));
        float *total = &sums[row * 16];
        if (peak != before) {
            peaks[row] = peak;
            const f32x16 shrink = exp_of(splat(before - peak));
            write(total, read<f32x16>(total) * shrink);
            for (float *at = &acc[row * padded]; at != &acc[row * padded] + padded; at += 16)
                write(at, read<f32x16>(at) * shrink);
        }
        const float zero = peak == NEVER ? 0.0f : peak;  // where all scores so far are -inf, all weights are 0
        f32x16 added = read<f32x16>(total);
        for (int g = begin / 16; g < groups; g++) {
            const f32x16 weight = exp_of(s[g] - zero);
            write(scores + g * 16, weight);
            added += weight;
        }
        write(total, added);
    }
};

Status check(const Call &call) {
    const Cache &c = call.cache;
    const Batch &b = call.batch;
    if (b.query_start[0] != 0 || b.query_start[b.num_requests] != call.num_tokens) return BAD_LENGTHS;
    if (b.log_gates && b.num_gate_rows != call.num_tokens) return BAD_LOG_GATES;
    for (int64_t i = 0; i < b.num_requests; i++) {
        const int64_t queries = int64_t(b.query_start[i + 1]) - b.query_start[i];
        const int64_t context = b.context_lens[i], blocks = blocks_of(context, c.block_size);
        const int32_t *lengths = b.virtual_lens + i * b.num_spans;
        int64_t virtuals = 0, virtual_blocks = 0;
        for (int64_t s = 0; s < b.num_spans; s++) {
            if (lengths[s] < 0) return BAD_LENGTHS;
            virtuals += lengths[s];
            virtual_blocks += blocks_of(lengths[s], c.block_size);
        }
        if (queries < 0 || context < queries || virtual_blocks + blocks > b.table_stride) return BAD_LENGTHS;
        if (queries == 0) continue;
        const int32_t *table = b.block_tables + i * b.table_stride;
        // Of `length` keys, those that some query of this step still sees; the first query is at `position`.
        auto is_bad = [&](int64_t length, int64_t position) {
            const int64_t skipped = call.window ? std::max<int64_t>(0, position - call.window + 1) : 0;
            const int64_t end = blocks_of(length, c.block_size);
            for (int64_t n = skipped < length ? skipped / c.block_size : end; n < end; n++)
                if (table[n] < 0 || table[n] >= c.num_blocks) return true;
            table += end;
            return false;
        };
        int64_t position = context - queries + virtuals;
        for (int64_t s = 0; s < b.num_spans; s++) {
            if (is_bad(lengths[s], position)) return BAD_BLOCK;
            position -= lengths[s];
        }
        if (is_bad(context, position)) return BAD_BLOCK;
    }
    return OK;
}

// What there is to do, the long items first. A prefill item has one KV head and as many queries as pay for packing its
// keys. Lone queries take their KV heads together, since these lie together in memory, as far as the shares stay even.
std::vector<Item> items_of(const Call &call, int64_t *rows_max, int64_t *work) {
    const Batch &b = call.batch;
    const int64_t kv_heads = call.cache.kv_heads, group = call.query_heads / kv_heads;
    const int64_t count_max = std::max<int64_t>(1, CHUNK_ROWS / group);
    std::vector<Item> items;
    int64_t cost = 0;
    for (int64_t i = 0; i < b.num_requests; i++) {
        const int64_t queries = b.query_start[i + 1] - b.query_start[i];
        const int32_t *lengths = b.virtual_lens + i * b.num_spans;
        const int64_t virtuals = std::accumulate(lengths, lengths + b.num_spans, int64_t(0));
        for (int64_t first = 0; first < queries; first += count_max) {
            const int64_t count = std::min(count_max, queries - first);
            int64_t keys = b.context_lens[i] - queries + first + count + virtuals;
            if (call.window) keys = std::min(keys, call.window + count);
            items.push_back({i, first, count, 0, kv_heads, keys * (2 + count * group) * kv_heads});
            cost += items.back().cost;
            *work += 2 * keys * count * call.query_heads * call.cache.head;
        }
    }
    const size_t chunks = items.size();
    const int64_t share = cost / (4 * call.threads);
    for (size_t n = 0; n < chunks; n++) {
        const Item whole = items[n];
        int64_t heads = whole.count > 2 ? 1 : kv_heads;
        if (whole.cost > share) heads = std::max<int64_t>(1, heads * share / whole.cost);
        items[n].head_end = heads;
        items[n].cost = whole.cost * heads / kv_heads;
        for (int64_t h = heads; h < kv_heads; h += heads) {
            items.push_back(items[n]);
            items.back().head_begin = h;
            items.back().head_end = std::min(h + heads, kv_heads);
        }
        *rows_max = std::max(*rows_max, whole.count * group * heads);
    }
    std::sort(items.begin(), items.end(), [](const Item &s, const Item &t) { return s.cost > t.cost; });
    return items;
}

template <class T>
void attend(const Call &call) {
    int64_t rows_max = 0, work = 0;
    const std::vector<Item> items = items_of(call, &rows_max, &work);
    // One thread or all of them: another team size would make the OpenMP runtime end and restart its threads.
    if (call.threads == 1 || work < SERIAL_BELOW) {
        Worker<T> worker(call, rows_max);
        for (size_t n = 0; n < items.size(); n++) worker.run(items[n], n + 1 < items.size() ? &items[n + 1] : nullptr);
        return;
    }
    std::vector<std::unique_ptr<Worker<T>>> workers;  // made here, where a failed allocation can still be answered
    for (int64_t i = 0; i < call.threads; i++) workers.emplace_back(new Worker<T>(call, rows_max));
#pragma omp parallel num_threads(int(call.threads))
    {
        Worker<T> &worker = *workers[omp_get_thread_num()];
#pragma omp for schedule(dynamic, 1)
        for (size_t n = 0; n < items.size(); n++) {
            const size_t next = n + call.threads;  // while all take their turn
            worker.run(items[n], next < items.size() ? &items[next] : nullptr);
        }
    }
}

struct StoreCall {
    const void *key, *value;
    int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride, num_tokens, is_bf16, threads;
    const int64_t *kv_slots;
    Cache cache;
};

void store_tokens(const StoreCall &call) {
    const Cache &c = call.cache;
    const int64_t size = call.is_bf16 ? 2 : 4, row = c.head * size;
    auto copy = [&](int64_t t, const void *from, int64_t token_stride, int64_t head_stride, const void *cache) {
        const char *source = (const char *)from + t * token_stride * size;
        char *to = (char *)cache + call.kv_slots[t] * c.kv_heads * row;
        for (int64_t h = 0; h < c.kv_heads; h++) memcpy(to + h * row, source + h * head_stride * size, row);
    };
    auto run = [&](int64_t t) {
        copy(t, call.key, call.key_token_stride, call.key_head_stride, c.keys);
        copy(t, call.value, call.value_token_stride, call.value_head_stride, c.values);
    };
    if (call.threads == 1 || call.num_tokens * c.kv_heads * row < (128 << 10)) {
        for (int64_t t = 0; t < call.num_tokens; t++) run(t);
        return;
    }
#pragma omp parallel for num_threads(int(call.threads)) schedule(static)
    for (int64_t t = 0; t < call.num_tokens; t++) run(t);
}

}  // namespace
}  // namespace weft

extern "C" {

// What the functions below are given: one packed record of 64-bit numbers each, in this order (see attention.py).
int weft_store(const weft::StoreCall *call) {
    const int64_t slots = call->cache.num_blocks * call->cache.block_size;
    for (int64_t t = 0; t < call->num_tokens; t++)
        if (call->kv_slots[t] < 0 || call->kv_slots[t] >= slots) return weft::BAD_KV_SLOT;
    weft::store_tokens(*call);
    return weft::OK;
}

int weft_attend(const weft::Call *call) {
    if (weft::Status status = weft::check(*call)) return status;
    try {
        call->is_bf16 ? weft::attend<weft::bf16>(*call) : weft::attend<float>(*call);
    } catch (const std::bad_alloc &) {
        return weft::NO_MEMORY;
    }
    return weft::OK;
}

}  // extern "C"
