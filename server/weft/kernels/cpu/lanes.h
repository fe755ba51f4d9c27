// Sixteen float32 lanes, bfloat16, and the one way in which the CPU kernels multiply, round and sum.
//
// Bits are part of the contract: a row's result may depend only on its own numbers. So every sum here has one written
// order, `fma` is the only product that is accumulated, and the compiler must not contract anything by itself
// (-ffp-contract=off): a block of four rows and a lone row then run the same operations whatever the optimizer does.
// The types are GCC's portable vectors; on a machine without 512-bit registers the same lanes are split into pieces.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __FMA__
#include <immintrin.h>
#endif

namespace weft {

// Calls body(0) .. body(N - 1), unrolled so that arrays indexed by the number stay in registers.
template <int N, class Body>
[[gnu::always_inline]] static inline void each(Body body) {
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) body(i);
}

// Calls body(i, j) for every i < N and, within it, every j < M.
template <int N, int M, class Body>
[[gnu::always_inline]] static inline void each(Body body) {
    each<N>([&](int i) { each<M>([&](int j) { body(i, j); }); });
}

typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

template <class V>
struct Anywhere {
    typedef V type __attribute__((may_alias, aligned(1)));
};

template <class V>
static inline V read(const void *from) {
    return *(const typename Anywhere<V>::type *)from;
}

template <class V>
static inline void write(void *to, V v) {
    *(typename Anywhere<V>::type *)to = v;
}

template <class V, class T>
static inline V bits_as(const T &from) {
    static_assert(sizeof(V) == sizeof(T), "the same bits");
    V v;
    memcpy(&v, &from, sizeof v);
    return v;
}

static inline f32x16 splat(float s) { return f32x16{s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s}; }

static inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    struct Halves {
        __m256 lo, hi;
    };
    Halves x = bits_as<Halves>(a), y = bits_as<Halves>(b), z = bits_as<Halves>(c);
    return bits_as<f32x16>(Halves{_mm256_fmadd_ps(x.lo, y.lo, z.lo), _mm256_fmadd_ps(x.hi, y.hi, z.hi)});
#else
    return a * b + c;
#endif
}

static inline f32x16 fma(float a, f32x16 b, f32x16 c) { return fma(splat(a), b, c); }

// The sum of the lanes: halves, quarters, eighths, sixteenths.
static inline float sum(f32x16 v) {
    v += __builtin_shuffle(v, i32x16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    v += __builtin_shuffle(v, i32x16{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    v += __builtin_shuffle(v, i32x16{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    v += __builtin_shuffle(v, i32x16{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
    return v[0];
}

// e^x for x <= 0, to 2 units in the last place; exactly 1 at 0 and exactly 0 below the smallest normal number.
static inline f32x16 exp_of(f32x16 x) {
    const f32x16 lowest = splat(-87.0f);
    f32x16 z = x < lowest ? lowest : x;                               // a NaN passes
    f32x16 shifted = fma(splat(1.44269504f), z, splat(12582912.0f));  // 1.5 * 2^23: its last bits are round(z / ln 2)
    f32x16 n = shifted - 12582912.0f;
    f32x16 r = fma(splat(-0.693359375f), n, z);
    r = fma(splat(2.12194440e-4f), n, r);  // ln 2 in two parts
    f32x16 p = splat(1.0f / 5040);
    p = fma(p, r, splat(1.0f / 720));
    p = fma(p, r, splat(1.0f / 120));
    p = fma(p, r, splat(1.0f / 24));
    p = fma(p, r, splat(1.0f / 6));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    f32x16 power = (f32x16)(((i32x16)shifted - 0x4b400000 + 127) << 23);
    return x < lowest ? f32x16{} : p * power;
}

static inline f32x16 tanh_of(f32x16 x) {
    f32x16 size = (f32x16)((u32x16)x & 0x7fffffffu);
    f32x16 t = exp_of(-2.0f * size);
    f32x16 y = (1.0f - t) / (1.0f + t);
    return (f32x16)((u32x16)y | ((u32x16)x & 0x80000000u));
}

// Rounds to nearest even, as torch does; a NaN stays a NaN. The bfloat16 is a lane's upper half, and the rest is noise.
static inline u32x16 rounded(f32x16 v) {
    u32x16 bits = (u32x16)v;
    u32x16 up = bits + 0x7fffu + ((bits >> 16) & 1u);
    return v == v ? up : (bits | 0x00400000u);
}

// Thirty-two consecutive elements, in one of two orders. Two bfloat16 side by side are one 32-bit word, so splitting
// the words into even and odd elements takes one operation each; widening in natural order also takes a shuffle.
struct Unit {
    f32x16 lo, hi;
};
enum Order { NATURAL, SPLIT };  // lo, hi = first and second half, or even and odd elements
constexpr int UNIT = 32;

constexpr i32x16 EVEN = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
constexpr i32x16 ODD = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
constexpr i32x16 FIRST = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
constexpr i32x16 SECOND = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

static inline f32x16 widen(u16x16 v) { return (f32x16)(__builtin_convertvector(v, u32x16) << 16); }
static inline f32x16 even(u32x16 words) { return (f32x16)(words << 16); }
static inline f32x16 odd(u32x16 words) { return (f32x16)(words & 0xffff0000u); }

template <Order ORDER>
static inline Unit load(const float *from) {
    f32x16 a = read<f32x16>(from), b = read<f32x16>(from + 16);
    if (ORDER == NATURAL) return {a, b};
    return {__builtin_shuffle(a, b, EVEN), __builtin_shuffle(a, b, ODD)};
}

template <Order ORDER>
static inline Unit load(const bf16 *from) {
    if (ORDER == NATURAL) return {widen(read<u16x16>(from)), widen(read<u16x16>(from + 16))};
    u32x16 words = read<u32x16>(from);
    return {even(words), odd(words)};
}

template <Order ORDER>
static inline void store(float *to, Unit v) {
    write(to, ORDER == NATURAL ? v.lo : __builtin_shuffle(v.lo, v.hi, FIRST));
    write(to + 16, ORDER == NATURAL ? v.hi : __builtin_shuffle(v.lo, v.hi, SECOND));
}

template <Order ORDER>
static inline void store(bf16 *to, Unit v) {
    u32x16 lo = rounded(v.lo), hi = rounded(v.hi);
    if (ORDER == NATURAL) {
        write(to, __builtin_convertvector(lo >> 16, u16x16));
        write(to + 16, __builtin_convertvector(hi >> 16, u16x16));
    } else {
        write(to, (lo >> 16) | (hi & 0xffff0000u));
    }
}

// The first `count` < 32 elements; the others are loaded as zeros and left untouched in memory.
template <Order ORDER, class T>
static inline Unit load_part(const T *from, int64_t count) {
    T all[UNIT] = {};
    memcpy(all, from, count * sizeof(T));
    return load<ORDER>(all);
}

template <Order ORDER, class T>
static inline void store_part(T *to, int64_t count, Unit v) {
    T all[UNIT];
    store<ORDER>(all, v);
    memcpy(to, all, count * sizeof(T));
}

template <class T>
constexpr Order order_of() {
    return sizeof(T) == 2 ? SPLIT : NATURAL;
}

// Calls step(i, take, put) for every unit of `size` elements; the last one may be partial.
template <Order ORDER, class Step>
static inline void each_unit(int64_t size, Step step) {
    int64_t i = 0;
    for (; i + UNIT <= size; i += UNIT)
        step(i, [](auto *from) { return load<ORDER>(from); }, [](auto *to, Unit v) { store<ORDER>(to, v); });
    if (i < size)
        step(
            i, [&](auto *from) { return load_part<ORDER>(from, size - i); },
            [&](auto *to, Unit v) { store_part<ORDER>(to, size - i, v); });
}

// Calls body with an element of the type that the flag of a record names.
template <class Body>
static inline void with_type(bool is_bf16, const Body &body) {
    if (is_bf16) body(bf16{});
    else body(float{});
}

// The result of a C function here: 0, or the reason why it wrote nothing.
enum Status : int {
    OK = 0,
    NO_MEMORY = 1,
    BAD_OFFSETS = 2,
    BAD_SLOT = 3,
    BAD_RANK = 4,
    BAD_KV_SLOT = 5,
    BAD_LENGTHS = 6,
    BAD_BLOCK = 7,
    NO_RESIDUAL = 8,
    BAD_ROUTER = 9,
    BAD_LOG_GATES = 10,
    NO_BFLOAT16 = 11,
};

}  // namespace weft
