// Gated adapter deltas of a site, row by row:  y[t] += sum over k of gate[t, k] * delta_k(x[t], y[t], r[t]).
//
// Two phases. Shrink: hidden = A x, by (block, entry, eight ranks). Expand: y += gate * hidden B and the elementwise
// kinds, by (block, 256 outputs). A block is up to four consecutive rows with the same list of slots, and reads each
// weight once for them. If whole blocks give every thread the same share, threads take whole blocks and never wait for
// each other. If not, they divide the parts of each phase and wait between phases. Neither changes a row's order of
// operations:
//   hidden[r] = sum over the lanes of the chain over i
//   delta[o]  = the chain over r
//   out[o]    = y[o], then the chain over the row's entries in their order
// Bottleneck adapters have whole rows of their own, z, in float32, and up to two more phases, by (block, entry). Fill,
// before shrink: z = the normed input of f; their hidden = act(A z + b). Finish, after shrink and for the normed kind
// only: z = LN(y + f(y)) - y, because a norm needs the whole row before expand may take it in parts.
#include "expand.h"
#include "input_scale.h"

#include <memory>
#include <new>

#include <omp.h>

namespace weft {
namespace {

constexpr int64_t SERIAL_BELOW = 96 << 10;  // multiply-adds below which waking a second thread costs more than it saves

// The phases of a block, in order; several threads may compute parts of one phase.
template <class X, class W>
struct Phases {
    const Entries &entries;
    Rows<const X> x;
    Rows<X> y;
    Rows<const X> residual;
    float *scratch;

    void fill(const Block &block, int32_t entry) const {
        const SlotCell &cell = block.cell(entries, entry);
        const Rows<float> z = block.scratch(entries, entry, scratch).z();
        for (int32_t r = 0; r < block.rows; r++) {
            const X *from = cell.reads_residual() ? residual.row(block.row + r) : nullptr;
            weft::fill(cell, y.row(block.row + r), from, entries.out, z.row(r));
        }
    }

    // Hidden elements rank .. end - 1.
    void shrink(const Block &block, int32_t entry, int64_t rank, int64_t end, WeightPrefetcher &prefetch) const {
        const SlotCell &cell = block.cell(entries, entry);
        const Scratch own = block.scratch(entries, entry, scratch);
        const Rows<float> hidden = {own.hidden().first + rank, cell.rank};
        const int64_t ranks = end - rank;
        if (cell.kind == LORA) {
            const W *a = cell.a<W>() + rank * entries.in;
            return weft::shrink(x.from(block.row), block.rows, a, entries.in, hidden, ranks, prefetch);
        }
        const W *a = cell.a<W>() + rank * entries.out;
        weft::shrink<float>(own.z(), block.rows, a, entries.out, hidden, ranks, prefetch);
        const Vectors v(cell, entries.out);
        for (int32_t r = 0; r < block.rows; r++)
            for (int64_t k = 0; k < ranks; k++) {
                float &h = hidden.row(r)[k];
                h = activate(v.activation, h + v.down_bias[rank + k]);
            }
    }

    void finish(const Block &block, int32_t entry, WeightPrefetcher &prefetch) const {
        const SlotCell &cell = block.cell(entries, entry);
        const Scratch own = block.scratch(entries, entry, scratch);
        const Rows<const float> hidden = own.hidden();
        const Rows<float> z = own.z();
        const Rows<X> from = y.from(block.row);
        const int64_t out = entries.out;
        if (block.rows == BLOCK_ROWS) return weft::finish<BLOCK_ROWS, 2, X, W>(cell, hidden, z, from, out, prefetch);
        for (int32_t r = 0; r < block.rows; r++)
            weft::finish<1, 4, X, W>(cell, hidden.from(r), z.from(r), from.from(r), out, prefetch);
    }

    void expand(const Block &block, int64_t o, WeightPrefetcher &prefetch) const {
        const Rows<X> to = y.from(block.row);
        const int64_t end = std::min(o + CHUNK, entries.out);
        float *own = scratch + block.scratch_begin;
        if (block.rows == BLOCK_ROWS)
            return weft::expand<BLOCK_ROWS, 2, W>(entries, block, 0, own, to, o, end, prefetch);
        for (int32_t r = 0; r < block.rows; r++)
            if (block.is_live[r]) weft::expand<1, 4, W>(entries, block, r, own, to.from(r), o, end, prefetch);
    }

    void all(const Block &block, WeightPrefetcher &prefetch) const {
        for (int32_t e = 0; e < block.entries; e++) {
            const SlotCell &cell = block.cell(entries, e);
            if (!cell.has_hidden() || !block.is_used(entries, e)) continue;
            if (cell.is_bottleneck()) fill(block, e);
            for (int64_t rank = 0; rank < cell.rank; rank += RANKS)
                shrink(block, e, rank, std::min<int64_t>(rank + RANKS, cell.rank), prefetch);
            if (cell.kind == BOTTLENECK_NORMED) finish(block, e, prefetch);
        }
        for (int64_t o = 0; o < entries.out; o += CHUNK) expand(block, o, prefetch);
    }
};

// A thread's share of the blocks. A block with the same slots as the one before finds its weights in the cache.
template <class X, class W>
void run_blocks(const Plan &plan, const Phases<X, W> &phases, int thread, int team) {
    const size_t begin = plan.whole.begin_of(thread, team), end = plan.whole.begin_of(thread + 1, team);
    auto weights_before = [&](size_t n) {
        return plan.weights.data() + (n < plan.blocks.size() ? plan.blocks[n].weights : plan.weights.size());
    };
    WeightPrefetcher prefetch(weights_before(begin), weights_before(end)), nothing;
    for (size_t n = begin; n < end; n++) {
        const Block &block = plan.blocks[n];
        phases.all(block, block.is_first ? prefetch : nothing);
    }
}

// A thread's share of the parts of each phase.
template <class X, class W>
void run_parts(const Plan &plan, const Parts &parts, const Phases<X, W> &phases, int thread, int team) {
    WeightPrefetcher nothing;
    auto each_task = [&](const Tasks &tasks, auto work) {
        const size_t end = tasks.begin_of(thread + 1, team);
        for (size_t n = tasks.begin_of(thread, team); n < end; n++)
            work(tasks.list[n], plan.blocks[tasks.list[n].block]);
        if (team > 1 && !tasks.list.empty()) {
#pragma omp barrier
        }
    };
    each_task(parts.fill, [&](auto &task, auto &block) { phases.fill(block, task.entry); });
    each_task(parts.shrink, [&](auto &task, auto &block) {
        const int64_t end = std::min<int64_t>(task.part + RANKS, block.cell(phases.entries, task.entry).rank);
        phases.shrink(block, task.entry, task.part, end, nothing);
    });
    each_task(parts.finish, [&](auto &task, auto &block) { phases.finish(block, task.entry, nothing); });
    each_task(parts.expand, [&](auto &task, auto &block) { phases.expand(block, task.part * CHUNK, nothing); });
}

template <class X, class W>
void post(const Entries &entries, Rows<const X> x, Rows<X> y, Rows<const X> residual, int threads) {
    const Plan plan(entries, sizeof(W));
    if (plan.blocks.empty()) return;
    std::unique_ptr<float[]> scratch(new float[plan.scratch_size]);
    const Phases<X, W> phases = {entries, x, y, residual, scratch.get()};
    // One thread or all of them: any other team size would make the OpenMP runtime end and restart its threads.
    if (threads == 1 || plan.work < SERIAL_BELOW) return run_blocks(plan, phases, 0, 1);
    if (plan.whole.is_even(threads)) {
#pragma omp parallel num_threads(threads)
        run_blocks(plan, phases, omp_get_thread_num(), omp_get_num_threads());
        return;
    }
    const Parts parts(plan, entries);
#pragma omp parallel num_threads(threads)
    run_parts(plan, parts, phases, omp_get_thread_num(), omp_get_num_threads());
}

template <class X>
void pre(const Entries &entries, Rows<const X> x, Rows<X> out, int threads) {
    const InputScale<X> scale = {entries, x, out};
    if (threads == 1 || entries.num_rows * entries.in < SERIAL_BELOW / 8) {  // an element costs a few operations
        for (int64_t t = 0; t < entries.num_rows; t++) scale.run(t);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < entries.num_rows; t++) scale.run(t);
}

}  // namespace
}  // namespace weft

extern "C" {

// Arguments of the functions below: one packed record of 64-bit numbers each, in this order (see deltas.py).
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
    const weft::SlotCell *table;
    int64_t num_slots;

    weft::Entries entries() const {
        return {rows.offsets, rows.slots, rows.gates, rows.num_rows, table, num_slots, in, out};
    }
};

int weft_post(const WeftDeltas *given) {
    using namespace weft;
    const WeftDeltas &g = *given;
    const Entries entries = g.entries();
    if (Status status = entries.check(g.rows.num_entries, g.residual != nullptr)) return status;
    auto run = [&](auto element, auto weight) {
        using X = decltype(element);
        const Rows<const X> x = {(const X *)g.x, g.x_stride}, residual = {(const X *)g.residual, g.residual_stride};
        post<X, decltype(weight)>(entries, x, {(X *)g.y, g.y_stride}, residual, int(g.threads));
    };
    try {
        with_type(g.is_bf16, [&](auto x) { with_type(g.is_weight_bf16, [&](auto w) { run(x, w); }); });
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
    return OK;
}

int weft_pre(const WeftDeltas *given) {
    using namespace weft;
    const WeftDeltas &g = *given;
    const Entries entries = g.entries();
    if (Status status = entries.check(g.rows.num_entries, true)) return status;  // nothing here reads a residual
    with_type(g.is_bf16, [&](auto element) {
        using X = decltype(element);
        pre<X>(entries, {(const X *)g.x, g.x_stride}, {(X *)g.y, g.y_stride}, int(g.threads));
    });
    return OK;
}

}  // extern "C"
