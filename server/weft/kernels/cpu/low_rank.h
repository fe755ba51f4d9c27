// The two products of a delta of low rank: shrink, hidden = A x, and multiply, hidden B.
#pragma once

#include "deltas_plan.h"

namespace weft {
namespace {

// hidden[row][k] = x[row] . a[k], for R rows and K ranks at once.
template <int R, int K, class X, class W>
void shrink_tile(Rows<const X> x, const W *a, int64_t in, Rows<float> hidden, WeightPrefetcher &prefetch) {
    constexpr Order ORDER = order_of<W>();
    f32x16 acc[R][K] = {};
    each_unit<ORDER>(in, [&](int64_t i, auto take, auto) {
        Unit xs[R];
        prefetch.units<K>(a);
        each<R>([&](int r) { xs[r] = take(x.row(r) + i); });
        each<K>([&](int k) {
            const Unit w = take(a + k * in + i);
            each<R>([&](int r) {
                acc[r][k] = fma(xs[r].lo, w.lo, acc[r][k]);
                acc[r][k] = fma(xs[r].hi, w.hi, acc[r][k]);
            });
        });
    });
    each<R, K>([&](int r, int k) { hidden.row(r)[k] = sum(acc[r][k]); });
}

// The same for any number of ranks: repeatedly as many at once as the first of KS that is not more than are left.
template <int R, int K, int... KS, class X, class W>
void shrink_ranks(Rows<const X> x, const W *a, int64_t in, Rows<float> hidden, int64_t ranks,
                  WeightPrefetcher &prefetch) {
    for (; ranks >= K; ranks -= K, a += K * in, hidden.first += K) shrink_tile<R, K>(x, a, in, hidden, prefetch);
    if constexpr (sizeof...(KS) > 0) shrink_ranks<R, KS...>(x, a, in, hidden, ranks, prefetch);
}

template <class X, class W>
void shrink(Rows<const X> x, int32_t rows, const W *a, int64_t in, Rows<float> hidden, int64_t ranks,
            WeightPrefetcher &prefetch) {
    if (rows == BLOCK_ROWS) return shrink_ranks<BLOCK_ROWS, 4, 1>(x, a, in, hidden, ranks, prefetch);
    for (int32_t r = 0; r < rows; r++) shrink_ranks<1, 8, 4, 1>(x.from(r), a, in, hidden.from(r), ranks, prefetch);
}

// sums[row][unit] += hidden[row] B, for R rows and U units of outputs; `b` points at the first of these outputs.
template <int R, int U, class W, class Take>
static inline void multiply(Rows<const float> hidden, const W *b, int64_t out, int64_t rank, Take take,
                            Unit (&sums)[R][U], WeightPrefetcher &prefetch) {
    for (int64_t k = 0; k < rank; k++) {
        prefetch.units<U>(b);
        each<U>([&](int u) {
            const Unit w = take(b + k * out + u * UNIT);
            each<R>([&](int r) {
                const float h = hidden.row(r)[k];
                sums[r][u].lo = fma(h, w.lo, sums[r][u].lo);
                sums[r][u].hi = fma(h, w.hi, sums[r][u].hi);
            });
        });
    }
}

}  // namespace
}  // namespace weft
