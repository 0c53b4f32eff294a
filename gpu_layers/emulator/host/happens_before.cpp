#include "checker.h"

#if GPU_LAYERS_CHECKED

#include <algorithm>
#include <cstring>
#include <memory>
#include <unordered_map>

#include "failure.h"
#include "happens_before.h"

namespace gpu_layers_emulator {
namespace clocks {
namespace {

constexpr uint32_t kLastTime = (1u << Stamp::kTimeBits) - 1;

// What is known of other threads through fences and atomics: of each block, the accesses stamped before
// `all_before`, and of single threads of it those before a later time.
struct BlockKnowledge {
    uint32_t all_before = 0;
    std::unordered_map<unsigned, uint32_t> thread_before;

    void join(const BlockKnowledge& other) {
        all_before = std::max(all_before, other.all_before);
        for (const auto& [thread, time] : other.thread_before) {
            uint32_t& mine = thread_before[thread];
            mine = std::max(mine, time);
        }
    }
};
using Knowledge = std::unordered_map<uint64_t, BlockKnowledge>;

void join(Knowledge& mine, const Knowledge& other) {
    for (const auto& [block, knowledge] : other) mine[block].join(knowledge);
}

bool covers(const Knowledge& knowledge, Stamp stamp) {
    const auto block = knowledge.find(stamp.block());
    if (block == knowledge.end()) return false;
    if (stamp.time() < block->second.all_before) return true;
    const auto thread = block->second.thread_before.find(stamp.thread());
    return thread != block->second.thread_before.end() && stamp.time() < thread->second;
}

struct WarpClock {
    // seen[a][b]: lane a comes after everything that lane b did before this time.
    uint32_t seen[kWarpSize][kWarpSize];
    bool is_used = false;
};

struct BlockClock {
    uint64_t linear = 0;
    uint32_t time = 1;
    uint32_t last_barrier = 0;
    std::vector<uint32_t> thread_time;
    std::vector<WarpClock> warps;
    Knowledge known_to_all;
    std::unordered_map<unsigned, Knowledge> known_to_thread;
    std::unordered_map<unsigned, Knowledge> found_by_thread;  // by atomics since its last fence
    std::unordered_map<unsigned, Knowledge> fenced_by_thread;
};

std::vector<std::unique_ptr<BlockClock>> block_clocks;
std::unordered_map<uint64_t, Knowledge> published;  // by the address of the atomic
uint32_t last_grid_barrier;

BlockClock* active_clock;
unsigned active_thread;
Stamp active_stamp;

uint32_t tick(BlockClock& clock) {
    if (clock.time == kLastTime) {
        fail(kLimit, "checked mode counts at most 2^26 synchronisations in a block: run a smaller launch");
    }
    return ++clock.time;
}

void restamp() {
    active_stamp = Stamp::of(active_clock->linear, active_thread, active_clock->thread_time[active_thread]);
}

void set_all_threads(BlockClock& clock, uint32_t time) {
    std::fill(clock.thread_time.begin(), clock.thread_time.end(), time);
    clock.last_barrier = time;
    for (auto& [thread, knowledge] : clock.known_to_thread) join(clock.known_to_all, knowledge);
    clock.known_to_thread.clear();
}

}  // namespace

void launch_begins(unsigned resident_blocks) {
    block_clocks.resize(resident_blocks);
    for (auto& clock : block_clocks) {
        if (clock == nullptr) clock = std::make_unique<BlockClock>();
    }
    published.clear();
    last_grid_barrier = 0;
    active_clock = nullptr;
}

void block_begins(const Block& block) {
    BlockClock& clock = *block_clocks[block.slot];
    clock.linear = block.linear;
    clock.time = 1;
    clock.last_barrier = 0;
    clock.thread_time.assign(block.threads.size(), 1);
    clock.warps.resize(block.warps.size());
    for (WarpClock& warp : clock.warps) {
        if (warp.is_used) memset(warp.seen, 0, sizeof(warp.seen));
        warp.is_used = false;
    }
    clock.known_to_all.clear();
    clock.known_to_thread.clear();
    clock.found_by_thread.clear();
    clock.fenced_by_thread.clear();
}

void thread_resumes(const Block& block, const Thread& thread) {
    active_clock = block_clocks[block.slot].get();
    active_thread = thread.linear;
    restamp();
}

void block_synchronised(const Block& block) {
    BlockClock& clock = *block_clocks[block.slot];
    set_all_threads(clock, tick(clock));
    restamp();
}

void warp_synchronised(const Block& block, unsigned warp_index, unsigned mask) {
    BlockClock& clock = *block_clocks[block.slot];
    WarpClock& warp = clock.warps[warp_index];
    if (!warp.is_used) memset(warp.seen, 0, sizeof(warp.seen));
    warp.is_used = true;
    const uint32_t time = tick(clock);
    uint32_t joined[kWarpSize] = {};
    Knowledge knowledge;
    for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1) {
        const unsigned lane = static_cast<unsigned>(__builtin_ctz(lanes));
        for (unsigned other = 0; other < kWarpSize; ++other) {
            joined[other] = std::max(joined[other], warp.seen[lane][other]);
        }
        joined[lane] = time;
        const auto known = clock.known_to_thread.find(warp_index * kWarpSize + lane);
        if (known != clock.known_to_thread.end()) join(knowledge, known->second);
    }
    for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1) {
        const unsigned lane = static_cast<unsigned>(__builtin_ctz(lanes));
        memcpy(warp.seen[lane], joined, sizeof(joined));
        clock.thread_time[warp_index * kWarpSize + lane] = time;
        if (!knowledge.empty()) clock.known_to_thread[warp_index * kWarpSize + lane] = knowledge;
    }
    if (active_clock != nullptr) restamp();
}

void grid_synchronised() {
    uint32_t latest = 0;
    for (const auto& clock : block_clocks) latest = std::max(latest, tick(*clock));
    for (const auto& clock : block_clocks) {
        clock->time = latest;
        set_all_threads(*clock, latest);
    }
    last_grid_barrier = latest;
}

void fenced(const Block& block, const Thread& thread) {
    BlockClock& clock = *block_clocks[block.slot];
    const unsigned id = thread.linear;
    const uint32_t time = tick(clock);
    const auto found = clock.found_by_thread.find(id);
    if (found != clock.found_by_thread.end()) {
        join(clock.known_to_thread[id], found->second);
        clock.found_by_thread.erase(found);
    }
    Knowledge& mark = clock.fenced_by_thread[id];
    join(mark, clock.known_to_all);
    const auto known = clock.known_to_thread.find(id);
    if (known != clock.known_to_thread.end()) join(mark, known->second);
    BlockKnowledge own;
    own.all_before = clock.last_barrier;
    own.thread_before[id] = time;
    const WarpClock& warp = clock.warps[thread.warp()];
    for (unsigned lane = 0; warp.is_used && lane < kWarpSize; ++lane) {
        if (lane != thread.lane() && warp.seen[thread.lane()][lane] > 0) {
            own.thread_before[thread.warp() * kWarpSize + lane] = warp.seen[thread.lane()][lane];
        }
    }
    mark[block.linear].join(own);
    clock.thread_time[id] = time;
    restamp();
}

void atomic_performed(const Block& block, const Thread& thread, uint64_t address) {
    BlockClock& clock = *block_clocks[block.slot];
    const auto mark = clock.fenced_by_thread.find(thread.linear);
    const bool publishes = mark != clock.fenced_by_thread.end();
    if (!publishes && published.empty()) return;
    Knowledge& at_address = published[address];
    if (!at_address.empty()) join(clock.found_by_thread[thread.linear], at_address);
    if (publishes) join(at_address, mark->second);
}

Stamp now() { return active_stamp; }

bool is_behind_barrier(uint64_t block, uint32_t time) {
    return time < (block == active_clock->linear ? active_clock->last_barrier : last_grid_barrier);
}

bool is_ordered_before_now(Stamp stamp) {
    const BlockClock& clock = *active_clock;
    if (stamp.block() == clock.linear) {
        const unsigned thread = stamp.thread();
        if (thread == active_thread || stamp.time() < clock.last_barrier) return true;
        if (thread / kWarpSize == active_thread / kWarpSize) {
            const WarpClock& warp = clock.warps[thread / kWarpSize];
            if (warp.is_used && stamp.time() < warp.seen[active_thread % kWarpSize][thread % kWarpSize])
                return true;
        }
    } else if (stamp.time() < last_grid_barrier) {
        return true;
    }
    if (covers(clock.known_to_all, stamp)) return true;
    const auto known = clock.known_to_thread.find(active_thread);
    return known != clock.known_to_thread.end() && covers(known->second, stamp);
}

}  // namespace clocks
}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_CHECKED
