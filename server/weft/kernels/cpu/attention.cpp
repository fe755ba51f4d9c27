// Attention over a paged KV cache: decode and chunked prefill alike, float32 sums, grouped-query heads.
//
// A work item is some query rows of one request with one or more KV heads. It walks the request's keys in tiles of 64,
// counted from the first key of each span of virtual positions and from the first real token, never from the chunk or
// the block. For each row it keeps a running peak, sum and weighted values (the online softmax of Milakov and
// Gimelshein 2018, arXiv:1805.02867). A row's result is a function of its query, its own visible keys, in their order,
// and the log-gates of their spans:
//   score = the chain over the head's elements, capped, plus the log-gate;
//   sum = one chain per lane over the tiles; out = the chain over the keys.
// Rows computed together share loads and nothing else. A key that a row does not see adds nothing to its sums, not even
// a 0.
#include "attention_worker.h"

#include <memory>
#include <new>

#include <omp.h>

namespace weft {
namespace {

constexpr int64_t SERIAL_BELOW = 64 << 10;  // multiply-adds below which waking a second thread costs more than it saves

template <class T>
void attend(const AttendCall &call) {
    const Plan plan(call);
    const std::vector<Item> &items = plan.items;
    // Returns the item that a thread computes after item n, if each thread takes every step-th item.
    auto following = [&](size_t n, size_t step) { return n + step < items.size() ? &items[n + step] : nullptr; };
    // One thread or all of them: any other team size would make the OpenMP runtime end and restart its threads.
    if (call.threads == 1 || plan.work < SERIAL_BELOW) {
        Worker<T> worker(call, plan.rows_max);
        for (size_t n = 0; n < items.size(); n++) worker.run(items[n], following(n, 1));
        return;
    }
    std::vector<std::unique_ptr<Worker<T>>> workers;  // made here, where a failed allocation can still be reported
    for (int64_t i = 0; i < call.threads; i++) workers.emplace_back(new Worker<T>(call, plan.rows_max));
#pragma omp parallel num_threads(int(call.threads))
    {
        Worker<T> &worker = *workers[omp_get_thread_num()];
#pragma omp for schedule(dynamic, 1)
        for (size_t n = 0; n < items.size(); n++) worker.run(items[n], following(n, call.threads));
    }
}

}  // namespace
}  // namespace weft

extern "C" {

// Arguments of the functions below: one packed record of 64-bit numbers each, in this order (see attention.py).
int weft_store(const weft::StoreCall *call) {
    const int64_t slots = call->cache.num_blocks * call->cache.block_size;
    for (int64_t t = 0; t < call->num_tokens; t++)
        if (call->kv_slots[t] < 0 || call->kv_slots[t] >= slots) return weft::BAD_KV_SLOT;
    weft::store_tokens(*call);
    return weft::OK;
}

int weft_attend(const weft::AttendCall *call) {
    using namespace weft;
    if (Status status = check(*call)) return status;
    try {
        with_type(call->is_bf16, [&](auto element) { attend<decltype(element)>(*call); });
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
    return OK;
}

}  // extern "C"
