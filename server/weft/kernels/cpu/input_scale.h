// The input of a base weight with the gated input scales of each row's adapters.
#pragma once

#include "entries.h"

#include <cstring>

namespace weft {
namespace {

template <class X>
struct InputScale {
    const Entries &entries;
    Rows<const X> x;
    Rows<X> out;

    void run(int64_t t) const {
        const X *from = x.row(t);
        X *to = out.row(t);
        const int32_t begin = first_used(t), end = entries.offsets[t + 1];
        if (begin == end) {
            memcpy(to, from, entries.in * sizeof(X));
            return;
        }
        const float *next = first_scale_after(t, scale_of(begin));
        each_unit<NATURAL>(entries.in, [&](int64_t i, auto take, auto put) {
            const Unit base = take(from + i);
            Unit total = base;
            each<2>([&](int n) { __builtin_prefetch(next + i + n * 16, 0, 2); });
            for (int32_t n = begin; n < end; n++) {
                if (!is_used(n)) continue;
                const Unit scale = take(scale_of(n) + i);
                total.lo = fma(entries.gates[n], (scale.lo - 1.0f) * base.lo, total.lo);
                total.hi = fma(entries.gates[n], (scale.hi - 1.0f) * base.hi, total.hi);
            }
            put(to + i, total);
        });
    }

  private:
    const SlotCell &cell(int32_t n) const { return entries.table[entries.slots[n]]; }
    bool is_used(int32_t n) const { return entries.gates[n] != 0.0f && cell(n).kind == SCALE_INPUT; }
    const float *scale_of(int32_t n) const { return cell(n).vector(); }

    // Returns the first entry of row t that scales, or the row's end.
    int32_t first_used(int64_t t) const {
        int32_t n = entries.offsets[t];
        while (n < entries.offsets[t + 1] && !is_used(n)) n++;
        return n;
    }

    // Returns the first address that the row after t reads, to prefetch while row t is computed; `otherwise` if that
    // row scales nothing.
    const float *first_scale_after(int64_t t, const float *otherwise) const {
        if (t + 1 >= entries.num_rows) return otherwise;
        const int32_t n = first_used(t + 1);
        return n < entries.offsets[t + 2] ? scale_of(n) : otherwise;
    }
};

}  // namespace
}  // namespace weft
