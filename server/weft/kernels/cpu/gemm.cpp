// y = x W^T + b for bfloat16 rows and weights, in float32, rounded once: the product of a base's linear modules.
//
// With the few rows of a decode step, reading the weights from memory takes the time; with many rows, the
// multiplications do. Both are fastest if the weights are read in one direction, whole cache lines at a time, so they
// are laid out once (gemm.py) in the order of use:
//
//     [group of 64 outputs][chunk of up to CHUNK pairs of inputs][block of 16 outputs][pair][16 outputs][2 inputs]
//
// A vector is 16 outputs of one pair, the operand of one dot-product instruction. Each call lays its rows out the same
// way, 16 of them side by side: [tile of 16 rows][pair][16 rows][2]; a chunk of them stays in the first-level cache.
// Every output is one chain of additions in the order of its inputs, whatever tile computes it, so a row's bits depend
// only on its own numbers and on I. The instruction treats subnormal inputs and results as zeros.
#include "lanes.h"

#include <omp.h>

#include <algorithm>
#include <memory>
#include <new>

namespace weft {
namespace {

#ifdef __AVX512BF16__

constexpr int LANES = 16;                         // outputs of a block, rows of a tile
constexpr int BLOCKS = 4;                         // of a group
constexpr int64_t SUMS = LANES * LANES * BLOCKS;  // of a tile and a group
constexpr int64_t CHUNK = 512;                    // pairs: a tile's chunk of rows fills the first-level cache
constexpr int64_t SUPER = 16;                     // tiles computed while a group's chunk stays in the second-level one
constexpr int64_t ROWS_EACH = 32;                 // for each thread, from which on threads divide the rows
constexpr int64_t SERIAL_BELOW = 256 << 10;       // products below which a second thread costs more than it saves

struct Problem {
    const bf16 *x;
    int64_t x_stride;
    const uint32_t *weight;
    const bf16 *bias;  // or null
    bf16 *y;
    int64_t rows, in, out;

    int64_t pairs() const { return (in + 1) / 2; }
    int64_t groups() const { return (out + LANES * BLOCKS - 1) / (LANES * BLOCKS); }
};

static inline f32x16 dot(f32x16 acc, u32x16 w, u32x16 x) {
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
}

// R rows times U blocks of 16 outputs over one chunk; `acc` [R][U][16] holds the sums between chunks. Meanwhile the
// following blocks are prefetched evenly into the second-level cache: the hardware prefetcher stops at each page and
// block.
template <int R, int U>
static void tile(const uint32_t *w, int64_t w_stride, const uint32_t *x, int64_t pairs, bool is_first, float *acc) {
    f32x16 sums[R][U];
    each<R, U>([&](int r, int u) { sums[r][u] = is_first ? f32x16{} : read<f32x16>(acc + (r * U + u) * LANES); });
    const uint32_t *next = w + U * w_stride;
    for (int64_t k = 0; k < pairs; k++, w += LANES, x += LANES) {
        u32x16 weights[U];
        each<U>([&](int u) {
            weights[u] = read<u32x16>(w + u * w_stride);
            _mm_prefetch((const char *)next, _MM_HINT_T1);
            next += LANES;
        });
        each<R>([&](int r) {
            const u32x16 row = (u32x16)_mm512_set1_epi32(int(x[r]));
            each<U>([&](int u) { sums[r][u] = dot(sums[r][u], weights[u], row); });
        });
    }
    each<R, U>([&](int r, int u) { write(acc + (r * U + u) * LANES, sums[r][u]); });
}

// How many blocks a tile of so many rows takes at once: as many sums as registers hold and, with few rows, enough to
// hide the latency of an addition.
constexpr int blocks_of(int rows) { return rows > 14 ? 1 : rows > 7 ? 2 : 4; }

template <int R>
static void tile_of(const uint32_t *w, int64_t pairs, const uint32_t *x, bool is_first, float *acc) {
    constexpr int U = blocks_of(R);
    for (int b = 0; b < BLOCKS; b += U, acc += R * U * LANES)
        tile<R, U>(w + b * pairs * LANES, pairs * LANES, x, pairs, is_first, acc);
}

typedef void (*Tile)(const uint32_t *, int64_t, const uint32_t *, bool, float *);
constexpr Tile TILES[] = {tile_of<1>,  tile_of<2>,  tile_of<3>,  tile_of<4>,  tile_of<5>,  tile_of<6>,
                          tile_of<7>,  tile_of<8>,  tile_of<9>,  tile_of<10>, tile_of<11>, tile_of<12>,
                          tile_of<13>, tile_of<14>, tile_of<15>, tile_of<16>};

// Rounds the sums of a group for some rows into y, from output `o` on; they lie [block / U][row][block % U][16].
static void put(const Problem &p, const float *sums, int64_t row, int64_t rows, int64_t o) {
    const int together = blocks_of(int(rows));
    for (int b = 0; b < BLOCKS; b++) {
        const int64_t at = o + b * LANES, count = std::min<int64_t>(LANES, p.out - at);
        if (count <= 0) return;
        bf16 some[LANES] = {};
        if (p.bias) memcpy(some, p.bias + at, count * sizeof(bf16));
        const f32x16 bias = widen(read<u16x16>(some));
        const float *from = sums + (b / together * together * rows + b % together) * LANES;
        bf16 *to = p.y + row * p.out + at;
        for (int64_t r = 0; r < rows; r++, from += together * LANES, to += p.out) {
            const f32x16 v = read<f32x16>(from);
            const u16x16 result = __builtin_convertvector(rounded(p.bias ? v + bias : v) >> 16, u16x16);
            if (count == LANES) write(to, result);
            else memcpy(to, &result, count * sizeof(bf16));
        }
    }
}

// Lays out up to 16 rows: [pair][16 rows][2], with zeros for missing rows. Merging the first eight of sixteen vectors
// with the last eight, element by element, four times over, transposes them.
static void arrange(const Problem &p, int64_t row, int64_t rows, uint32_t *to) {
    const bf16 *from = p.x + row * p.x_stride;
    for (int64_t i = 0; i < p.in; i += 2 * LANES, from += 2 * LANES) {
        u32x16 a[LANES] = {}, b[LANES];
        const int64_t left = p.in - i, pairs = std::min<int64_t>(LANES, (left + 1) / 2);
        if (left >= 2 * LANES)
            for (int64_t r = 0; r < rows; r++) a[r] = read<u32x16>(from + r * p.x_stride);
        else
            for (int64_t r = 0; r < rows; r++) memcpy(&a[r], from + r * p.x_stride, left * sizeof(bf16));
        each<2>([&](int) {
            each<8>([&](int r) {
                b[2 * r] = __builtin_shuffle(a[r], a[r + 8], FIRST);
                b[2 * r + 1] = __builtin_shuffle(a[r], a[r + 8], SECOND);
            });
            each<8>([&](int r) {
                a[2 * r] = __builtin_shuffle(b[r], b[r + 8], FIRST);
                a[2 * r + 1] = __builtin_shuffle(b[r], b[r + 8], SECOND);
            });
        });
        for (int64_t k = 0; k < pairs; k++, to += LANES) write(to, a[k]);
    }
}

struct Range {
    int64_t begin, end;

    static Range share(int64_t of, int thread, int team) { return {of * thread / team, of * (thread + 1) / team}; }
};

// Scratch of a thread that takes so many rows at a time: the laid-out rows and the sums of a group.
struct Scratch {
    int64_t tiles, x_size, size;

    Scratch(const Problem &p, int64_t rows) {
        tiles = std::min((rows + LANES - 1) / LANES, SUPER);
        x_size = tiles * p.pairs() * LANES;
        size = x_size + tiles * SUMS;
    }
};

// Some groups of outputs for some rows.
static void part(const Problem &p, Range rows, Range groups, const Scratch &scratch, uint32_t *x) {
    const int64_t pairs = p.pairs();
    float *sums = (float *)(x + scratch.x_size);
    for (int64_t first = rows.begin; first < rows.end; first += scratch.tiles * LANES) {
        const int64_t count = std::min(scratch.tiles * LANES, rows.end - first), tiles = (count + LANES - 1) / LANES;
        auto rows_of = [&](int64_t t) { return std::min<int64_t>(LANES, count - t * LANES); };
        for (int64_t t = 0; t < tiles; t++) arrange(p, first + t * LANES, rows_of(t), x + t * pairs * LANES);
        for (int64_t g = groups.begin; g < groups.end; g++) {
            const uint32_t *w = p.weight + g * pairs * LANES * BLOCKS;
            for (int64_t k = 0; k < pairs; k += CHUNK)
                for (int64_t t = 0; t < tiles; t++)
                    TILES[rows_of(t) - 1](w + k * LANES * BLOCKS, std::min(CHUNK, pairs - k),
                                          x + (t * pairs + k) * LANES, k == 0, sums + t * SUMS);
            for (int64_t t = 0; t < tiles; t++)
                put(p, sums + t * SUMS, first + t * LANES, rows_of(t), g * BLOCKS * LANES);
        }
    }
}

// Threads share nothing that one of them writes. With few rows, each thread lays out all of them and takes some of the
// outputs; with many, it takes some of the rows, and the weights pass through the shared cache.
static void linear(const Problem &p, int threads) {
    if (p.rows * p.in * p.out < SERIAL_BELOW) threads = 1;
    const bool by_rows = p.rows >= ROWS_EACH * threads;
    const Scratch scratch(p, by_rows ? (p.rows + threads - 1) / threads : p.rows);
    std::unique_ptr<uint32_t[]> memory(new uint32_t[threads * scratch.size + LANES]);
    uint32_t *aligned = (uint32_t *)(((uintptr_t)memory.get() + 63) & ~uintptr_t(63));
    auto run = [&](int thread, int team) {
        const Range rows = by_rows ? Range::share(p.rows, thread, team) : Range{0, p.rows};
        const Range groups = by_rows ? Range{0, p.groups()} : Range::share(p.groups(), thread, team);
        part(p, rows, groups, scratch, aligned + thread * scratch.size);
    };
    // One thread or all of them: any other team size would make the OpenMP runtime end and restart its threads.
    if (threads == 1) return run(0, 1);
#pragma omp parallel num_threads(threads)
    run(omp_get_thread_num(), omp_get_num_threads());
}

#endif

}  // namespace
}  // namespace weft

extern "C" {

// A record of 64-bit numbers (see gemm.py); `y` is contiguous.
struct WeftLinear {
    const weft::bf16 *x;
    int64_t x_stride;
    const uint32_t *weight;
    const weft::bf16 *bias;
    weft::bf16 *y;
    int64_t rows, in, out, threads;
};

// Called without a record, reports only whether this processor has the instruction.
int weft_linear(const WeftLinear *given) {
    using namespace weft;
#ifdef __AVX512BF16__
    if (!given) return OK;
    const WeftLinear &g = *given;
    try {
        linear({g.x, g.x_stride, g.weight, g.bias, g.y, g.rows, g.in, g.out}, int(g.threads));
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
    return OK;
#else
    return NO_BFLOAT16;
#endif
}

}  // extern "C"
