// Tasks of known cost, and the share of them that each thread takes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace weft {
namespace {

struct Task {
    int32_t block, entry, part;
    int64_t cost_before;  // of all tasks before it
};

struct Tasks {
    std::vector<Task> list;
    int64_t cost = 0;

    void add(int32_t block, int32_t entry, int32_t part, int64_t task_cost) {
        list.push_back({block, entry, part, cost});
        cost += task_cost;
    }
    // Returns the first task of a thread's share: a thread takes the tasks whose cost begins in its part of the whole.
    size_t begin_of(int thread, int threads) const {
        int64_t share = cost * thread / threads;
        auto before = [](const Task &task, int64_t value) { return task.cost_before < value; };
        return std::lower_bound(list.begin(), list.end(), share, before) - list.begin();
    }
    // Returns whether no thread's share is much above the mean.
    bool is_even(int threads) const {
        auto cost_before = [this](size_t n) { return n < list.size() ? list[n].cost_before : cost; };
        for (int thread = 0; thread < threads; thread++) {
            int64_t share = cost_before(begin_of(thread + 1, threads)) - cost_before(begin_of(thread, threads));
            if (share * threads * 8 > cost * 9) return false;
        }
        return true;
    }
};

}  // namespace
}  // namespace weft
