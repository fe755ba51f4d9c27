// A mixture's gates at the beginning of a layer: the mathematics of weft/methods/mixture.py, row by row, in float32.
//
//   chances = softmax(W h / tau),  kept = the top_k largest, the first of equals,  gate = kept (/ their sum), bounded
//
// A row's gates are one chain of operations over its own numbers: they depend on no other row, no thread and no place
// in the batch. They are written to the row's entries that name an expert: as they are, or as their logarithms.
#include "lanes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include <omp.h>

namespace weft {
namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float NORM_EPS = 1e-6f;
constexpr int64_t SERIAL_BELOW = 96 << 10;  // multiply-adds below which waking a second thread costs more than it saves

enum Flag : int64_t { NORMALIZE = 1, ABSOLUTE = 2, RMS_NORM = 4 };

struct Router {  // one row of SlotTable.routers
    const float *weight;
    int64_t layer_stride, hidden, experts, choices, top_k, flags, temperature_bits;

    float temperature() const { return bits_as<float>(int32_t(temperature_bits)); }
};

struct Run {  // one row of Routing.table
    int64_t first, last, slot;
    const float *steering;  // allowed, floor, ceiling; or none
    const float *pooled;    // read instead of the rows; or none
    int64_t traced_at;
};

// The destination of gates: row t writes `values` of its entries offsets[t]:offsets[t + 1] that name an expert.
struct Target {
    const int32_t *offsets, *experts;
    float *values;
    int64_t count;
};

// The sum over the lanes of the chain over i; the last, short unit is padded with zeros.
template <class A, class B>
float dot(const A *a, const B *b, int64_t size) {
    f32x16 lo = splat(0.0f), hi = lo;
    int64_t i = 0;
    auto add = [&](Unit x, Unit y) {
        lo = fma(x.lo, y.lo, lo);
        hi = fma(x.hi, y.hi, hi);
    };
    for (; i + UNIT <= size; i += UNIT) add(load<NATURAL>(a + i), load<NATURAL>(b + i));
    if (i < size) add(load_part<NATURAL>(a + i, size - i), load_part<NATURAL>(b + i, size - i));
    return sum(lo + hi);
}

// Clamps gates to their bounds; the others share the rest of the sum. The rounds are those of `steered` in mixture.py.
void steer(float *gates, const float *steering, int64_t experts, float *fixed, char *is_free) {
    const float *allowed = steering, *floor = allowed + experts, *ceiling = floor + experts;
    auto low = [&](int64_t e) { return allowed[e] != 0.0f ? floor[e] : 0.0f; };
    float total = 0.0f;
    for (int64_t e = 0; e < experts; e++) {
        total += gates[e];
        is_free[e] = gates[e] > 0.0f;
        fixed[e] = is_free[e] ? 0.0f : std::min(low(e), ceiling[e]);
    }
    float weight, left;  // of the free ones: the sum of their gates, and the part of the total that they share
    auto sum_up = [&] {
        float taken = weight = 0.0f;
        for (int64_t e = 0; e < experts; e++) is_free[e] ? weight += gates[e] : taken += fixed[e];
        left = std::max(total - taken, 0.0f);
    };
    auto share_of = [&](int64_t e) { return weight > 0.0f ? gates[e] / weight * left : 0.0f; };
    for (int64_t round = 0; round < experts; round++) {
        sum_up();
        float excess = 0.0f;
        for (int64_t e = 0; e < experts; e++) {
            if (!is_free[e]) continue;
            const float share = share_of(e);
            excess += std::min(std::max(share, low(e)), ceiling[e]) - share;
        }
        bool is_broken = false;
        for (int64_t e = 0; e < experts; e++) {
            if (!is_free[e]) continue;
            const float share = share_of(e), bounded = std::min(std::max(share, low(e)), ceiling[e]);
            if ((excess >= 0.0f && bounded > share) || (excess <= 0.0f && bounded < share)) {
                fixed[e] = bounded;
                is_free[e] = 0;
                is_broken = true;
            }
        }
        if (!is_broken) break;
    }
    sum_up();
    for (int64_t e = 0; e < experts; e++) gates[e] = is_free[e] ? share_of(e) : fixed[e];
}

struct Scratch {
    std::vector<float> chances, gates, fixed;
    std::vector<char> is_free;

    explicit Scratch(int64_t choices) : chances(choices), gates(choices), fixed(choices), is_free(choices) {}
};

template <class X>
void gate(const Router &router, const float *weight, const X *h, const float *steering, Scratch &at) {
    const int64_t choices = router.choices, experts = router.experts;
    float scale = 1.0f / router.temperature();
    if (router.flags & RMS_NORM) scale /= std::sqrt(dot(h, h, router.hidden) / float(router.hidden) + NORM_EPS);
    float largest = -INFINITE;
    bool is_number = true;
    for (int64_t c = 0; c < choices; c++) {
        float logit = dot(weight + c * router.hidden, h, router.hidden) * scale;
        if (router.flags & ABSOLUTE) logit = std::fabs(logit);
        is_number = is_number && std::fabs(logit) < INFINITE;
        if (steering && c < experts && steering[c] == 0.0f) logit = -INFINITE;
        at.chances[c] = logit;
        largest = std::max(largest, logit);
    }
    if (!is_number) {  // the row is lost, and must be seen to be lost
        std::fill(at.gates.begin(), at.gates.end(), std::numeric_limits<float>::quiet_NaN());
        return;
    }
    float total = 0.0f;
    for (int64_t c = 0; c < choices; c++) total += at.chances[c] = std::exp(at.chances[c] - largest);
    for (int64_t c = 0; c < choices; c++) at.chances[c] /= total;
    std::fill(at.gates.begin(), at.gates.end(), 0.0f);
    float kept = 0.0f;
    for (int64_t k = 0; k < router.top_k; k++) {
        int64_t best = 0;
        for (int64_t c = 1; c < choices; c++)
            if (at.chances[c] > at.chances[best]) best = c;
        if (at.chances[best] <= 0.0f) break;  // the rest are masked, or 0 in float32
        kept += at.gates[best] = at.chances[best];
        at.chances[best] = -1.0f;
    }
    if (router.flags & NORMALIZE)
        for (int64_t c = 0; c < choices; c++) at.gates[c] /= kept;
    if (steering) steer(at.gates.data(), steering, experts, at.fixed.data(), at.is_free.data());
}

}  // namespace
}  // namespace weft

extern "C" {

// One packed record of 64-bit numbers, in this order (see routing.py).
struct WeftRouting {
    const void *hidden;
    int64_t stride, is_bf16, size, num_rows, layer, threads;
    const weft::Router *routers;
    int64_t num_slots;
    const weft::Run *runs;
    int64_t num_runs;
    float *trace;  // of this layer; or none
    int64_t trace_size;
    weft::Target gates, log_gates;  // values: or none
};

int weft_route(const WeftRouting *given) {
    using namespace weft;
    const WeftRouting &g = *given;
    int64_t work = 0, most_choices = 0, end = 0;
    for (int64_t r = 0; r < g.num_runs; r++) {
        const Run &run = g.runs[r];
        if (run.first < end || run.last < run.first || run.last > g.num_rows) return BAD_OFFSETS;
        if (run.slot < 0 || run.slot >= g.num_slots) return BAD_SLOT;
        const Router &router = g.routers[run.slot];
        if (!router.weight || router.hidden != g.size) return BAD_ROUTER;
        const int64_t traced = (run.last - run.first) * router.experts;
        if (run.traced_at >= 0 && (!g.trace || run.traced_at + traced > g.trace_size)) return BAD_ROUTER;
        for (const Target *target : {&g.gates, &g.log_gates}) {
            if (!target->values) continue;
            const int32_t from = target->offsets[run.first], to = target->offsets[run.last];
            if (from < 0 || to < from || to > target->count) return BAD_OFFSETS;
            for (int32_t n = from; n < to; n++)
                if (target->experts[n] >= router.experts) return BAD_ROUTER;
        }
        most_choices = std::max(most_choices, router.choices);
        work += (run.last - run.first) * router.choices * g.size;
        end = run.last;
    }
    auto go = [&](auto act) {
        using X = decltype(act);
        auto row = [&](const Run &run, int64_t t, Scratch &at) {
            const Router &router = g.routers[run.slot];
            const float *weight = router.weight + g.layer * router.layer_stride;
            if (run.pooled) gate(router, weight, run.pooled, run.steering, at);
            else gate(router, weight, (const X *)g.hidden + t * g.stride, run.steering, at);
            if (run.traced_at >= 0)
                std::copy_n(at.gates.begin(), router.experts,
                            g.trace + run.traced_at + (t - run.first) * router.experts);
            for (const Target *target : {&g.gates, &g.log_gates}) {
                if (!target->values) continue;
                for (int32_t n = target->offsets[t]; n < target->offsets[t + 1]; n++) {
                    const int32_t expert = target->experts[n];
                    if (expert < 0) continue;
                    target->values[n] = target == &g.gates ? at.gates[expert] : std::log(at.gates[expert]);
                }
            }
        };
        const int threads = work < SERIAL_BELOW ? 1 : int(g.threads);
        std::vector<Scratch> scratch(threads, Scratch(most_choices));
        auto each = [&](int thread, int team) {  // the thread's share: every team-th row of a run
            for (int64_t r = 0; r < g.num_runs; r++)
                for (int64_t t = g.runs[r].first + thread; t < g.runs[r].last; t += team)
                    row(g.runs[r], t, scratch[thread]);
        };
        if (threads == 1) return each(0, 1);
#pragma omp parallel num_threads(threads)
        each(omp_get_thread_num(), omp_get_num_threads());
    };
    try {
        with_type(g.is_bf16, go);
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
    return OK;
}

}  // extern "C"
