// The plan of one delta call: blocks of rows, each with its cost, the place of its scratch and the weights it reads.
#pragma once

#include "entries.h"
#include "prefetch.h"
#include "tasks.h"

#include <vector>

namespace weft {
namespace {

constexpr int BLOCK_ROWS = 4;   // rows of a block
constexpr int RANKS = 8;        // ranks of a shrink task
constexpr int64_t CHUNK = 256;  // outputs of an expand task

// Scratch of one entry of a block: the hidden vectors of its rows and, for a bottleneck adapter, whole rows z.
struct Scratch {
    float *begin;
    int64_t rows, rank, out;

    Rows<float> hidden() const { return {begin, rank}; }          // [rows, rank]
    Rows<float> z() const { return {begin + rows * rank, out}; }  // [rows, out]

    static int64_t size(const SlotCell &cell, int64_t rows, int64_t out) {
        return cell.has_hidden() ? rows * (cell.rank + (cell.is_bottleneck() ? out : 0)) : 0;
    }
};

// Up to BLOCK_ROWS consecutive rows with the same list of slots.
struct Block {
    int64_t row;
    int32_t rows, entries;
    int64_t scratch_begin;     // its entries' scratch, one after another
    int32_t weights;           // how many ranges the plan lists before its own ones
    bool is_first;             // its slots differ from those of the block before
    bool is_live[BLOCK_ROWS];  // the row has an entry that adds something

    const SlotCell &cell(const Entries &all, int32_t entry) const { return all.cell(row, entry); }
    bool is_used(const Entries &all, int32_t entry) const {  // whether the entry adds something to one of the rows
        for (int32_t r = 0; r < rows; r++)
            if (all.gate(row + r, entry) != 0.0f) return true;
        return false;
    }
    Scratch scratch(const Entries &all, int32_t entry, float *memory) const {
        float *begin = memory + scratch_begin;
        for (int32_t e = 0; e < entry; e++) begin += Scratch::size(cell(all, e), rows, all.out);
        return {begin, rows, cell(all, entry).rank, all.out};
    }
};

struct Plan {
    std::vector<Block> blocks;
    std::vector<ByteRange> weights;  // in the order of the blocks
    Tasks whole;                     // by block
    int64_t scratch_size = 0;        // floats
    int64_t work = 0;                // multiply-adds

    Plan(const Entries &entries, int64_t weight_size) {
        const int64_t num_rows = entries.num_rows;
        blocks.reserve(num_rows);
        whole.list.reserve(num_rows);
        weights.reserve(2 * entries.offsets[num_rows]);
        for (int64_t t = 0; t < num_rows;) {
            int64_t end = t + 1;
            while (end < num_rows && end - t < BLOCK_ROWS && entries.same_slots(t, end)) end++;
            add(entries, t, int32_t(end - t), weight_size);
            t = end;
        }
    }

  private:
    void add(const Entries &entries, int64_t row, int32_t rows, int64_t weight_size) {
        const bool is_first = row == 0 || !entries.same_slots(row - 1, row);
        Block block = {row, rows, entries.count_of(row), scratch_size, int32_t(weights.size()), is_first, {}};
        int64_t cost = 0;  // of one row
        for (int32_t e = 0; e < block.entries; e++) {
            const SlotCell &cell = block.cell(entries, e);
            if (!cell.adds_to_output()) continue;
            scratch_size += Scratch::size(cell, rows, entries.out);
            bool is_used = false;
            for (int32_t r = 0; r < rows; r++)
                if (entries.gate(row + r, e) != 0.0f) is_used = block.is_live[r] = true;
            if (!is_used) continue;
            if (is_first) list(cell, entries.in, entries.out, weight_size, block.weights);
            const int64_t products = cell.products(entries.in, entries.out);
            cost += 1 + products;
            work += rows * products;
        }
        if (cost == 0) return;
        work += 4 * rows * entries.out;
        whole.add(int32_t(blocks.size()), 0, 0, (1 + rows) * (cost + 4 * entries.out));
        blocks.push_back(block);
    }

    // Lists the weights of a cell in the order of their use; `begin` is the start of its block's list.
    void list(const SlotCell &cell, int64_t in, int64_t out, int64_t weight_size, int32_t begin) {
        if (cell.kind == LORA) {
            list(cell.first, cell.rank * in * weight_size, begin);
            list(cell.second, cell.rank * out * weight_size, begin);
        } else if (cell.is_bottleneck()) {
            list(cell.first, 2 * cell.rank * out * weight_size, begin);
        } else {
            list(cell.first, out * sizeof(float), begin);
        }
    }

    void list(int64_t address, int64_t size, int32_t begin) {
        const char *at = (const char *)address;
        const bool goes_on = int32_t(weights.size()) > begin && weights.back().end == at;
        if (goes_on) weights.back().end += size;
        else weights.push_back({at, at + size});
    }
};

// A plan's work in parts, if there are too few blocks to give each thread the same share. Every phase needs the whole
// of the one before.
struct Parts {
    Tasks fill, shrink, finish, expand;

    Parts(const Plan &plan, const Entries &entries) {
        for (size_t n = 0; n < plan.blocks.size(); n++) add(int32_t(n), plan.blocks[n], entries);
    }

  private:
    void add(int32_t index, const Block &block, const Entries &entries) {
        const int64_t out = entries.out, passes = 1 + block.rows;
        int64_t depth = 0;  // operations per output
        for (int32_t e = 0; e < block.entries; e++) {
            const SlotCell &cell = block.cell(entries, e);
            if (!cell.adds_to_output() || !block.is_used(entries, e)) continue;
            if (cell.has_hidden()) {
                const int64_t width = cell.is_bottleneck() ? out : entries.in;
                for (int64_t rank = 0; rank < cell.rank; rank += RANKS) {
                    const int64_t ranks = std::min<int64_t>(RANKS, cell.rank - rank);
                    shrink.add(index, e, int32_t(rank), ranks * passes * width);
                }
            }
            if (cell.is_bottleneck()) fill.add(index, e, 0, block.rows * out);
            if (cell.kind == BOTTLENECK_NORMED) finish.add(index, e, 0, (cell.rank + 8) * passes * out);
            depth += cell.has_hidden() && cell.kind != BOTTLENECK_NORMED ? cell.rank : 1;
        }
        for (int64_t o = 0; o < out; o += CHUNK)
            expand.add(index, 0, int32_t(o / CHUNK), (depth + 4) * passes * std::min(CHUNK, out - o));
    }
};

}  // namespace
}  // namespace weft
