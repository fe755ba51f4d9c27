// The plan of one attention call: its arguments, their check, and the work items in the order of their start.
#pragma once

#include "lanes.h"
#include "paged_cache.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace weft {
namespace {

constexpr int64_t CHUNK_ROWS = 64;  // query rows that share the packing of a tile

struct Paging {
    const int32_t *query_start, *context_lens, *virtual_lens, *block_tables;
    const float *log_gates;                                        // by query row and span; null if all are 0
    int64_t num_requests, table_stride, num_spans, num_gate_rows;  // the stride: columns of the block table

    int64_t queries(int64_t request) const { return int64_t(query_start[request + 1]) - query_start[request]; }
    const int32_t *spans(int64_t request) const { return virtual_lens + request * num_spans; }
    const int32_t *blocks(int64_t request) const { return block_tables + request * table_stride; }
    int64_t virtuals(int64_t request) const {
        return std::accumulate(spans(request), spans(request) + num_spans, int64_t(0));
    }
};

struct AttendCall {
    const void *query;
    int64_t token_stride, head_stride;
    void *out;
    int64_t num_tokens, query_heads, is_bf16, window, threads;
    double scale, softcap;
    Cache cache;
    Paging paging;
};

// Returns whether the cache holds every block of one request that some query of this step still reads.
static Status check_blocks(const AttendCall &call, int64_t request) {
    const Cache &c = call.cache;
    const Paging &p = call.paging;
    const int32_t *table = p.blocks(request);
    // Returns those of `length` keys that are within the window; the first query is at `position`.
    auto is_bad = [&](int64_t length, int64_t position) {
        const int64_t skipped = call.window ? std::max<int64_t>(0, position - call.window + 1) : 0;
        const int64_t end = blocks_of(length, c.block_size);
        for (int64_t n = skipped < length ? skipped / c.block_size : end; n < end; n++)
            if (table[n] < 0 || table[n] >= c.num_blocks) return true;
        table += end;
        return false;
    };
    int64_t position = p.context_lens[request] - p.queries(request) + p.virtuals(request);
    for (int64_t s = 0; s < p.num_spans; s++) {
        if (is_bad(p.spans(request)[s], position)) return BAD_BLOCK;
        position -= p.spans(request)[s];
    }
    return is_bad(p.context_lens[request], position) ? BAD_BLOCK : OK;
}

static Status check(const AttendCall &call) {
    const int64_t block_size = call.cache.block_size;
    const Paging &p = call.paging;
    if (p.query_start[0] != 0 || p.query_start[p.num_requests] != call.num_tokens) return BAD_LENGTHS;
    if (p.log_gates && p.num_gate_rows != call.num_tokens) return BAD_LOG_GATES;
    for (int64_t i = 0; i < p.num_requests; i++) {
        int64_t blocks = blocks_of(p.context_lens[i], block_size);
        for (int64_t s = 0; s < p.num_spans; s++) {
            if (p.spans(i)[s] < 0) return BAD_LENGTHS;
            blocks += blocks_of(p.spans(i)[s], block_size);
        }
        const int64_t queries = p.queries(i);
        if (queries < 0 || p.context_lens[i] < queries || blocks > p.table_stride) return BAD_LENGTHS;
        if (queries == 0) continue;
        if (Status status = check_blocks(call, i)) return status;
    }
    return OK;
}

// The queries first .. first + count - 1 of a request with the KV heads head_begin .. head_end - 1.
struct Item {
    int64_t request, first, count, head_begin, head_end, cost;
};

// The work items, long ones first. A prefill item has one KV head, and enough queries to pay for packing its keys. A
// decode item takes its KV heads together, since they lie together in memory, as long as shares stay even.
struct Plan {
    std::vector<Item> items;
    int64_t rows_max = 0;  // of an item, over all its heads
    int64_t work = 0;      // multiply-adds

    explicit Plan(const AttendCall &call) {
        const int64_t kv_heads = call.cache.kv_heads, group = call.query_heads / kv_heads;
        for (int64_t i = 0; i < call.paging.num_requests; i++) cut_queries(call, i, group);
        int64_t cost = 0;
        for (const Item &item : items) cost += item.cost;
        const size_t chunks = items.size();
        const int64_t share = cost / (4 * call.threads);
        for (size_t n = 0; n < chunks; n++) rows_max = std::max(rows_max, cut_heads(n, kv_heads, share) * group);
        std::sort(items.begin(), items.end(), [](const Item &s, const Item &t) { return s.cost > t.cost; });
    }

  private:
    // Adds a request's queries in chunks, each with all KV heads.
    void cut_queries(const AttendCall &call, int64_t request, int64_t group) {
        const Paging &p = call.paging;
        const int64_t queries = p.queries(request), kv_heads = call.cache.kv_heads;
        const int64_t count_max = std::max<int64_t>(1, CHUNK_ROWS / group), virtuals = p.virtuals(request);
        for (int64_t first = 0; first < queries; first += count_max) {
            const int64_t count = std::min(count_max, queries - first);
            int64_t keys = p.context_lens[request] - queries + first + count + virtuals;
            if (call.window) keys = std::min(keys, call.window + count);
            items.push_back({request, first, count, 0, kv_heads, keys * (2 + count * group) * kv_heads});
            work += 2 * keys * count * call.query_heads * call.cache.head;
        }
    }

    // Cuts item n by heads; returns how many pairs of query and KV head its parts have at most.
    int64_t cut_heads(size_t n, int64_t kv_heads, int64_t share) {
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
        return whole.count * heads;
    }
};

}  // namespace
}  // namespace weft
