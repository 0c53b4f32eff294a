#include "execution.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>

#include "checker.h"
#include "failure.h"

// The built-in variables (builtin_variables.h). Device code sees them as constants; here they change.
#define GPU_LAYERS_BUILTIN(name) __asm__("gpu_layers_" #name) __attribute__((visibility("hidden")))
uint3 running_thread_index GPU_LAYERS_BUILTIN(threadIdx);
uint3 running_block_index GPU_LAYERS_BUILTIN(blockIdx);
dim3 launch_block_size GPU_LAYERS_BUILTIN(blockDim);
dim3 launch_grid_size GPU_LAYERS_BUILTIN(gridDim);

namespace gpu_layers_emulator {

Block* active_block;
Thread* running_thread;
bool launch_is_cooperative;
uint64_t launch_progress;

namespace {

// After so many atomics in a row a thread lets the others run: it may be spinning on one of them.
constexpr unsigned kAtomicsBetweenYields = 64;
// So many turns of all blocks in which every thread that runs goes back to sleep are taken for a deadlock.
constexpr int kIdleTurns = 1000;
// A deadlock message names at most this many groups of threads.
constexpr size_t kReportedGroups = 8;

Fiber main_fiber;
std::vector<std::unique_ptr<Block>> resident_blocks;
void (*kernel_entry)(void**);
void** kernel_values;
int32_t launch_schedule;
uint64_t random_state;
uint64_t launch_shared_bytes;
MemoryRange static_segment;
unsigned atomics_since_switch;
bool launch_is_abandoned;

uint3 unflatten(uint64_t linear, const dim3& extent) {
    return {static_cast<unsigned>(linear % extent.x), static_cast<unsigned>(linear / extent.x % extent.y),
            static_cast<unsigned>(linear / extent.x / extent.y)};
}

void run_as(Thread* thread) {
    running_thread = thread;
    running_thread_index = thread->index;
    thread->state = State::kRunning;
    atomics_since_switch = 0;
    checker::thread_resumes(*active_block, *thread);
}

// The next thread to run, or none. Threads that wait no longer go first, so that a warp runs as far ahead
// of the others as its barriers let it: the skew that shows a missing one.
Thread* pick_thread() {
    Block& block = *active_block;
    const size_t unstarted = block.order.size() - block.started;
    if (launch_schedule == kRandom && !block.ready.empty()) {
        const uint64_t choice = random_below(unstarted + block.ready.size());
        if (choice >= unstarted) return block.ready.pop_at(choice - unstarted);
    } else if (!block.ready.empty()) {
        return block.ready.pop();
    }
    return unstarted == 0 ? nullptr : &block.threads[block.order[block.started++]];
}

void run_threads(Fiber* self);

Fiber* fiber_of(Thread* thread) {
    if (thread == nullptr) return &main_fiber;
    if (thread->fiber == nullptr) {
        thread->fiber = take_fiber(run_threads);
        thread->fiber->thread = thread;
    }
    return thread->fiber;
}

void leave(Fiber* self) {
    Thread* next = pick_thread();
    Fiber* other = fiber_of(next);
    if (next != nullptr) run_as(next);
    if (other != self) switch_fiber(self, other);
}

void thread_returned(Block& block, Thread& thread) {
    thread.state = State::kExited;
    ++launch_progress;
    ++block.exited;
    block.last_exited = &thread;
    if (block.at_block_barrier > 0 || block.at_grid_barrier > 0) {
        const Thread& waiting = *block.first_at_barrier;
        fail(
            kBarrierError,
            format(
                "%s returned while %s waits in the %s barrier at %s: every thread of the block must reach it",
                thread_name(block, thread).c_str(), thread_name(block, waiting).c_str(),
                block.at_grid_barrier > 0 ? "grid" : "block", place(waiting.where).c_str()));
    }
    Warp& warp = block.warps[thread.warp()];
    warp.alive &= ~(1u << thread.lane());
    if (warp.waiting != 0) reconsider_warp(block, thread.warp());
    thread.fiber = nullptr;
}

// What a fiber does: one thread after another, without a switch in between while nobody waits.
void run_threads(Fiber* self) {
    for (;;) {
        Thread* thread = self->thread;
        kernel_entry(kernel_values);
        thread_returned(*active_block, *thread);
        Thread* next = pick_thread();
        if (next != nullptr && next->fiber == nullptr) {
            next->fiber = self;
            self->thread = next;
            run_as(next);
            continue;
        }
        give_back_fiber(self);
        if (next != nullptr) run_as(next);
        switch_fiber(self, next == nullptr ? &main_fiber : next->fiber);
    }
}

void start_block(Block& block, uint64_t linear) {
    block.linear = linear;
    block.index = unflatten(linear, launch_grid_size);
    block.started = 0;
    block.ready.clear();
    block.asleep.clear();
    block.exited = block.at_block_barrier = block.at_grid_barrier = 0;
    block.vote_count = 0;
    for (Thread& thread : block.threads) {
        thread.state = State::kUnstarted;
        thread.fiber = nullptr;
        thread.where = {nullptr, 0};
        thread.copies.started.clear();
        thread.copies.finished = thread.copies.batch = 0;
    }
    const unsigned thread_count = static_cast<unsigned>(block.threads.size());
    for (unsigned w = 0; w < block.warps.size(); ++w) {
        const unsigned lanes = std::min(kWarpSize, thread_count - w * kWarpSize);
        block.warps[w] = {lanes == kWarpSize ? 0xffffffffu : (1u << lanes) - 1u, 0, 0};
    }
    if (launch_schedule == kRandom) {
        for (size_t i = block.order.size(); i > 1; --i)
            std::swap(block.order[i - 1], block.order[random_below(i)]);
    }
    const MemoryRange dynamic = block.dynamic_shared.range();
    memset(dynamic.begin, kPoison, dynamic.bytes);
    memset(static_segment.begin, kPoison, static_segment.bytes);
}

void build_block(Block& block, unsigned slot) {
    const uint64_t count =
        static_cast<uint64_t>(launch_block_size.x) * launch_block_size.y * launch_block_size.z;
    block.slot = slot;
    block.threads.resize(count);
    block.warps.resize((count + kWarpSize - 1) / kWarpSize);
    block.order.resize(count);
    std::iota(block.order.begin(), block.order.end(), 0u);
    if (launch_schedule == kDescending) std::reverse(block.order.begin(), block.order.end());
    for (unsigned i = 0; i < count; ++i) {
        block.threads[i].linear = i;
        block.threads[i].index = unflatten(i, launch_block_size);
    }
    block.dynamic_shared.resize(launch_shared_bytes);
}

const char* name_of(State state, const Thread& thread) {
    if (state == State::kAtBlockBarrier) return "__syncthreads()";
    if (state == State::kAtGridBarrier) return "grid.sync()";
    if (state == State::kAsleep) return "__nanosleep()";
    switch (thread.request.operation) {
        case WarpOperation::kSync:
            return "__syncwarp()";
        case WarpOperation::kShuffle:
        case WarpOperation::kShuffleUp:
        case WarpOperation::kShuffleDown:
        case WarpOperation::kShuffleXor:
            return "a shuffle";
        case WarpOperation::kBallot:
        case WarpOperation::kAll:
        case WarpOperation::kAny:
        case WarpOperation::kMatchAny:
            return "a warp vote";
        default:
            return "a warp reduction";
    }
}

// Nobody can go on: says who waits where, in groups that wait for the same thing.
[[noreturn]] void report_deadlock(const Block& block) {
    struct Group {
        std::string what;
        std::string first;
        std::vector<unsigned> threads;
    };
    std::map<std::tuple<int, int, unsigned, unsigned>, Group> groups;
    for (const Thread& thread : block.threads) {
        if (thread.state == State::kExited) continue;
        const bool in_warp = thread.state == State::kAtWarpOperation;
        auto& group = groups[{static_cast<int>(thread.state), thread.where.line,
                              in_warp ? thread.request.mask : 0u, in_warp ? thread.warp() : 0u}];
        if (group.threads.empty()) {
            group.what = name_of(thread.state, thread);
            if (in_warp) group.what += format(" (mask 0x%08x)", thread.request.mask);
            group.what += " at " + place(thread.where);
            group.first = thread_name(block, thread);
        }
        group.threads.push_back(thread.linear);
    }
    std::string message = "deadlock: no thread of the block can go on";
    size_t reported = 0;
    for (const auto& [key, group] : groups) {
        if (++reported > kReportedGroups) {
            message += format("; and %zu more groups", groups.size() - kReportedGroups);
            break;
        }
        message += format("; %s", group.first.c_str());
        if (group.threads.size() > 1) message += format(" and %zu more", group.threads.size() - 1);
        message += (group.threads.size() > 1 ? " wait in " : " waits in ") + group.what;
    }
    if (block.exited > 0) message += format("; %u threads have returned", block.exited);
    fail(kDeadlock, message);
}

void wake(Block& block, Thread& thread) {
    thread.state = State::kReady;
    block.ready.push(&thread);
}

// Runs threads of the active block until none can run.
void run_active_block() {
    Thread* first = pick_thread();
    if (first != nullptr) {
        Fiber* fiber = fiber_of(first);
        run_as(first);
        switch_fiber(&main_fiber, fiber);
    }
    running_thread = nullptr;
    if (launch_is_abandoned) throw LaunchAbandoned();
    const Block& block = *active_block;
    if (!block.is_finished() && !block.is_at_grid_barrier() && block.asleep.empty()) report_deadlock(block);
}

void activate(Block& block) {
    active_block = &block;
    running_block_index = block.index;
    checker::block_activated(block);
}

void run_blocks_in_turn(const std::vector<uint32_t>& shuffled, uint64_t count, bool backwards) {
    Block& block = *resident_blocks[0];
    for (uint64_t i = 0; i < count; ++i) {
        start_block(block, shuffled.empty() ? (backwards ? count - 1 - i : i) : shuffled[i]);
        checker::block_begins(block);
        activate(block);
        run_active_block();
        checker::block_ends(block);
    }
}

void run_blocks_together(const std::vector<uint32_t>& shuffled, uint64_t count, bool backwards) {
    for (uint64_t i = 0; i < count; ++i) {
        Block& block = *resident_blocks[i];
        start_block(block, shuffled.empty() ? (backwards ? count - 1 - i : i) : shuffled[i]);
        checker::block_begins(block);
        block.parked_static_shared.assign(static_segment.bytes, static_cast<unsigned char>(kPoison));
    }
    for (int idle_turns = 0;;) {
        uint64_t finished = 0;
        const Block* waiting = nullptr;
        const Block* ended = nullptr;
        const Block* sleeping = nullptr;
        const uint64_t progress = launch_progress;
        for (uint64_t i = 0; i < count; ++i) {
            Block& block = *resident_blocks[i];
            if (block.is_finished()) {
                ++finished;
                ended = &block;
                continue;
            }
            if (block.is_at_grid_barrier()) {
                waiting = &block;
                continue;
            }
            for (Thread* thread : block.asleep) wake(block, *thread);
            block.asleep.clear();
            memcpy(static_segment.begin, block.parked_static_shared.data(), static_segment.bytes);
            activate(block);
            run_active_block();
            memcpy(block.parked_static_shared.data(), static_segment.begin, static_segment.bytes);
            if (block.is_finished()) {
                ++finished;
                ended = &block;
                checker::block_ends(block);
            } else if (block.is_at_grid_barrier()) {
                waiting = &block;
            } else {
                sleeping = &block;
            }
        }
        if (sleeping != nullptr) {
            idle_turns = launch_progress == progress ? idle_turns + 1 : 0;
            if (idle_turns == kIdleTurns) report_deadlock(*sleeping);
            continue;
        }
        if (waiting == nullptr) return;
        if (finished > 0) {
            fail(kBarrierError,
                 format(
                     "%s waits in the grid barrier at %s, but every thread of block (%u,%u,%u) has returned",
                     thread_name(*waiting, waiting->threads[0]).c_str(),
                     place(waiting->threads[0].where).c_str(), ended->index.x, ended->index.y,
                     ended->index.z));
        }
        checker::grid_synchronised();
        for (uint64_t i = 0; i < count; ++i) {
            Block& block = *resident_blocks[i];
            block.at_grid_barrier = 0;
            for (unsigned t : block.order) make_ready(block, block.threads[t]);
        }
    }
}

}  // namespace

Thread* ReadyQueue::pop() {
    Thread* thread = threads_[head_++];
    if (head_ == threads_.size()) clear();
    return thread;
}

Thread* ReadyQueue::pop_at(size_t position) {
    std::swap(threads_[head_], threads_[head_ + position]);
    return pop();
}

uint3 block_position(uint64_t linear_block) { return unflatten(linear_block, launch_grid_size); }
uint3 thread_position(unsigned linear_thread) { return unflatten(linear_thread, launch_block_size); }

uint64_t random_below(uint64_t bound) {
    random_state += 0x9e3779b97f4a7c15u;  // SplitMix64
    uint64_t z = random_state;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (z ^ z >> 31) % bound;
}

void make_ready(Block& block, Thread& thread) {
    ++launch_progress;
    wake(block, thread);
}

void suspend(State state) {
    Thread* self = running_thread;
    self->state = state;
    leave(self->fiber);
}

void yield_thread() {
    Block& block = *active_block;
    atomics_since_switch = 0;
    if (block.ready.empty() && block.started == block.order.size()) return;
    Thread* self = running_thread;
    // After the ready ones and, unlike a thread that was waited for, after those that have not begun.
    if (block.started < block.order.size() && launch_schedule != kRandom) {
        Thread* next = block.ready.empty() ? &block.threads[block.order[block.started++]] : block.ready.pop();
        wake(block, *self);
        Fiber* other = fiber_of(next);
        run_as(next);
        switch_fiber(self->fiber, other);
        return;
    }
    wake(block, *self);
    leave(self->fiber);
}

void sleep_thread(SourceLine where) {
    if (!launch_is_cooperative) {
        yield_thread();
        return;
    }
    running_thread->where = where;
    active_block->asleep.push_back(running_thread);
    suspend(State::kAsleep);
}

void before_atomic(const volatile void* address, size_t size, const void* return_address) {
    if (++atomics_since_switch >= kAtomicsBetweenYields) yield_thread();
    checker::atomic_access(address, size, return_address);
}

void memory_fence() { checker::fenced(*running_thread); }

unsigned char* dynamic_shared_memory() { return active_block->dynamic_shared.range().begin; }

void run_all_blocks(const LaunchRequest& request, void (*invoke)(void**)) {
    kernel_entry = invoke;
    kernel_values = request.values;
    launch_schedule = request.schedule;
    launch_is_cooperative = request.cooperative != 0;
    launch_shared_bytes = request.shared_bytes;
    random_state = request.seed;
    launch_grid_size = dim3(request.grid[0], request.grid[1], request.grid[2]);
    launch_block_size = dim3(request.block[0], request.block[1], request.block[2]);
    static_segment = static_shared_segment();
    adopt_main_fiber(&main_fiber);

    const uint64_t count = static_cast<uint64_t>(request.grid[0]) * request.grid[1] * request.grid[2];
    const size_t resident = launch_is_cooperative ? count : 1;
    while (resident_blocks.size() < resident) resident_blocks.push_back(std::make_unique<Block>());
    for (size_t slot = 0; slot < resident; ++slot)
        build_block(*resident_blocks[slot], static_cast<unsigned>(slot));

    std::vector<uint32_t> shuffled;
    if (request.shuffle_blocks) {
        shuffled.resize(count);
        std::iota(shuffled.begin(), shuffled.end(), 0u);
        for (size_t i = count; i > 1; --i) std::swap(shuffled[i - 1], shuffled[random_below(i)]);
    }
    checker::launch_begins(request, static_cast<unsigned>(resident));
    const bool backwards = launch_schedule == kDescending;
    if (launch_is_cooperative) {
        run_blocks_together(shuffled, count, backwards);
    } else {
        run_blocks_in_turn(shuffled, count, backwards);
    }
    checker::all_blocks_ended();
}

void abandon_launch() {
    launch_is_abandoned = true;
    // On a thread's own stack: the caller of the launch goes on in run_active_block.
    if (running_thread != nullptr) switch_fiber(running_thread->fiber, &main_fiber);
    throw LaunchAbandoned();
}

void forget_abandoned_launch() {
    running_thread = nullptr;
    launch_is_abandoned = false;
    reclaim_all_fibers();
}

}  // namespace gpu_layers_emulator
