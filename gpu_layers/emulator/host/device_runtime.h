// What emulated device code asks of the runtime that executes it.
#ifndef GPU_LAYERS_EMULATOR_DEVICE_RUNTIME_H_
#define GPU_LAYERS_EMULATOR_DEVICE_RUNTIME_H_

#include <cstddef>
#include <cstdint>

#define GPU_LAYERS_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace gpu_layers_emulator {

// Where in the source a thread synchronises. Call sites, not return addresses: the compiler may copy
// or merge calls, but never changes their lines.
struct SourceLine {
    const char* file;
    int line;
};

enum class BlockVote : int { kNone, kCount, kAnd, kOr };

enum class WarpOperation : int {
    kSync,
    kShuffle,
    kShuffleUp,
    kShuffleDown,
    kShuffleXor,
    kBallot,
    kAll,
    kAny,
    kMatchAny,
    kReduceAdd,
    kReduceAnd,
    kReduceOr,
    kReduceXor,
    kReduceMinSigned,
    kReduceMaxSigned,
    kReduceMinUnsigned,
    kReduceMaxUnsigned,
};

// Blocks until every thread of the block is here; returns the vote over `predicate`.
int block_barrier(BlockVote vote, int predicate, SourceLine where);

// Blocks until every thread of a cooperative launch is here.
void grid_barrier(SourceLine where);
bool is_cooperative_launch();

// Blocks until every non-exited lane of `mask` is in the same operation; returns this lane's result.
// `operand` is the source lane, the distance or the xor mask of a shuffle; `width` its segment.
uint64_t warp_collective(WarpOperation operation, unsigned mask, uint64_t value, unsigned operand, int width,
                         SourceLine where);

// Lets every other runnable thread of the block run first.
void yield_thread();

// Likewise and, in a cooperative launch, the other blocks: one of them may write what the thread waits for.
void sleep_thread(SourceLine where);

// Called before each atomic: lets the others run now and then, so that a spinning thread cannot starve
// the one it waits for, and, in checked mode, checks and counts the access. `return_address` finds the line.
void before_atomic(const volatile void* address, size_t size, const void* return_address);

// A thread's earlier writes become visible to threads that see a later atomic of it.
void memory_fence();

// A copy that the running thread has started, in the batch that was not committed then.
struct AsyncCopy {
    void* shared;
    const void* global;
    size_t size;
    size_t batch;
};

// Starts one, of 4, 8 or 16 bytes.
void start_async_copy(void* shared, const void* global, size_t size, SourceLine where);
// Closes the batch.
void commit_async_copies();
// The oldest copy that is not in one of the last so many batches, to be made now; false if there is none.
bool next_async_copy(size_t batches, AsyncCopy& copy);

// The running block's dynamic shared memory.
unsigned char* dynamic_shared_memory();

[[noreturn]] void device_trap(const char* what, SourceLine where);

}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_EMULATOR_DEVICE_RUNTIME_H_
