// Operations of a decoder layer between its products, each in one pass over a row: RMS norms and the gate of an MLP.
//
// In float32, rounded once; a row's bits depend on its own numbers alone.
#include "lanes.h"

#include <algorithm>
#include <cmath>

namespace weft {
namespace {

enum Activation : int64_t { SILU = 0, GELU_TANH = 1 };

// Elements below which waking a second thread costs more than it saves; an exponential costs as much as eight products.
constexpr int64_t NORM_SERIAL_BELOW = 48 << 10, GATE_SERIAL_BELOW = 6 << 10;

// out = x * gain / sqrt(mean(x * x) + eps)
template <class X>
void rms_norm(const X *x, const float *gain, float eps, int64_t size, X *out) {
    f32x16 acc = {};
    each_unit<NATURAL>(size, [&](int64_t i, auto take, auto) {
        Unit v = take(x + i);
        acc = fma(v.lo, v.lo, acc);
        acc = fma(v.hi, v.hi, acc);
    });
    const float scale = 1.0f / std::sqrt(sum(acc) / float(size) + eps);
    each_unit<NATURAL>(size, [&](int64_t i, auto take, auto put) {
        Unit v = take(x + i), g = take(gain + i);
        put(out + i, Unit{v.lo * scale * g.lo, v.hi * scale * g.hi});
    });
}

static inline f32x16 silu(f32x16 v) {
    f32x16 size = (f32x16)((u32x16)v & 0x7fffffffu);
    f32x16 e = exp_of(-size);  // the argument is never positive, so it cannot overflow
    return v * (v < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

static inline f32x16 gelu_tanh(f32x16 v) {
    f32x16 inner = 0.79788456f * fma(0.044715f * v, v * v, v);
    return 0.5f * v * (1.0f + tanh_of(inner));
}

// out = act(gate) * up
template <class X>
void gate(const X *g, const X *up, Activation activation, int64_t size, X *out) {
    each_unit<NATURAL>(size, [&](int64_t i, auto take, auto put) {
        Unit a = take(g + i), b = take(up + i);
        if (activation == SILU) put(out + i, Unit{silu(a.lo) * b.lo, silu(a.hi) * b.hi});
        else put(out + i, Unit{gelu_tanh(a.lo) * b.lo, gelu_tanh(a.hi) * b.hi});
    });
}

template <class Row>
void each_row(int64_t rows, int threads, bool is_short, Row row) {
    if (threads == 1 || is_short) {
        for (int64_t t = 0; t < rows; t++) row(t);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < rows; t++) row(t);
}

}  // namespace
}  // namespace weft

extern "C" {

// Records of 64-bit numbers (see elementwise.py); `out` is contiguous.
struct WeftNorm {
    const void *x;
    int64_t x_stride;
    void *out;
    int64_t rows, size, is_bf16, threads;
    const float *gain;
    double eps;
};

struct WeftGate {
    const void *gate;
    int64_t gate_stride;
    const void *up;
    int64_t up_stride;
    void *out;
    int64_t rows, size, is_bf16, threads, activation;
};

int weft_rms_norm(const WeftNorm *given) {
    using namespace weft;
    const WeftNorm &g = *given;
    with_type(g.is_bf16, [&](auto element) {
        using X = decltype(element);
        each_row(g.rows, int(g.threads), g.rows * g.size < NORM_SERIAL_BELOW, [&](int64_t t) {
            rms_norm((const X *)g.x + t * g.x_stride, g.gain, float(g.eps), g.size, (X *)g.out + t * g.size);
        });
    });
    return OK;
}

int weft_gate(const WeftGate *given) {
    using namespace weft;
    const WeftGate &g = *given;
    with_type(g.is_bf16, [&](auto element) {
        using X = decltype(element);
        each_row(g.rows, int(g.threads), g.rows * g.size < GATE_SERIAL_BELOW, [&](int64_t t) {
            gate((const X *)g.gate + t * g.gate_stride, (const X *)g.up + t * g.up_stride, Activation(g.activation),
                 g.size, (X *)g.out + t * g.size);
        });
    });
    return OK;
}

}  // extern "C"
