// Gated adapter deltas of a site, row by row:  y[t] += sum over k of gate[t, k] * delta_k(x[t], y[t], r[t]).
//
// Two phases. Shrink: hidden = A x, by (block, entry, eight ranks). Expand: y += gate * hidden B and the elementwise
// kinds, by (block, 256 outputs). A block is up to four consecutive rows with the same list of slots, and reads each
// weight once for them. Threads take whole blocks where these come out even, and wait for nobody; else they share out
// the parts of each phase and wait between phases. Nothing of this changes a row's order of operations:
//   hidden[r] = sum over the lanes of the chain over i
//   delta[o]  = the chain over r
//   out[o]    = y[o], then the chain over the row's entries in their order
// Bottleneck adapters have whole rows of their own, z, in float32, and up to two phases more, by (block, entry). Fill,
// before shrink: z = what f reads, normed; their hidden = act(A z + b). Finish, after it and for the normed kind alone:
// z = LN(y + f(y)) - y, because a norm needs all of a row before expand may take it in parts.
#include "lanes.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include <omp.h>

namespace weft {
namespace {

enum Kind : int64_t {
    NOTHING = 0,
    LORA = 1,
    OUTPUT_SCALE = 2,
    INPUT_SCALE = 3,
    BIAS = 4,
    BOTTLENECK = 5,           // f(y)
    BOTTLENECK_SUM = 6,       // f(y + r)
    BOTTLENECK_RESIDUAL = 7,  // f(r)
    BOTTLENECK_NORMED = 8,    // LN(y + f(y)) - y
};

struct Site {  // one row of the table
    int64_t kind, rank, a, b;

    bool is_bottleneck() const { return kind >= BOTTLENECK && kind <= BOTTLENECK_NORMED; }
    bool reads_residual() const { return kind == BOTTLENECK_SUM || kind == BOTTLENECK_RESIDUAL; }
    bool has_hidden() const { return kind == LORA || is_bottleneck(); }
    bool adds_to_output() const { return has_hidden() || kind == OUTPUT_SCALE || kind == BIAS; }

    // The scratch of one of its rows: the hidden vectors of all rows come first, then the z of all rows.
    int64_t scratch(int64_t out) const { return has_hidden() ? rank + (is_bottleneck() ? out : 0) : 0; }
};

// What a bottleneck's second address holds; see deltas.py.
enum Activation { RELU = 0, GELU = 1, SILU = 2 };

struct Vectors {
    Activation activation;
    bool has_norm;
    float eps;
    const float *down_bias, *up_bias, *gain, *shift;

    Vectors(const Site &site, int64_t out) {
        const float *from = (const float *)site.b;
        activation = Activation(int(from[0]));
        has_norm = from[1] != 0.0f;
        eps = from[2];
        down_bias = from + 3;
        up_bias = down_bias + site.rank;
        gain = up_bias + out;
        shift = gain + out;
    }
};

constexpr int ROWS = 4;               // rows of a block
constexpr int RANKS = 8;              // ranks of a shrink task
constexpr int64_t CHUNK = 256;        // outputs of an expand task
constexpr int64_t AHEAD = 40 << 10;          // bytes
constexpr int64_t LINE = 64;                 // bytes that memory gives at a time
constexpr int64_t SERIAL_BELOW = 96 << 10;  // multiply-adds under which waking a second thread costs more than it saves

struct Rows {  // what a batch's rows take at one site
    const int32_t *offsets, *slots;
    const float *gates;
    int64_t count;
    const Site *table;
    int64_t num_slots;
    bool has_residual;
    int64_t out;

    Status check(int64_t num_entries) const {
        if (offsets[0] != 0 || offsets[count] != num_entries) return BAD_OFFSETS;
        for (int64_t t = 0; t < count; t++)
            if (offsets[t + 1] < offsets[t]) return BAD_OFFSETS;
        for (int64_t n = 0; n < num_entries; n++) {
            if (slots[n] < 0 || slots[n] >= num_slots) return BAD_SLOT;
            const Site &site = table[slots[n]];
            if (site.has_hidden() && site.rank < 1) return BAD_RANK;
            if (site.reads_residual() && !has_residual) return NO_RESIDUAL;
        }
        return OK;
    }

    bool same_slots(int64_t s, int64_t t) const {
        int32_t entries = offsets[s + 1] - offsets[s];
        return offsets[t + 1] - offsets[t] == entries &&
               std::equal(slots + offsets[s], slots + offsets[s] + entries, slots + offsets[t]);
    }
};

// Asks memory for weights in the order of their use, AHEAD bytes before it: one line for each that is used. The
// processor guesses little here, where an adapter's weights are short and its rows are read side by side.
struct Weights {
    const char *begin, *end;
};

class Ahead {
  public:
    Ahead() = default;  // asks for nothing
    Ahead(const Weights *next, const Weights *last) : next(next), last(last), behind(AHEAD) {}

    // N units of 32 weights are about to be used. It begins where they begin, and asks for twice as much until it is
    // ahead: asked for at once, that much would keep the first uses waiting.
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
    const char *at = nullptr, *end = nullptr;
    const Weights *next = nullptr, *last = nullptr;
    int64_t behind = 0;  // bytes

    template <int BYTES>
    void ask() {
        if (at >= end) {
            if (next == last) return;
            at = next->begin, end = next->end, next++;
        }
        EACH(n, BYTES / LINE) __builtin_prefetch(at + n * LINE, 0, 2);
        at += BYTES;
    }
};

// Work of one thread: the tasks whose cost begins in its share of the whole.
struct Task {
    int32_t block, entry, part;
    int64_t cost_before;
};

struct Tasks {
    std::vector<Task> list;
    int64_t cost = 0;

    void add(int32_t block, int32_t entry, int32_t part, int64_t task_cost) {
        list.push_back({block, entry, part, cost});
        cost += task_cost;
    }
    size_t begin_of(int thread, int threads) const {
        int64_t share = cost * thread / threads;
        auto before = [](const Task &task, int64_t value) { return task.cost_before < value; };
        return std::lower_bound(list.begin(), list.end(), share, before) - list.begin();
    }
    // Whether no thread's share is much above the mean.
    bool is_even(int threads) const {
        auto cost_before = [this](size_t n) { return n < list.size() ? list[n].cost_before : cost; };
        for (int thread = 0; thread < threads; thread++) {
            int64_t share = cost_before(begin_of(thread + 1, threads)) - cost_before(begin_of(thread, threads));
            if (share * threads * 8 > cost * 9) return false;
        }
        return true;
    }
};

struct Block {
    int64_t row;
    int32_t rows, entries;
    int64_t scratch;         // where its entries' scratch begins, one entry after another
    int32_t weights;         // what is listed of the plan's weights before its own
    bool is_first;           // not the same slots as in the block before
    bool is_live[ROWS];      // has the row any entry that adds something

    const Site &site(const Rows &all, int32_t entry) const { return all.table[all.slots[all.offsets[row] + entry]]; }
    bool is_used(const Rows &all, int32_t entry) const {  // whether the entry adds something to one of the rows
        for (int32_t r = 0; r < rows; r++)
            if (all.gates[all.offsets[row + r] + entry] != 0.0f) return true;
        return false;
    }
    int64_t scratch_of(const Rows &all, int32_t entry, int64_t out) const {
        int64_t at = scratch;
        for (int32_t e = 0; e < entry; e++) at += rows * site(all, e).scratch(out);
        return at;
    }
};

struct Plan {
    std::vector<Block> blocks;
    std::vector<Weights> weights;  // in the order of the blocks
    Tasks whole;                   // by block
    int64_t scratch_size = 0, work = 0;

    Plan(const Rows &rows, int64_t in, int64_t weight_size) {
        blocks.reserve(rows.count);
        whole.list.reserve(rows.count);
        weights.reserve(2 * rows.offsets[rows.count]);
        for (int64_t t = 0; t < rows.count;) {
            int64_t end = t + 1;
            while (end < rows.count && end - t < ROWS && rows.same_slots(t, end)) end++;
            add(rows, t, int32_t(end - t), t == 0 || !rows.same_slots(t - 1, t), in, weight_size);
            t = end;
        }
    }

    void add(const Rows &rows, int64_t row, int32_t count, bool is_first, int64_t in, int64_t weight_size) {
        const int64_t out = rows.out;
        const int32_t entries = rows.offsets[row + 1] - rows.offsets[row];
        Block block = {row, count, entries, scratch_size, int32_t(weights.size()), is_first, {}};
        int64_t cost = 0;
        for (int32_t e = 0; e < block.entries; e++) {
            const Site &site = block.site(rows, e);
            if (!site.adds_to_output()) continue;
            bool is_used = false;
            for (int32_t r = 0; r < count; r++)
                if (rows.gates[rows.offsets[row + r] + e] != 0.0f) is_used = block.is_live[r] = true;
            scratch_size += count * site.scratch(out);
            if (!is_used) continue;
            auto list = [&](int64_t from, int64_t size) {
                const char *begin = (const char *)from;
                if (!is_first) return;
                const bool goes_on = int32_t(weights.size()) > block.weights && weights.back().end == begin;
                if (goes_on) weights.back().end += size;
                else weights.push_back({begin, begin + size});
            };
            cost += 1;
            if (site.kind == LORA) {
                list(site.a, site.rank * in * weight_size);
                list(site.b, site.rank * out * weight_size);
                cost += site.rank * (in + out);
                work += count * site.rank * (in + out);
            } else if (site.is_bottleneck()) {
                list(site.a, 2 * site.rank * out * weight_size);
                cost += (2 * site.rank + 8) * out;
                work += count * (2 * site.rank + 8) * out;
            } else {
                list(site.a, out * sizeof(float));
            }
        }
        if (cost == 0) return;
        work += 4 * count * out;
        whole.add(int32_t(blocks.size()), 0, 0, (1 + count) * (cost + 4 * out));
        blocks.push_back(block);
    }
};

// A plan's work in parts, for blocks too few to give every thread the same of them; each phase needs all of the one
// before.
struct Parts {
    Tasks fill, shrink, finish, expand;

    Parts(const Plan &plan, const Rows &rows, int64_t in) {
        for (size_t index = 0; index < plan.blocks.size(); index++)
            add(int32_t(index), plan.blocks[index], rows, in);
    }

    void add(int32_t index, const Block &block, const Rows &rows, int64_t in) {
        const int64_t out = rows.out;
        const int32_t count = block.rows;
        int64_t depth = 0;  // operations per output
        for (int32_t e = 0; e < block.entries; e++) {
            const Site &site = block.site(rows, e);
            if (!site.adds_to_output() || !block.is_used(rows, e)) continue;
            if (site.has_hidden()) {
                const int64_t width = site.is_bottleneck() ? out : in;
                for (int64_t rank = 0; rank < site.rank; rank += RANKS) {
                    int64_t ranks = std::min<int64_t>(RANKS, site.rank - rank);
                    shrink.add(index, e, int32_t(rank), ranks * (1 + count) * width);
                }
            }
            if (site.is_bottleneck()) fill.add(index, e, 0, count * out);
            if (site.kind == BOTTLENECK_NORMED) finish.add(index, e, 0, (site.rank + 8) * (1 + count) * out);
            depth += site.has_hidden() && site.kind != BOTTLENECK_NORMED ? site.rank : 1;
        }
        for (int64_t o = 0; o < out; o += CHUNK)
            expand.add(index, 0, int32_t(o / CHUNK), (depth + 4) * (1 + count) * std::min(CHUNK, out - o));
    }
};

// hidden[row][rank] for R rows and K ranks at once.
template <int R, int K, class X, class W>
void shrink_tile(const X *x, int64_t x_stride, const W *a, int64_t in, float *hidden, int64_t rank, Ahead &ahead) {
    constexpr Order ORDER = order_of<W>();
    f32x16 acc[R][K] = {};
    int64_t i = 0;
    auto step = [&](auto take) {
        Unit xs[R];
        ahead.units<K>(a);
        EACH(r, R) xs[r] = take(x + r * x_stride + i);
        EACH(k, K) {
            Unit w = take(a + k * in + i);
            EACH(r, R) {
                acc[r][k] = fma(xs[r].lo, w.lo, acc[r][k]);
                acc[r][k] = fma(xs[r].hi, w.hi, acc[r][k]);
            }
        }
    };
    for (; i + UNIT <= in; i += UNIT) step([](auto *from) { return load<ORDER>(from); });
    if (i < in) step([&](auto *from) { return load_part<ORDER>(from, in - i); });
    EACH(r, R)
        EACH(k, K) hidden[r * rank + k] = sum(acc[r][k]);
}

template <class X, class W>
void shrink(const X *x, int64_t x_stride, int32_t rows, const W *a, int64_t in, float *hidden, int64_t rank,
            int64_t ranks, Ahead &ahead) {
    int64_t k = 0;
    if (rows == ROWS) {
        for (; k + 4 <= ranks; k += 4) shrink_tile<ROWS, 4>(x, x_stride, a + k * in, in, hidden + k, rank, ahead);
        for (; k < ranks; k++) shrink_tile<ROWS, 1>(x, x_stride, a + k * in, in, hidden + k, rank, ahead);
        return;
    }
    for (int32_t r = 0; r < rows; r++) {
        for (k = 0; k + 8 <= ranks; k += 8) shrink_tile<1, 8>(x, x_stride, a + k * in, in, hidden + k, rank, ahead);
        for (; k + 4 <= ranks; k += 4) shrink_tile<1, 4>(x, x_stride, a + k * in, in, hidden + k, rank, ahead);
        for (; k < ranks; k++) shrink_tile<1, 1>(x, x_stride, a + k * in, in, hidden + k, rank, ahead);
        x += x_stride, hidden += rank;
    }
}

static inline float activate(Activation activation, float v) {
    switch (activation) {
    case RELU: return v < 0.0f ? 0.0f : v;
    case GELU: return 0.5f * v * (1.0f + std::erf(v * 0.70710678f));
    case SILU: return v / (1.0f + std::exp(-v));
    }
    return v;
}

// Layer norm of one row, in place: mean, then the squares' mean about it, then each element.
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

// z of one row: what f reads.
template <class X>
void fill(const Site &site, const X *y, const X *r, int64_t out, float *z) {
    auto step = [&](int64_t i, auto take) {
        if (site.kind == BOTTLENECK_RESIDUAL) return take(r + i);
        Unit total = take(y + i);
        if (site.kind == BOTTLENECK_SUM) {
            Unit more = take(r + i);
            total.lo += more.lo;
            total.hi += more.hi;
        }
        return total;
    };
    int64_t i = 0;
    for (; i + UNIT <= out; i += UNIT) store<NATURAL>(z + i, step(i, [](auto *from) { return load<NATURAL>(from); }));
    if (i < out)
        store_part<NATURAL>(z + i, out - i, step(i, [&](auto *from) { return load_part<NATURAL>(from, out - i); }));
    const Vectors v(site, out);
    if (v.has_norm && site.kind != BOTTLENECK_NORMED) normalize(z, out, v);
}

// lo, hi [row][unit] = hidden B, for the hidden vectors `h` of R rows.
template <int R, int U, class W, class Take>
static inline void multiply(const W *b, int64_t out, const float *h, int64_t rank, Take take, f32x16 (&lo)[R][U],
                            f32x16 (&hi)[R][U], Ahead &ahead) {
    for (int64_t k = 0; k < rank; k++) {
        ahead.units<U>(b);
        EACH(u, U) {
            Unit w = take(b + k * out + u * UNIT);
            EACH(r, R) {
                lo[r][u] = fma(h[r * rank + k], w.lo, lo[r][u]);
                hi[r][u] = fma(h[r * rank + k], w.hi, hi[r][u]);
            }
        }
    }
}

// Adds f(y) to z for R rows, U units of outputs from `o` on.
template <int R, int U, class W>
void finish_tile(const Site &site, const Vectors &v, const float *h, float *z, int64_t out, int64_t o, int64_t part,
                 Ahead &ahead) {
    constexpr Order ORDER = order_of<W>();
    auto take = [part](auto *from) { return U == 1 && part ? load_part<ORDER>(from, part) : load<ORDER>(from); };
    f32x16 lo[R][U] = {}, hi[R][U] = {};
    multiply<R, U, W>((const W *)site.a + site.rank * out + o, out, h, site.rank, take, lo, hi, ahead);
    EACH(u, U) {
        Unit bias = take(v.up_bias + o + u * UNIT);
        EACH(r, R) {
            float *to = z + r * out + o + u * UNIT;
            Unit total = take(to);
            total.lo += lo[r][u] + bias.lo;
            total.hi += hi[r][u] + bias.hi;
            if (U == 1 && part) store_part<ORDER>(to, part, total);
            else store<ORDER>(to, total);
        }
    }
}

template <int R, int U, class X, class W>
void finish(const Site &site, const float *h, float *z, const X *y, int64_t y_stride, int64_t out, Ahead &ahead) {
    const Vectors v(site, out);
    int64_t o = 0;
    for (; o + U * UNIT <= out; o += U * UNIT) finish_tile<R, U, W>(site, v, h, z, out, o, 0, ahead);
    for (; o + UNIT <= out; o += UNIT) finish_tile<R, 1, W>(site, v, h, z, out, o, 0, ahead);
    if (o < out) finish_tile<R, 1, W>(site, v, h, z, out, o, out - o, ahead);
    for (int r = 0; r < R; r++, z += out, y += y_stride) {
        normalize(z, out, v);
        auto subtract = [&](int64_t i, auto take) {
            Unit total = take(z + i), base = take(y + i);
            return Unit{total.lo - base.lo, total.hi - base.hi};
        };
        int64_t i = 0;
        for (; i + UNIT <= out; i += UNIT)
            store<NATURAL>(z + i, subtract(i, [](auto *from) { return load<NATURAL>(from); }));
        if (i < out)
            store_part<NATURAL>(z + i, out - i, subtract(i, [&](auto *p) { return load_part<NATURAL>(p, out - i); }));
    }
}

// U units of the outputs of R rows, from `o` on; `part` is their number where it is less than a unit.
template <int R, int U, class X, class W>
void expand_tile(const Rows &rows, const Block &block, int32_t first, const float *scratch, X *y, int64_t y_stride,
                 int64_t out, int64_t o, int64_t part, Ahead &ahead) {
    constexpr Order ORDER = order_of<W>();
    auto take = [part](auto *from) { return U == 1 && part ? load_part<ORDER>(from, part) : load<ORDER>(from); };
    Unit base[R][U], total[R][U];
    EACH(r, R)
        EACH(u, U) total[r][u] = base[r][u] = take(y + r * y_stride + o + u * UNIT);

    const int32_t *entry_of[R];
    EACH(r, R) entry_of[r] = rows.offsets + block.row + first + r;
    auto add = [&](int32_t e, int r, int u, Unit delta) {
        float gate = rows.gates[*entry_of[r] + e];
        if (gate == 0.0f) return;
        total[r][u].lo = fma(gate, delta.lo, total[r][u].lo);
        total[r][u].hi = fma(gate, delta.hi, total[r][u].hi);
    };
    for (int32_t e = 0; e < block.entries; e++) {
        const Site &site = rows.table[rows.slots[*entry_of[0] + e]];
        const float *h = scratch + first * site.rank, *z = scratch + block.rows * site.rank + first * out + o;
        scratch += block.rows * site.scratch(out);
        bool is_used = false;
        EACH(r, R) is_used |= rows.gates[*entry_of[r] + e] != 0.0f;
        if (!is_used) continue;
        if (site.kind == BOTTLENECK_NORMED) {
            EACH(u, U)
                EACH(r, R) add(e, r, u, take(z + r * out + u * UNIT));
        } else if (site.has_hidden()) {
            const W *b = site.kind == LORA ? (const W *)site.b : (const W *)site.a + site.rank * out;
            f32x16 lo[R][U] = {}, hi[R][U] = {};
            multiply<R, U, W>(b + o, out, h, site.rank, take, lo, hi, ahead);
            if (site.is_bottleneck()) {
                const Vectors v(site, out);
                EACH(u, U) {
                    Unit bias = take(v.up_bias + o + u * UNIT);
                    EACH(r, R) {
                        lo[r][u] += bias.lo;
                        hi[r][u] += bias.hi;
                    }
                }
            }
            EACH(r, R)
                EACH(u, U) add(e, r, u, {lo[r][u], hi[r][u]});
        } else if (site.kind == OUTPUT_SCALE) {
            const float *l = (const float *)site.a + o;
            ahead.units<U>(l);
            EACH(u, U) {
                Unit scale = take(l + u * UNIT);
                EACH(r, R)
                    add(e, r, u, {(scale.lo - 1.0f) * base[r][u].lo, (scale.hi - 1.0f) * base[r][u].hi});
            }
        } else if (site.kind == BIAS) {
            const float *bias = (const float *)site.a + o;
            ahead.units<U>(bias);
            EACH(u, U) {
                Unit delta = take(bias + u * UNIT);
                EACH(r, R) add(e, r, u, delta);
            }
        }
    }
    EACH(r, R) {
        if (!block.is_live[first + r]) continue;
        EACH(u, U) {
            X *to = y + r * y_stride + o + u * UNIT;
            if (U == 1 && part) store_part<ORDER>(to, part, total[r][u]);
            else store<ORDER>(to, total[r][u]);
        }
    }
}

template <int R, int U, class X, class W>
void expand(const Rows &rows, const Block &block, int32_t first, const float *scratch, X *y, int64_t y_stride,
            int64_t out, int64_t o, int64_t end, Ahead &ahead) {
    for (; o + U * UNIT <= end; o += U * UNIT)
        expand_tile<R, U, X, W>(rows, block, first, scratch, y, y_stride, out, o, 0, ahead);
    for (; o + UNIT <= end; o += UNIT)
        expand_tile<R, 1, X, W>(rows, block, first, scratch, y, y_stride, out, o, 0, ahead);
    if (o < end) expand_tile<R, 1, X, W>(rows, block, first, scratch, y, y_stride, out, o, end - o, ahead);
}

// What is done to a block, in this order; several threads may do parts of one phase.
template <class X, class W>
struct Phases {
    const X *x;
    int64_t x_stride;
    X *y;
    int64_t y_stride;
    const X *residual;
    int64_t r_stride, in;
    float *scratch;

    void fill(const Block &block, const Rows &rows, int32_t entry) const {
        const Site &site = block.site(rows, entry);
        float *z = scratch + block.scratch_of(rows, entry, rows.out) + block.rows * site.rank;
        for (int64_t t = block.row; t < block.row + block.rows; t++, z += rows.out)
            weft::fill(site, y + t * y_stride, site.reads_residual() ? residual + t * r_stride : nullptr, rows.out, z);
    }

    void shrink(const Block &block, const Rows &rows, int32_t entry, int64_t rank, int64_t end, Ahead &ahead) const {
        const Site &site = block.site(rows, entry);
        float *to = scratch + block.scratch_of(rows, entry, rows.out);
        if (site.kind == LORA) {
            const W *a = (const W *)site.a + rank * in;
            weft::shrink(x + block.row * x_stride, x_stride, block.rows, a, in, to + rank, site.rank, end - rank,
                         ahead);
            return;
        }
        const float *z = to + block.rows * site.rank;
        const W *a = (const W *)site.a + rank * rows.out;
        weft::shrink(z, rows.out, block.rows, a, rows.out, to + rank, site.rank, end - rank, ahead);
        const Vectors v(site, rows.out);
        for (int32_t r = 0; r < block.rows; r++) {
            for (int64_t k = rank; k < end; k++) {
                float &h = to[r * site.rank + k];
                h = activate(v.activation, h + v.down_bias[k]);
            }
        }
    }

    void finish(const Block &block, const Rows &rows, int32_t entry, Ahead &ahead) const {
        const Site &site = block.site(rows, entry);
        const float *h = scratch + block.scratch_of(rows, entry, rows.out);
        float *z = scratch + block.scratch_of(rows, entry, rows.out) + block.rows * site.rank;
        const X *from = y + block.row * y_stride;
        if (block.rows == ROWS) return weft::finish<ROWS, 2, X, W>(site, h, z, from, y_stride, rows.out, ahead);
        for (int32_t r = 0; r < block.rows; r++, h += site.rank, z += rows.out, from += y_stride)
            weft::finish<1, 4, X, W>(site, h, z, from, y_stride, rows.out, ahead);
    }

    void expand(const Block &block, const Rows &rows, int64_t o, int64_t end, Ahead &ahead) const {
        const float *from = scratch + block.scratch;
        X *to = y + block.row * y_stride;
        const int64_t out = rows.out;
        if (block.rows == ROWS)
            return weft::expand<ROWS, 2, X, W>(rows, block, 0, from, to, y_stride, out, o, end, ahead);
        for (int32_t r = 0; r < block.rows; r++) {
            if (!block.is_live[r]) continue;
            weft::expand<1, 4, X, W>(rows, block, r, from, to + r * y_stride, y_stride, out, o, end, ahead);
        }
    }

    void all(const Block &block, const Rows &rows, Ahead &ahead) const {
        for (int32_t e = 0; e < block.entries; e++) {
            const Site &site = block.site(rows, e);
            if (!site.has_hidden() || !block.is_used(rows, e)) continue;
            if (site.is_bottleneck()) fill(block, rows, e);
            for (int64_t rank = 0; rank < site.rank; rank += RANKS)
                shrink(block, rows, e, rank, std::min<int64_t>(rank + RANKS, site.rank), ahead);
            if (site.kind == BOTTLENECK_NORMED) finish(block, rows, e, ahead);
        }
        for (int64_t o = 0; o < rows.out; o += CHUNK) expand(block, rows, o, std::min(o + CHUNK, rows.out), ahead);
    }
};

template <class X, class W>
void post(const X *x, int64_t x_stride, X *y, int64_t y_stride, const X *residual, int64_t r_stride, int64_t in,
          const Rows &rows, int threads) {
    const Plan plan(rows, in, sizeof(W));
    if (plan.blocks.empty()) return;
    std::unique_ptr<float[]> scratch(new float[plan.scratch_size]);
    const Phases<X, W> phases = {x, x_stride, y, y_stride, residual, r_stride, in, scratch.get()};

    auto whole = [&](int thread, int team) {
        const size_t begin = plan.whole.begin_of(thread, team), end = plan.whole.begin_of(thread + 1, team);
        auto weights_before = [&](size_t n) {
            return plan.weights.data() + (n < plan.blocks.size() ? plan.blocks[n].weights : plan.weights.size());
        };
        Ahead ahead(weights_before(begin), weights_before(end)), nothing;
        for (size_t n = begin; n < end; n++) {
            const Block &block = plan.blocks[n];
            phases.all(block, rows, block.is_first ? ahead : nothing);
        }
    };
    // One thread or all of them: another team size would make the OpenMP runtime end and restart its threads.
    if (threads == 1 || plan.work < SERIAL_BELOW) return whole(0, 1);
    if (plan.whole.is_even(threads)) {
#pragma omp parallel num_threads(threads)
        whole(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
    const Parts parts(plan, rows, in);
    auto some = [&](int thread, int team) {
        Ahead nothing;
        auto each = [&](const Tasks &tasks, auto work) {  // the thread's share, and then wait for that of the others
            const size_t end = tasks.begin_of(thread + 1, team);
            for (size_t n = tasks.begin_of(thread, team); n < end; n++) {
                const Task &task = tasks.list[n];
                work(task, plan.blocks[task.block]);
            }
            if (team > 1 && !tasks.list.empty()) {
#pragma omp barrier
            }
        };
        each(parts.fill, [&](auto &task, auto &block) { phases.fill(block, rows, task.entry); });
        each(parts.shrink, [&](auto &task, auto &block) {
            const int64_t end = std::min<int64_t>(task.part + RANKS, block.site(rows, task.entry).rank);
            phases.shrink(block, rows, task.entry, task.part, end, nothing);
        });
        each(parts.finish, [&](auto &task, auto &block) { phases.finish(block, rows, task.entry, nothing); });
        each(parts.expand, [&](auto &task, auto &block) {
            const int64_t o = task.part * CHUNK;
            phases.expand(block, rows, o, std::min(o + CHUNK, rows.out), nothing);
        });
    };
#pragma omp parallel num_threads(threads)
    some(omp_get_thread_num(), omp_get_num_threads());
}

template <class X>
void pre(const X *x, int64_t x_stride, X *out, int64_t out_stride, int64_t in, const Rows &rows, int threads) {
    auto is_used = [&](int32_t n) { return rows.gates[n] != 0.0f && rows.table[rows.slots[n]].kind == INPUT_SCALE; };
    auto scale_of = [&](int32_t n) { return (const float *)rows.table[rows.slots[n]].a; };
    auto first_used = [&](int64_t t) {  // or the row's end
        int32_t n = rows.offsets[t];
        while (n < rows.offsets[t + 1] && !is_used(n)) n++;
        return n;
    };
    auto run = [&](int64_t t) {
        const X *from = x + t * x_stride;
        X *to = out + t * out_stride;
        const int32_t begin = first_used(t), end = rows.offsets[t + 1];
        if (begin == end) {
            memcpy(to, from, in * sizeof(X));
            return;
        }
        const int32_t soon = t + 1 < rows.count ? first_used(t + 1) : end;  // what the next row needs is asked for here
        const bool has_next = t + 1 < rows.count && soon < rows.offsets[t + 2];
        const float *next = scale_of(has_next ? soon : begin);
        auto scaled = [&](int64_t i, auto take) {
            Unit base = take(from + i), total = base;
            EACH(n, 2) __builtin_prefetch(next + i + n * 16, 0, 2);
            for (int32_t n = begin; n < end; n++) {
                if (!is_used(n)) continue;
                Unit l = take(scale_of(n) + i);
                total.lo = fma(rows.gates[n], (l.lo - 1.0f) * base.lo, total.lo);
                total.hi = fma(rows.gates[n], (l.hi - 1.0f) * base.hi, total.hi);
            }
            return total;
        };
        int64_t i = 0;
        for (; i + UNIT <= in; i += UNIT) store<NATURAL>(to + i, scaled(i, [](auto *p) { return load<NATURAL>(p); }));
        if (i < in)
            store_part<NATURAL>(to + i, in - i, scaled(i, [&](auto *p) { return load_part<NATURAL>(p, in - i); }));
    };
    if (threads == 1 || rows.count * in < SERIAL_BELOW / 8) {  // an element costs a few operations, and three streams
        for (int64_t t = 0; t < rows.count; t++) run(t);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < rows.count; t++) run(t);
}

}  // namespace
}  // namespace weft

extern "C" {

// What the functions below are given: one packed record of 64-bit numbers each, in this order (see deltas.py).
struct WeftRows {
    const int32_t *offsets, *slots;
    const float *gates;
    int64_t num_rows, num_entries;
};

struct WeftDeltas {
    const void *x;
    int64_t x_stride;
    void *y;
    int64_t y_stride, is_bf16, threads;
    const void *residual;
    int64_t residual_stride;
    WeftRows rows;
    int64_t in, out, is_weight_bf16;
    const weft::Site *table;
    int64_t num_slots;
};

static weft::Rows rows_of(const WeftDeltas &g, bool has_residual) {
    return {g.rows.offsets, g.rows.slots, g.rows.gates, g.rows.num_rows, g.table, g.num_slots, has_residual, g.out};
}

int weft_post(const WeftDeltas *given) {
    using namespace weft;
    const WeftDeltas &g = *given;
    const Rows rows = rows_of(g, g.residual != nullptr);
    if (Status status = rows.check(g.rows.num_entries)) return status;
    try {
        auto go = [&](auto act, auto weight) {
            using X = decltype(act);
            post<X, decltype(weight)>((const X *)g.x, g.x_stride, (X *)g.y, g.y_stride, (const X *)g.residual,
                                      g.residual_stride, g.in, rows, int(g.threads));
        };
        if (g.is_bf16) g.is_weight_bf16 ? go(bf16{}, bf16{}) : go(bf16{}, float{});
        else g.is_weight_bf16 ? go(float{}, bf16{}) : go(float{}, float{});
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
    return OK;
}

int weft_pre(const WeftDeltas *given) {
    using namespace weft;
    const WeftDeltas &g = *given;
    const Rows rows = rows_of(g, true);  // nothing here reads a residual
    if (Status status = rows.check(g.rows.num_entries)) return status;
    auto go = [&](auto act) {
        using X = decltype(act);
        pre((const X *)g.x, g.x_stride, (X *)g.y, g.y_stride, g.in, rows, int(g.threads));
    };
    g.is_bf16 ? go(bf16{}) : go(float{});
    return OK;
}

}  // extern "C"
