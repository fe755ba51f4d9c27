// Computes items of attention in one thread, with scratch of its own.
#pragma once

#include "attention_plan.h"
#include "attention_tile.h"

#include <cmath>

namespace weft {
namespace {

// Places for TILE keys of a request's blocks, of which from .. to - 1 are read.
struct Tile {
    const int32_t *blocks;
    int64_t start, from, to, keys_end;
};

// Up to TILE_ROWS rows that are computed together, and the keys of a tile that each sees: begins[i] .. ends[i] - 1.
struct RowGroup {
    int64_t first;
    int count;
    int begins[TILE_ROWS], ends[TILE_ROWS];
    float shifts[TILE_ROWS];  // added to their scores

    bool sees_any(int i) const { return begins[i] < ends[i]; }
};

// Rows are ordered by KV head, token, query head; the scratch serves one item after another.
template <class T>
class Worker {
  public:
    Worker(const AttendCall &call, int64_t rows)
        : call(call),
          group(call.query_heads / call.cache.kv_heads),
          head(call.cache.head),
          padded((head + UNIT - 1) / UNIT * UNIT),
          queries(rows * padded),
          results(rows * padded),
          sums(rows * 16),
          peaks(rows),
          packed_keys(padded * TILE * sizeof(T) / 4),
          padded_rows((TILE + 1) * padded),
          prefetch(2 * (TILE + call.cache.kv_heads) * (head * sizeof(T) / LINE + 1)) {}

    // `following` is the item that this thread most likely computes next, or null.
    void run(const Item &item, const Item *following) {
        next = following;
        const Paging &p = call.paging;
        const int64_t start = p.query_start[item.request] + item.first;
        begin(item, start);
        const int32_t *blocks = p.blocks(item.request), *lengths = p.spans(item.request);
        // Index of the first query among the real tokens, then among all positions.
        const int64_t first_real = p.context_lens[item.request] - p.queries(item.request) + item.first;
        int64_t position = first_real + p.virtuals(item.request);
        for (int64_t s = 0; s < p.num_spans; s++) {
            const float *gates = p.log_gates ? p.log_gates + start * p.num_spans + s : nullptr;
            walk(item, blocks, lengths[s], position, false, gates);
            blocks += blocks_of(lengths[s], call.cache.block_size);
            position -= lengths[s];
        }
        walk(item, blocks, first_real + item.count, first_real, true, nullptr);
        finish(item, start);
    }

  private:
    const AttendCall &call;
    const int64_t group, head, padded;    // query heads per KV head; head size, and that rounded up to whole units
    std::vector<float> queries, results;  // [rows, padded], the same in the order of T
    std::vector<float> sums, peaks;       // [rows, 16], [rows]
    std::vector<uint32_t> packed_keys;    // [padded] or [padded / 2] by TILE
    std::vector<T> padded_rows;           // [TILE + 1, padded]: keys or values copied out of the cache, and zeros
    const T *keys[TILE], *values[TILE];
    LinePrefetcher prefetch;
    const Item *next = nullptr;

    float *query_of(int64_t row) { return &queries[row * padded]; }
    float *result_of(int64_t row) { return &results[row * padded]; }
    float *sums_of(int64_t row) { return &sums[row * 16]; }
    T *padded_row(int64_t key) { return &padded_rows[key * padded]; }

    static float as_float(float v) { return v; }
    static float as_float(bf16 v) { return bits_as<float>(uint32_t(v.bits) << 16); }

    // Returns how many rows an item has in all its heads.
    int64_t rows_of(const Item &item) const { return (item.head_end - item.head_begin) * item.count * group; }

    // Returns the offset of the query or result of a row of the item; `start` is the token of its first query.
    int64_t offset_of(const Item &item, int64_t start, int64_t row, int64_t token_stride, int64_t head_stride) const {
        const int64_t rows = item.count * group, token = start + row % rows / group;
        return token * token_stride + ((item.head_begin + row / rows) * group + row % group) * head_stride;
    }

    void begin(const Item &item, int64_t start) {
        const int64_t rows = rows_of(item);
        std::fill_n(results.begin(), rows * padded, 0.0f);
        std::fill_n(sums.begin(), rows * 16, 0.0f);
        std::fill_n(peaks.begin(), rows, NEVER);
        for (int64_t r = 0; r < rows; r++) {
            const T *from = (const T *)call.query + offset_of(item, start, r, call.token_stride, call.head_stride);
            for (int64_t d = 0; d < head; d++) query_of(r)[d] = as_float(from[d]) * float(call.scale);
        }
    }

    void finish(const Item &item, int64_t start) {
        constexpr Order ORDER = order_of<T>();
        for (int64_t r = 0; r < rows_of(item); r++) {
            const f32x16 share = splat(1.0f / sum(read<f32x16>(sums_of(r))));
            T *to = (T *)call.out + offset_of(item, start, r, call.query_heads * head, head);
            for (int64_t d = 0; d < head; d += UNIT) {
                const Unit total = load<NATURAL>(result_of(r) + d), v = {total.lo * share, total.hi * share};
                if (d + UNIT <= head) store<ORDER>(to + d, v);
                else store_part<ORDER>(to + d, head - d, v);
            }
        }
    }

    // Takes the keys 0 .. keys_end - 1 of one span, or the real ones. On the same count, the item's first query is at
    // `position`; a query sees the keys less than a window before it and, if `is_causal`, none after it. `gates` points
    // at the log-gate of the item's first query; the next query's is one row of spans further. Null means 0 for all.
    void walk(const Item &item, const int32_t *blocks, int64_t keys_end, int64_t position, bool is_causal,
              const float *gates) {
        const int64_t window = call.window ? call.window : std::numeric_limits<int64_t>::max() / 2;
        const int64_t begin = std::max<int64_t>(0, position - window + 1), rows = item.count * group;
        auto gate_of = [&](int64_t query) { return gates ? gates[query * call.paging.num_spans] : 0.0f; };
        bool is_seen = false;
        for (int64_t query = 0; query < item.count; query++) is_seen |= gate_of(query) != NEVER;
        if (!is_seen) return;
        for (int64_t start = begin / TILE * TILE; start < keys_end; start += TILE) {
            const Tile tile = {blocks, start, std::max(begin, start), std::min(start + TILE, keys_end), keys_end};
            auto clamped = [&](int64_t key, int64_t most) { return int(std::clamp<int64_t>(key - start, 0, most)); };
            for (int64_t h = item.head_begin; h < item.head_end; h++) {
                list_next(tile, item, h, is_causal);
                gather(tile, h, rows);
                for (int64_t r = 0; r < rows; r += TILE_ROWS) {
                    RowGroup here = {
                        (h - item.head_begin) * rows + r, int(std::min<int64_t>(TILE_ROWS, rows - r)), {}, {}, {}};
                    for (int i = 0; i < here.count; i++) {
                        const int64_t query = (r + i) / group, p = position + query;
                        const int64_t end = is_causal ? p + 1 : keys_end;
                        here.shifts[i] = gate_of(query);
                        here.begins[i] = clamped(p - window + 1, TILE);
                        here.ends[i] = here.shifts[i] == NEVER ? 0 : clamped(end, tile.to - start);
                    }
                    step(here);
                }
            }
        }
    }

    // Lists the next tile's lines for prefetching: with each head an equal share of the tile's tokens, each token with
    // all the item's heads, since these lie side by side. After an item's last tile comes the first tile of the next.
    void list_next(const Tile &tile, const Item &item, int64_t h, bool is_last_walk) {
        const int64_t heads = item.head_end - item.head_begin, share = (TILE + heads - 1) / heads;
        const int64_t begin = (h - item.head_begin) * share;
        auto list = [&](const int32_t *blocks, int64_t head_begin, int64_t from, int64_t to) {
            auto take = [&](int64_t, const T *row) {
                for (int64_t d = 0; d < heads * head; d += LINE / sizeof(T)) prefetch.add(row + d);
            };
            call.cache.locate<T>(call.cache.keys, blocks, head_begin, from, to, take);
            call.cache.locate<T>(call.cache.values, blocks, head_begin, from, to, take);
        };
        prefetch.clear();
        if (tile.to < tile.keys_end) {
            list(tile.blocks, item.head_begin, tile.to + begin, std::min(tile.to + begin + share, tile.keys_end));
        } else if (is_last_walk && next && next->head_end - next->head_begin == heads && !call.window) {
            const Paging &p = call.paging;
            const int64_t real = p.context_lens[next->request];
            const int64_t end = p.num_spans ? p.spans(next->request)[0] : 0;
            list(p.blocks(next->request), next->head_begin, begin,
                 std::min({begin + share, int64_t(TILE), end ? end : real}));
        }
        prefetch.close();
    }

    // Points `values` at the tile's rows and packs its keys. Rows outside from .. to - 1 are never read; zeros take
    // their place.
    void gather(const Tile &tile, int64_t h, int64_t rows) {
        auto point = [&](const void *side, const T **at) {
            std::fill_n(at, TILE, padded_row(TILE));
            auto take = [&](int64_t index, const T *row) { at[index - tile.start] = row; };
            call.cache.locate<T>(side, tile.blocks, h, tile.from, tile.to, take);
        };
        auto copy = [&](const T **at) {  // one after another, each in whole units with zeros at its end
            for (int64_t j = 0; j < TILE; j++) {
                memcpy(padded_row(j), at[j], head * sizeof(T));
                at[j] = padded_row(j);
            }
        };
        point(call.cache.keys, keys);
        if (head != padded) copy(keys);
        const int64_t words = padded * sizeof(T) / 4;
        for (int64_t g = (tile.from - tile.start) / 16; g * 16 < tile.to - tile.start; g++)
            for (int64_t w = 0; w < words; w += 16) {
                prefetch.ask<8>();
                transpose((const void *const *)&keys[g * 16], w * 4, &packed_keys[w * TILE + g * 16], TILE);
            }
        point(call.cache.values, values);
        if (head != padded || rows > 2 * TILE_ROWS) copy(values);  // many rows read them often: keep them in L1
    }

    // Computes one tile for some rows.
    void step(const RowGroup &rows) {
        float scores[TILE_ROWS * TILE];
        int common_begin = 0, common_end = TILE, last = 0;  // the keys that all rows see; the end of the last one
        bool is_together = true;
        for (int i = 0; i < rows.count; i++) {
            is_together &= rows.sees_any(i);
            if (!rows.sees_any(i)) continue;
            last = std::max(last, rows.ends[i]);
            common_begin = std::max(common_begin, rows.begins[i]);
            common_end = std::min(common_end, rows.ends[i]);
        }
        if (last == 0) return;
        const int groups = (last + 15) / 16;
        as_constant<TILE_ROWS>(rows.count, [&](auto count) {
            score<count, T>(query_of(rows.first), padded, packed_keys.data(), head, scores, groups, prefetch);
        });
        for (int i = 0; i < rows.count; i++)
            if (rows.sees_any(i)) to_weights(rows, i, scores + i * TILE, groups);
        auto weigh_own = [&](int i, int begin, int end) {
            weigh<1, T>(scores + i * TILE, values, begin, end, padded, result_of(rows.first + i), prefetch);
        };
        if (!is_together || common_begin >= common_end) {
            for (int i = 0; i < rows.count; i++) weigh_own(i, rows.begins[i], rows.ends[i]);
            return;
        }
        for (int i = 0; i < rows.count; i++) weigh_own(i, rows.begins[i], common_begin);
        as_constant<TILE_ROWS>(rows.count, [&](auto count) {
            weigh<count, T>(scores, values, common_begin, common_end, padded, result_of(rows.first), prefetch);
        });
        for (int i = 0; i < rows.count; i++) weigh_own(i, common_end, rows.ends[i]);
    }

    // Turns the scores of row i into weights relative to its running peak, and rescales its sums so far to that peak.
    void to_weights(const RowGroup &rows, int i, float *scores, int groups) {
        constexpr i32x16 LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const int64_t row = rows.first + i;
        const int begin = rows.begins[i], end = rows.ends[i];
        const float cap = float(call.softcap), shift = rows.shifts[i];
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
        float *total = sums_of(row);
        if (peak != before) {
            peaks[row] = peak;
            const f32x16 shrink = exp_of(splat(before - peak));
            write(total, read<f32x16>(total) * shrink);
            for (float *at = result_of(row); at != result_of(row) + padded; at += 16)
                write(at, read<f32x16>(at) * shrink);
        }
        const float zero = peak == NEVER ? 0.0f : peak;  // if all scores so far are -inf, all weights are 0
        f32x16 added = read<f32x16>(total);
        for (int g = begin / 16; g < groups; g++) {
            const f32x16 weight = exp_of(s[g] - zero);
            write(scores + g * 16, weight);
            added += weight;
        }
        write(total, added);
    }
};

}  // namespace
}  // namespace weft
