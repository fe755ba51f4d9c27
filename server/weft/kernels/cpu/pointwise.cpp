// Elementwise operations of model code between kernels: sums, products, negations, copies of strided tensors.
//
// Each computes as torch does: in float32, rounded once. One thread: a decode step's tensors are small.
#include "lanes.h"

namespace weft {
namespace {

enum Operation : int64_t { ADD = 0, MULTIPLY = 1, NEGATE = 2, COPY = 3 };

constexpr int DIMS = 5;

struct Operand {
    const void *at;
    int64_t is_bf16;
    int64_t strides[DIMS];  // in elements

    int64_t offset(int dim, int64_t i) const { return i * strides[dim] * (is_bf16 ? 2 : 4); }
};

struct Pointwise {
    int64_t operation;
    int64_t sizes[DIMS];
    Operand out, a, b;  // b is as a if the operation has one operand
};

static inline float element(const float *from) { return *from; }
static inline float element(const bf16 *from) { return bits_as<float>(uint32_t(from->bits) << 16); }

static inline void put(float *to, float v) { *to = v; }
static inline void put(bf16 *to, float v) { to->bits = uint16_t(rounded(splat(v))[0] >> 16); }

template <Operation OP, class V>
static inline V apply(V a, V b) {
    return OP == ADD ? a + b : OP == MULTIPLY ? a * b : OP == NEGATE ? -a : a;
}

// One run along the last dimension.
template <Operation OP, class A, class O>
void line(const Pointwise &p, const char *a_at, const char *b_at, char *out_at) {
    const A *a = (const A *)a_at, *b = (const A *)b_at;
    O *out = (O *)out_at;
    const int last = DIMS - 1;
    const int64_t size = p.sizes[last], sa = p.a.strides[last], sb = p.b.strides[last], so = p.out.strides[last];
    int64_t i = 0;
    if (sa == 1 && sb == 1 && so == 1) {
        for (; i + UNIT <= size; i += UNIT) {
            const Unit x = load<NATURAL>(a + i), y = load<NATURAL>(b + i);
            store<NATURAL>(out + i, Unit{apply<OP>(x.lo, y.lo), apply<OP>(x.hi, y.hi)});
        }
    }
    for (; i < size; i++) put(out + i * so, apply<OP>(element(a + i * sa), element(b + i * sb)));
}

typedef void (*Line)(const Pointwise &, const char *, const char *, char *);

template <class A, class O>
static Line line_of(int64_t operation) {
    switch (operation) {
        case ADD: return line<ADD, A, O>;
        case MULTIPLY: return line<MULTIPLY, A, O>;
        case NEGATE: return line<NEGATE, A, O>;
        default: return line<COPY, A, O>;
    }
}

static void each_line(const Pointwise &p, Line line, int dim, const char *a, const char *b, char *out) {
    if (dim == DIMS - 1) return line(p, a, b, out);
    for (int64_t i = 0; i < p.sizes[dim]; i++)
        each_line(p, line, dim + 1, a + p.a.offset(dim, i), b + p.b.offset(dim, i), out + p.out.offset(dim, i));
}

}  // namespace
}  // namespace weft

extern "C" int weft_pointwise(const weft::Pointwise *given) {
    using namespace weft;
    const Pointwise &p = *given;
    Line line = nullptr;
    with_type(p.a.is_bf16, [&](auto from) {
        with_type(p.out.is_bf16, [&](auto to) { line = line_of<decltype(from), decltype(to)>(p.operation); });
    });
    each_line(p, line, 0, (const char *)p.a.at, (const char *)p.b.at, (char *)p.out.at);
    return OK;
}
