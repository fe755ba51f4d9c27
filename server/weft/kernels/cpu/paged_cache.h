// The paged keys and values of one layer, and the code that writes them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace weft {
namespace {

static inline int64_t blocks_of(int64_t tokens, int64_t block_size) { return (tokens + block_size - 1) / block_size; }

// Keys and values, each [num_blocks, block_size, kv_heads, head].
struct Cache {
    const void *keys, *values;
    int64_t num_blocks, block_size, kv_heads, head;

    // Calls take(index, row) for the keys or values index .. end - 1 of a KV head in the given blocks.
    template <class T, class Take>
    void locate(const void *side, const int32_t *blocks, int64_t h, int64_t index, int64_t end, Take take) const {
        while (index < end) {
            const int64_t block = index / block_size, block_end = std::min(end, (block + 1) * block_size);
            const int64_t token = blocks[block] * block_size + index % block_size;
            const T *row = (const T *)side + (token * kv_heads + h) * head;
            for (; index < block_end; index++, row += kv_heads * head) take(index, row);
        }
    }
};

struct StoreCall {
    const void *key, *value;
    int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride, num_tokens, is_bf16, threads;
    const int64_t *kv_slots;
    Cache cache;
};

constexpr int64_t STORE_SERIAL_BELOW = 128 << 10;  // bytes below which a second thread saves nothing

void store_tokens(const StoreCall &call) {
    const Cache &c = call.cache;
    const int64_t size = call.is_bf16 ? 2 : 4, row = c.head * size;
    auto copy = [&](int64_t t, const void *from, int64_t token_stride, int64_t head_stride, const void *cache) {
        const char *source = (const char *)from + t * token_stride * size;
        char *to = (char *)cache + call.kv_slots[t] * c.kv_heads * row;
        for (int64_t h = 0; h < c.kv_heads; h++) memcpy(to + h * row, source + h * head_stride * size, row);
    };
    auto run = [&](int64_t t) {
        copy(t, call.key, call.key_token_stride, call.key_head_stride, c.keys);
        copy(t, call.value, call.value_token_stride, call.value_head_stride, c.values);
    };
    if (call.threads == 1 || call.num_tokens * c.kv_heads * row < STORE_SERIAL_BELOW) {
        for (int64_t t = 0; t < call.num_tokens; t++) run(t);
        return;
    }
#pragma omp parallel for num_threads(int(call.threads)) schedule(static)
    for (int64_t t = 0; t < call.num_tokens; t++) run(t);
}

}  // namespace
}  // namespace weft
