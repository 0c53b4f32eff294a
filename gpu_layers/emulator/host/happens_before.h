// Which of two accesses came first, for certain: the order that barriers and fences promise, not the one
// in which this machine happened to run the threads.
//
// Time counts the synchronisations of a block. An access is stamped with the time of its thread's last
// one; a barrier moves every thread of the block to a new time, so whatever is stamped earlier is ordered
// before it. Lanes of a warp also remember up to which time they have synchronised with each other lane.
// Shuffles and votes order nothing: the CUDA model promises that of __syncwarp and barriers alone.
#ifndef GPU_LAYERS_EMULATOR_HAPPENS_BEFORE_H_
#define GPU_LAYERS_EMULATOR_HAPPENS_BEFORE_H_

#include <cstdint>

#include "execution.h"

namespace gpu_layers_emulator {

// Block, thread and time of an access, packed. 0 is "no access".
struct Stamp {
    static constexpr int kTimeBits = 26;
    static constexpr int kThreadBits = 10;
    static constexpr int kBlockBits = 28;
    uint64_t bits = 0;

    static Stamp of(uint64_t block, unsigned thread, uint32_t time) {
        return {block << (kTimeBits + kThreadBits) | static_cast<uint64_t>(thread) << kTimeBits | time};
    }
    uint64_t block() const { return bits >> (kTimeBits + kThreadBits); }
    unsigned thread() const { return static_cast<unsigned>(bits >> kTimeBits) & ((1u << kThreadBits) - 1u); }
    uint32_t time() const { return static_cast<uint32_t>(bits) & ((1u << kTimeBits) - 1u); }
    bool operator==(Stamp other) const { return bits == other.bits; }
};

namespace clocks {

void launch_begins(unsigned resident_blocks);
void block_begins(const Block& block);
void thread_resumes(const Block& block, const Thread& thread);
void block_synchronised(const Block& block);
void warp_synchronised(const Block& block, unsigned warp, unsigned mask);
void grid_synchronised();

// A fence marks what its thread has done and seen so far; a later atomic publishes that mark at its
// address. An atomic by another thread there finds it, and the next fence of that thread takes it over.
void fenced(const Block& block, const Thread& thread);
void atomic_performed(const Block& block, const Thread& thread, uint64_t address);

// The stamp of an access that the running thread makes now.
Stamp now();

// Whether an access with this stamp is ordered before everything the running thread does from now on.
bool is_ordered_before_now(Stamp stamp);

// Whether a barrier of the block, or of the grid, separates that time of `block` from the running thread.
bool is_behind_barrier(uint64_t block, uint32_t time);

}  // namespace clocks
}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_EMULATOR_HAPPENS_BEFORE_H_
