// The work of one adapter slot at one module: a cell of the slot table, which deltas.py describes.
#pragma once

#include "lanes.h"

namespace weft {
namespace {

// The names and numbers of DeltaKind in weft/methods/protocol.py.
enum DeltaKind : int64_t {
    NONE = 0,
    LORA = 1,
    SCALE_OUTPUT = 2,
    SCALE_INPUT = 3,
    BIAS = 4,
    BOTTLENECK = 5,           // f(y)
    BOTTLENECK_SUM = 6,       // f(y + r)
    BOTTLENECK_RESIDUAL = 7,  // f(r)
    BOTTLENECK_NORMED = 8,    // LN(y + f(y)) - y
};

struct SlotCell {
    int64_t kind, rank;
    int64_t first, second;  // addresses of its weights

    bool is_bottleneck() const { return kind >= BOTTLENECK && kind <= BOTTLENECK_NORMED; }
    bool reads_residual() const { return kind == BOTTLENECK_SUM || kind == BOTTLENECK_RESIDUAL; }
    bool has_hidden() const { return kind == LORA || is_bottleneck(); }
    bool adds_to_output() const { return has_hidden() || kind == SCALE_OUTPUT || kind == BIAS; }

    // A [rank, in], whose product with a row is the hidden vector; `in` is `out` for a bottleneck adapter.
    template <class W>
    const W *a() const {
        return (const W *)first;
    }
    // B [rank, out].
    template <class W>
    const W *b(int64_t out) const {
        return kind == LORA ? (const W *)second : (const W *)first + rank * out;
    }
    // The scale or the bias, one number for each element.
    const float *vector() const { return (const float *)first; }

    // Multiply-adds for one row, beyond those that any output costs.
    int64_t products(int64_t in, int64_t out) const {
        if (kind == LORA) return rank * (in + out);
        return is_bottleneck() ? (2 * rank + 8) * out : 0;
    }
};

}  // namespace
}  // namespace weft
