// The threads, warps and blocks of a launch, and which of them runs.
#ifndef GPU_LAYERS_EMULATOR_EXECUTION_H_
#define GPU_LAYERS_EMULATOR_EXECUTION_H_

#include <vector_types.h>

#include <cstdint>
#include <vector>

#include "device_runtime.h"
#include "fiber.h"
#include "launch_abi.h"
#include "shared_memory.h"

namespace gpu_layers_emulator {

constexpr unsigned kWarpSize = 32;

enum class State : uint8_t {
    kUnstarted,
    kReady,
    kRunning,
    kAtBlockBarrier,
    kAtWarpOperation,
    kAtGridBarrier,
    kAsleep,  // in a cooperative launch: lets the other blocks run
    kExited
};

// The warp operation a lane waits in: every other lane of its mask must be in the very same.
struct WarpRequest {
    WarpOperation operation;
    unsigned mask;
    unsigned operand;
    int width;
    uint64_t value;
    uint64_t result;
};

// Those that a thread has started; the first `finished` of them have been made.
struct AsyncCopies {
    std::vector<AsyncCopy> started;
    size_t finished;
    size_t batch;
};

struct Thread {
    uint3 index;
    unsigned linear;
    State state;
    Fiber* fiber;
    SourceLine where;  // it waits here, or synchronised here last
    WarpRequest request;
    AsyncCopies copies;
    unsigned lane() const { return linear % kWarpSize; }
    unsigned warp() const { return linear / kWarpSize; }
};

struct Warp {
    unsigned alive;    // lanes that have not returned yet
    unsigned waiting;  // lanes in a warp operation
    unsigned alike;    // of these, lanes that are known to be in one and the same
};

// A first-in-first-out queue of threads that may run.
class ReadyQueue {
  public:
    void clear() { threads_.clear(), head_ = 0; }
    bool empty() const { return head_ == threads_.size(); }
    size_t size() const { return threads_.size() - head_; }
    void push(Thread* thread) { threads_.push_back(thread); }
    Thread* pop();
    Thread* pop_at(size_t position);  // in no particular order: takes the first's place

  private:
    std::vector<Thread*> threads_;
    size_t head_ = 0;
};

struct Block {
    uint3 index;
    uint64_t linear;
    unsigned slot;  // among the resident blocks
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<unsigned> order;  // in which threads start
    size_t started;
    ReadyQueue ready;
    std::vector<Thread*> asleep;
    unsigned exited;
    unsigned at_block_barrier;
    unsigned at_grid_barrier;
    const Thread* last_exited;
    const Thread* first_at_barrier;
    int vote_count;
    int vote_result;
    DynamicSharedMemory dynamic_shared;
    std::vector<unsigned char> parked_static_shared;  // while another block is active

    bool is_finished() const { return exited == threads.size(); }
    bool is_at_grid_barrier() const { return at_grid_barrier == threads.size(); }
};

// Facts about the running launch that barriers and collectives need.
extern Block* active_block;
extern Thread* running_thread;
extern bool launch_is_cooperative;
// Counts what threads do other than to sleep and wake up again.
extern uint64_t launch_progress;

// Stops the running thread until somebody makes it ready.
void suspend(State state);
void make_ready(Block& block, Thread& thread);

// Where in the grid a block is, and where in its block a thread, by their linear numbers.
uint3 block_position(uint64_t linear_block);
uint3 thread_position(unsigned linear_thread);

// A deterministic stream of numbers for the random schedule.
uint64_t random_below(uint64_t bound);

// Runs every block of a launch; what goes wrong leaves through fail().
void run_all_blocks(const LaunchRequest& request, void (*invoke)(void**));

// Thrown out of run_all_blocks, on the stack of its caller, once fail() has recorded why.
struct LaunchAbandoned {};

// For fail(): leaves the running thread for good.
[[noreturn]] void abandon_launch();
void forget_abandoned_launch();

// A lane returned: its warp may have waited for nobody else.
void reconsider_warp(Block& block, unsigned warp);

}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_EMULATOR_EXECUTION_H_
