// The entries of a batch's rows at one module: the slots of each row, and their gates.
#pragma once

#include "slot_cell.h"

#include <algorithm>

namespace weft {
namespace {

// Rows of elements that lie side by side; the rows are `stride` elements apart.
template <class T>
struct Rows {
    T *first;
    int64_t stride;

    operator Rows<const T>() const { return {first, stride}; }

    T *row(int64_t t) const { return first + t * stride; }
    Rows from(int64_t t) const { return {row(t), stride}; }
};

struct Entries {
    const int32_t *offsets, *slots;  // those of row t are offsets[t] .. offsets[t + 1] - 1
    const float *gates;
    int64_t num_rows;
    const SlotCell *table;
    int64_t num_slots, in, out;

    int32_t count_of(int64_t t) const { return offsets[t + 1] - offsets[t]; }
    const SlotCell &cell(int64_t t, int32_t entry) const { return table[slots[offsets[t] + entry]]; }
    float gate(int64_t t, int32_t entry) const { return gates[offsets[t] + entry]; }

    bool same_slots(int64_t s, int64_t t) const {
        const int32_t *of_s = slots + offsets[s];
        return count_of(s) == count_of(t) && std::equal(of_s, of_s + count_of(s), slots + offsets[t]);
    }

    Status check(int64_t num_entries, bool has_residual) const {
        if (offsets[0] != 0 || offsets[num_rows] != num_entries) return BAD_OFFSETS;
        for (int64_t t = 0; t < num_rows; t++)
            if (offsets[t + 1] < offsets[t]) return BAD_OFFSETS;
        for (int64_t n = 0; n < num_entries; n++) {
            if (slots[n] < 0 || slots[n] >= num_slots) return BAD_SLOT;
            const SlotCell &cell = table[slots[n]];
            if (cell.has_hidden() && cell.rank < 1) return BAD_RANK;
            if (cell.reads_residual() && !has_residual) return NO_RESIDUAL;
        }
        return OK;
    }
};

}  // namespace
}  // namespace weft
