// Two ways to prefetch data that is used soon. The hardware prefetcher helps little here: an adapter's weights are
// short, a cache's blocks lie anywhere, and several rows are read side by side.
#pragma once

#include "lanes.h"

#include <vector>

namespace weft {
namespace {

constexpr int64_t LINE = 64;  // bytes that memory delivers at a time

struct ByteRange {
    const char *begin, *end;
};

// Prefetches ranges of weights in the order of their use, DISTANCE bytes ahead: one line for each line used.
class WeightPrefetcher {
  public:
    WeightPrefetcher() = default;  // prefetches nothing
    WeightPrefetcher(const ByteRange *next, const ByteRange *last) : next(next), last(last), behind(DISTANCE) {}

    // Called before N units of 32 weights are used. The first call prefetches these very weights; each call prefetches
    // twice as much as is used, until it is DISTANCE ahead. All at once, that much would delay the first uses.
    template <int N, class W>
    void units(const W *) {
        constexpr int BYTES = N * UNIT * int(sizeof(W));
        ask<BYTES>();
        if (behind > 0) {
            behind -= BYTES;
            ask<BYTES>();
        }
    }

  private:
    static constexpr int64_t DISTANCE = 40 << 10;  // bytes

    const char *at = nullptr, *end = nullptr;
    const ByteRange *next = nullptr, *last = nullptr;
    int64_t behind = 0;  // bytes

    template <int BYTES>
    void ask() {
        if (at >= end) {
            if (next == last) return;
            at = next->begin, end = next->end, next++;
        }
        each<BYTES / LINE>([&](int n) { __builtin_prefetch(at + n * LINE, 0, 2); });
        at += BYTES;
    }
};

// Prefetches a list of single lines, a few at a time between computations: all at once, they would stall on memory for
// as long as a tile of attention takes to compute.
class LinePrefetcher {
  public:
    explicit LinePrefetcher(int64_t lines_max) : lines(lines_max + STEP), next(lines.data()), end(next), last(next) {}

    void clear() { next = end = last = lines.data(); }
    void add(const void *line) { *last++ = (const char *)line; }

    // Makes the added lines available, padded to whole steps.
    void close() {
        for (; (last - next) % STEP; last++) *last = last[-1];
        end = last;
    }

    template <int COUNT>
    void ask() {
        static_assert(STEP % COUNT == 0, "as many as are left, or none");
        if (next == end) return;
        each<COUNT>([&](int i) { __builtin_prefetch(next[i], 0, 2); });
        next += COUNT;
    }

  private:
    static constexpr int STEP = 8;

    std::vector<const char *> lines;
    const char **next, **end, **last;
};

}  // namespace
}  // namespace weft
