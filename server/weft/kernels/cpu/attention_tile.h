// A tile of attention, 64 keys: its packing, its scores, and the weighted sum of its values.
#pragma once

#include "prefetch.h"

#include <limits>
#include <type_traits>

namespace weft {
namespace {

constexpr int TILE = 64;  // keys
constexpr int GROUPS = TILE / 16;
constexpr int TILE_ROWS = 4;  // query rows whose sums stay in registers
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Calls body with `number`, one of 1 .. N, as a constant.
template <int N, class Body>
static inline void as_constant(int number, Body body) {
    if constexpr (N > 1)
        if (number < N) return as_constant<N - 1>(number, body);
    body(std::integral_constant<int, N>{});
}

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
    each<16>([&](int i) { a[i] = read<u32x16>((const char *)rows[i] + offset); });
    each<8>([&](int i) {  // pairs of rows
        b[2 * i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], LOW1);
        b[2 * i + 1] = __builtin_shuffle(a[2 * i], a[2 * i + 1], HIGH1);
    });
    each<4>([&](int i) {  // quads of rows: quarter q of a[4 i + j] has word 4 q + j of rows 4 i .. 4 i + 3
        a[4 * i] = __builtin_shuffle(b[4 * i], b[4 * i + 2], LOW2);
        a[4 * i + 1] = __builtin_shuffle(b[4 * i], b[4 * i + 2], HIGH2);
        a[4 * i + 2] = __builtin_shuffle(b[4 * i + 1], b[4 * i + 3], LOW2);
        a[4 * i + 3] = __builtin_shuffle(b[4 * i + 1], b[4 * i + 3], HIGH2);
    });
    each<4>([&](int j) {
        u32x16 even_low = __builtin_shuffle(a[j], a[4 + j], EVEN4);  // words j and 8 + j of rows 0-3, then of rows 4-7
        u32x16 odd_low = __builtin_shuffle(a[j], a[4 + j], ODD4);    // words 4 + j and 12 + j
        u32x16 even_high = __builtin_shuffle(a[8 + j], a[12 + j], EVEN4);  // the same of rows 8-11, 12-15
        u32x16 odd_high = __builtin_shuffle(a[8 + j], a[12 + j], ODD4);
        write(to + j * stride, __builtin_shuffle(even_low, even_high, EVEN4));
        write(to + (8 + j) * stride, __builtin_shuffle(even_low, even_high, ODD4));
        write(to + (4 + j) * stride, __builtin_shuffle(odd_low, odd_high, EVEN4));
        write(to + (12 + j) * stride, __builtin_shuffle(odd_low, odd_high, ODD4));
    });
}

// scores[r][key] = q[r] . key, for R rows and G groups of sixteen keys. `keys`: [head][TILE] float32, or
// [head / 2][TILE] pairs of bfloat16.
template <int R, int G, class T>
void score(const float *q, int64_t q_stride, const uint32_t *keys, int64_t head, float *scores,
           LinePrefetcher &prefetch) {
    constexpr bool IS_PAIR = sizeof(T) == 2;
    f32x16 acc[R][G] = {};
    for (int64_t d = 0; d < head; d += IS_PAIR ? 2 : 1, keys += TILE) {
        prefetch.ask<2>();
        each<G>([&](int g) {
            const u32x16 word = read<u32x16>(keys + g * 16);
            const f32x16 first = IS_PAIR ? even(word) : (f32x16)word;
            each<R>([&](int r) {
                acc[r][g] = fma(q[r * q_stride + d], first, acc[r][g]);
                if (IS_PAIR) acc[r][g] = fma(q[r * q_stride + d + 1], odd(word), acc[r][g]);
            });
        });
    }
    each<R, G>([&](int r, int g) { write(scores + r * TILE + g * 16, acc[r][g]); });
}

template <int R, class T>
void score(const float *q, int64_t q_stride, const uint32_t *keys, int64_t head, float *scores, int groups,
           LinePrefetcher &prefetch) {
    if (groups == 1) score<R, 1, T>(q, q_stride, keys, head, scores, prefetch);
    else if (groups == 2) score<R, 2, T>(q, q_stride, keys, head, scores, prefetch);
    else score<R, GROUPS, T>(q, q_stride, keys, head, scores, prefetch);
}

// acc[r] += sum over the keys begin .. end - 1 of weights[r][key] * values[key], for R rows and the U units of elements
// from `d` on.
template <int R, int U, class T>
void weigh(const float *weights, const T *const *values, int begin, int end, int64_t head, float *acc, int64_t d,
           LinePrefetcher &prefetch) {
    Unit sums[R][U];
    each<R, U>([&](int r, int u) { sums[r][u] = load<NATURAL>(acc + r * head + d + u * UNIT); });
    for (int j = begin; j < end; j++) {
        prefetch.ask<sizeof(T)>();
        each<U>([&](int u) {
            const Unit value = load<order_of<T>()>(values[j] + d + u * UNIT);
            each<R>([&](int r) {
                sums[r][u].lo = fma(weights[r * TILE + j], value.lo, sums[r][u].lo);
                sums[r][u].hi = fma(weights[r * TILE + j], value.hi, sums[r][u].hi);
            });
        });
    }
    each<R, U>([&](int r, int u) { store<NATURAL>(acc + r * head + d + u * UNIT, sums[r][u]); });
}

template <int R, class T>
void weigh(const float *weights, const T *const *values, int begin, int end, int64_t head, float *acc,
           LinePrefetcher &prefetch) {
    if (begin >= end) return;
    int64_t d = 0;
    for (; d + 2 * UNIT <= head; d += 2 * UNIT) weigh<R, 2, T>(weights, values, begin, end, head, acc, d, prefetch);
    if (d < head) weigh<R, 1, T>(weights, values, begin, end, head, acc, d, prefetch);
}

}  // namespace
}  // namespace weft
