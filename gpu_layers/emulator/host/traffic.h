// Counts what the memory system of a GPU would do: one request for each warp and instruction.
#ifndef GPU_LAYERS_EMULATOR_TRAFFIC_H_
#define GPU_LAYERS_EMULATOR_TRAFFIC_H_

#include <cstdint>
#include <vector>

#include "execution.h"
#include "launch_abi.h"
#include "shadow_memory.h"

namespace gpu_layers_emulator {
namespace traffic {

void launch_begins(unsigned resident_blocks);
void block_begins(const Block& block);

// One thread's access. The n-th one of an instruction since the last convergence belongs to the same
// request as the n-th ones of the other lanes.
void record(const Block& block, const Thread& thread, Site site, int32_t parameter, Access access,
            uintptr_t address, unsigned bytes);

// The lanes are at one place again: what they recorded so far is complete.
void warp_converged(const Block& block, unsigned warp);
void block_converged(const Block& block);

// Totals for each (instruction, argument, kind, width).
const std::vector<TrafficRecord>& totals(uint64_t (*program_counter_of)(Site));

}  // namespace traffic
}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_EMULATOR_TRAFFIC_H_
