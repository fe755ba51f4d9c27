// Bottleneck adapters: the input of f, its activation, its norms, and the kind whose norm needs a whole row.
#pragma once

#include "low_rank.h"

#include <cmath>

namespace weft {
namespace {

enum Activation { RELU = 0, GELU = 1, SILU = 2 };

// The contents of a bottleneck's second address; see deltas.py.
struct Vectors {
    Activation activation;
    bool has_norm;
    float eps;
    const float *down_bias, *up_bias, *gain, *shift;

    Vectors(const SlotCell &cell, int64_t out) {
        const float *from = (const float *)cell.second;
        activation = Activation(int(from[0]));
        has_norm = from[1] != 0.0f;
        eps = from[2];
        down_bias = from + 3;
        up_bias = down_bias + cell.rank;
        gain = up_bias + out;
        shift = gain + out;
    }
};

static inline float activate(Activation activation, float v) {
    switch (activation) {
        case RELU: return v < 0.0f ? 0.0f : v;
        case GELU: return 0.5f * v * (1.0f + std::erf(v * 0.70710678f));
        case SILU: return v / (1.0f + std::exp(-v));
    }
    return v;
}

// Layer norm of one row, in place: the mean, then the variance, then each element.
static void normalize(float *z, int64_t size, const Vectors &v) {
    f32x16 acc = {};
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) acc += read<f32x16>(z + i);
    for (int64_t j = i; j < size; j++) acc[j - i] += z[j];
    const float mean = sum(acc) / float(size);
    acc = f32x16{};
    for (i = 0; i + 16 <= size; i += 16) {
        f32x16 d = read<f32x16>(z + i) - mean;
        acc = fma(d, d, acc);
    }
    for (int64_t j = i; j < size; j++) acc[j - i] += (z[j] - mean) * (z[j] - mean);
    const float scale = 1.0f / std::sqrt(sum(acc) / float(size) + v.eps);
    for (i = 0; i + 16 <= size; i += 16) {
        f32x16 d = (read<f32x16>(z + i) - mean) * scale;
        write(z + i, fma(d, read<f32x16>(v.gain + i), read<f32x16>(v.shift + i)));
    }
    for (; i < size; i++) z[i] = (z[i] - mean) * scale * v.gain[i] + v.shift[i];
}

// z = the normed input of f for one row.
template <class X>
void fill(const SlotCell &cell, const X *y, const X *residual, int64_t out, float *z) {
    each_unit<NATURAL>(out, [&](int64_t i, auto take, auto put) {
        if (cell.kind == BOTTLENECK_RESIDUAL) return put(z + i, take(residual + i));
        Unit total = take(y + i);
        if (cell.kind == BOTTLENECK_SUM) {
            const Unit more = take(residual + i);
            total.lo += more.lo;
            total.hi += more.hi;
        }
        put(z + i, total);
    });
    const Vectors v(cell, out);
    if (v.has_norm && cell.kind != BOTTLENECK_NORMED) normalize(z, out, v);
}

// Adds f(y) to z for R rows, U units of outputs from `o` on; `part` is their number if it is less than a unit.
template <int R, int U, class W>
void finish_tile(const SlotCell &cell, const Vectors &v, Rows<const float> hidden, Rows<float> z, int64_t out,
                 int64_t o, int64_t part, WeightPrefetcher &prefetch) {
    constexpr Order ORDER = order_of<W>();
    auto take = [part](auto *from) { return U == 1 && part ? load_part<ORDER>(from, part) : load<ORDER>(from); };
    Unit sums[R][U] = {};
    multiply<R, U, W>(hidden, cell.b<W>(out) + o, out, cell.rank, take, sums, prefetch);
    each<U>([&](int u) {
        const Unit bias = take(v.up_bias + o + u * UNIT);
        each<R>([&](int r) {
            float *to = z.row(r) + o + u * UNIT;
            Unit total = take(to);
            total.lo += sums[r][u].lo + bias.lo;
            total.hi += sums[r][u].hi + bias.hi;
            if (U == 1 && part) store_part<ORDER>(to, part, total);
            else store<ORDER>(to, total);
        });
    });
}

// z = LN(y + f(y)) - y for R rows. On entry z holds y, and `hidden` the hidden vectors of f(y).
template <int R, int U, class X, class W>
void finish(const SlotCell &cell, Rows<const float> hidden, Rows<float> z, Rows<const X> y, int64_t out,
            WeightPrefetcher &prefetch) {
    const Vectors v(cell, out);
    int64_t o = 0;
    for (; o + U * UNIT <= out; o += U * UNIT) finish_tile<R, U, W>(cell, v, hidden, z, out, o, 0, prefetch);
    for (; o + UNIT <= out; o += UNIT) finish_tile<R, 1, W>(cell, v, hidden, z, out, o, 0, prefetch);
    if (o < out) finish_tile<R, 1, W>(cell, v, hidden, z, out, o, out - o, prefetch);
    for (int r = 0; r < R; r++) {
        float *to = z.row(r);
        normalize(to, out, v);
        each_unit<NATURAL>(out, [&](int64_t i, auto take, auto put) {
            const Unit total = take(to + i), base = take(y.row(r) + i);
            put(to + i, Unit{total.lo - base.lo, total.hi - base.hi});
        });
    }
}

}  // namespace
}  // namespace weft
