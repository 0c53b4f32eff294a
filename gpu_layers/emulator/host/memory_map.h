// What an address of a checked launch belongs to.
#ifndef GPU_LAYERS_EMULATOR_MEMORY_MAP_H_
#define GPU_LAYERS_EMULATOR_MEMORY_MAP_H_

#include <string>
#include <vector>

#include "execution.h"
#include "launch_abi.h"
#include "shadow_memory.h"

namespace gpu_layers_emulator {

// A contiguous piece of memory with one shadow: the caller's arrays that overlap, the static shared
// arrays, or the dynamic shared memory of a block.
struct Region {
    uintptr_t begin = 0;
    size_t bytes = 0;
    bool is_shared = false;
    std::vector<ArgumentRecord> arguments;        // in it; of global memory
    std::vector<SharedVariableRecord> variables;  // in it; of static shared memory
    ShadowMemory shadow;

    bool contains(uintptr_t address) const { return address - begin < bytes; }
    bool is_read_only() const;
};

namespace memory_map {

void launch_begins(const LaunchRequest& request, unsigned resident_blocks);

// From now on, shared memory is this block's.
void activate(const Block& block);
void block_begins(const Block& block);
void block_ends(const Block& block);

// The region of an address, or null: it belongs to no argument, nor to shared memory.
Region* find(uintptr_t address);

// The argument of a global region that an access is meant for, or null where it leaves them all.
const ArgumentRecord* argument_at(const Region& region, uintptr_t address, size_t bytes, bool is_store);

// The static shared array that holds the access, or null.
const SharedVariableRecord* variable_at(const Region& region, uintptr_t address, size_t bytes);

// "12 bytes past the end of {arg:0}", for an address that belongs to nothing.
std::string describe_nearest(uintptr_t address, size_t bytes);

// "byte 16 of {arg:0}" or "byte 0 of {shared:1}", for one that belongs.
std::string describe(const Region& region, uintptr_t address);

std::vector<Region>& global_regions();
uint64_t static_shared_bytes_touched();

}  // namespace memory_map
}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_EMULATOR_MEMORY_MAP_H_
