// Expand: y += gate * delta, for all entries of a block's rows.
#pragma once

#include "bottleneck.h"

namespace weft {
namespace {

// U units of the outputs of R rows, from `row` and output `o` on; `part` is their number if it is less than a unit.
template <int R, int U, class W>
struct OutputTile {
    static constexpr Order ORDER = order_of<W>();

    const Entries &entries;
    const int64_t o, part;
    WeightPrefetcher &prefetch;
    const float *gates[R];  // of each row's entries
    Unit base[R][U], total[R][U];

    OutputTile(const Entries &entries, int64_t row, int64_t o, int64_t part, WeightPrefetcher &prefetch)
        : entries(entries), o(o), part(part), prefetch(prefetch) {
        each<R>([&](int r) { gates[r] = entries.gates + entries.offsets[row + r]; });
    }

    template <class T>
    Unit take(const T *from) const {
        return U == 1 && part ? load_part<ORDER>(from, part) : load<ORDER>(from);
    }

    bool is_used(int32_t entry) const {
        bool is_used = false;
        each<R>([&](int r) { is_used |= gates[r][entry] != 0.0f; });
        return is_used;
    }

    // A row without the entry, whose gate is 0, keeps its bits.
    void add(int32_t entry, int r, int u, Unit delta) {
        const float gate = gates[r][entry];
        if (gate == 0.0f) return;
        total[r][u].lo = fma(gate, delta.lo, total[r][u].lo);
        total[r][u].hi = fma(gate, delta.hi, total[r][u].hi);
    }

    void add_low_rank(int32_t entry, const SlotCell &cell, Rows<const float> hidden) {
        const int64_t out = entries.out;
        Unit delta[R][U] = {};
        auto take_one = [this](auto *from) { return take(from); };
        multiply<R, U, W>(hidden, cell.b<W>(out) + o, out, cell.rank, take_one, delta, prefetch);
        if (cell.is_bottleneck()) {
            const Vectors v(cell, out);
            each<U>([&](int u) {
                const Unit bias = take(v.up_bias + o + u * UNIT);
                each<R>([&](int r) {
                    delta[r][u].lo += bias.lo;
                    delta[r][u].hi += bias.hi;
                });
            });
        }
        each<R, U>([&](int r, int u) { add(entry, r, u, delta[r][u]); });
    }

    // Adds delta_of(r, u, v), in which v is unit u of the cell's vector.
    template <class DeltaOf>
    void add_vector(int32_t entry, const SlotCell &cell, DeltaOf delta_of) {
        const float *from = cell.vector() + o;
        prefetch.units<U>(from);
        each<U>([&](int u) {
            const Unit v = take(from + u * UNIT);
            each<R>([&](int r) { add(entry, r, u, delta_of(r, u, v)); });
        });
    }

    void add_entry(int32_t entry, const SlotCell &cell, Rows<const float> hidden, Rows<const float> z) {
        if (cell.kind == BOTTLENECK_NORMED) {
            each<U>([&](int u) { each<R>([&](int r) { add(entry, r, u, take(z.row(r) + o + u * UNIT)); }); });
        } else if (cell.has_hidden()) {
            add_low_rank(entry, cell, hidden);
        } else if (cell.kind == SCALE_OUTPUT) {
            add_vector(entry, cell, [&](int r, int u, Unit scale) {
                return Unit{(scale.lo - 1.0f) * base[r][u].lo, (scale.hi - 1.0f) * base[r][u].hi};
            });
        } else if (cell.kind == BIAS) {
            add_vector(entry, cell, [](int, int, Unit bias) { return bias; });
        }
    }
};

// R rows of the block from its row `first` on, and U units; `scratch` points at the start of the block's.
template <int R, int U, class W, class X>
[[gnu::flatten]] void expand_tile(const Entries &entries, const Block &block, int32_t first, float *scratch, Rows<X> y,
                                  int64_t o, int64_t part, WeightPrefetcher &prefetch) {
    OutputTile<R, U, W> tile(entries, block.row + first, o, part, prefetch);
    each<R, U>([&](int r, int u) { tile.total[r][u] = tile.base[r][u] = tile.take(y.row(r) + o + u * UNIT); });
    const int32_t *slots = entries.slots + entries.offsets[block.row];  // all rows of the block have the same
    for (int32_t e = 0; e < block.entries; e++) {
        const SlotCell &cell = entries.table[slots[e]];
        const Scratch own = {scratch, block.rows, cell.rank, entries.out};
        scratch += Scratch::size(cell, block.rows, entries.out);
        if (tile.is_used(e)) tile.add_entry(e, cell, own.hidden().from(first), own.z().from(first));
    }
    each<R>([&](int r) {
        if (!block.is_live[first + r]) return;
        each<U>([&](int u) {
            X *to = y.row(r) + o + u * UNIT;
            if (U == 1 && part) store_part<order_of<W>()>(to, part, tile.total[r][u]);
            else store<order_of<W>()>(to, tile.total[r][u]);
        });
    });
}

// The outputs o .. end - 1 of R rows, U units at a time.
template <int R, int U, class W, class X>
void expand(const Entries &entries, const Block &block, int32_t first, float *scratch, Rows<X> y, int64_t o,
            int64_t end, WeightPrefetcher &prefetch) {
    for (; o + U * UNIT <= end; o += U * UNIT) expand_tile<R, U, W>(entries, block, first, scratch, y, o, 0, prefetch);
    for (; o + UNIT <= end; o += UNIT) expand_tile<R, 1, W>(entries, block, first, scratch, y, o, 0, prefetch);
    if (o < end) expand_tile<R, 1, W>(entries, block, first, scratch, y, o, end - o, prefetch);
}

}  // namespace
}  // namespace weft
