// What checked mode records of an execution. In every other mode these are nothing.
#ifndef GPU_LAYERS_EMULATOR_CHECKER_H_
#define GPU_LAYERS_EMULATOR_CHECKER_H_

#include <string>

#include "execution.h"

#ifndef GPU_LAYERS_CHECKED
#define GPU_LAYERS_CHECKED 0
#endif

namespace gpu_layers_emulator {
namespace checker {

#if GPU_LAYERS_CHECKED

void launch_begins(const LaunchRequest& request, unsigned resident_blocks);
void all_blocks_ended();
void launch_ends(LaunchResult* result);
void block_begins(Block& block);
void block_activated(Block& block);
void block_ends(Block& block);
void thread_resumes(Block& block, Thread& thread);
void block_synchronised(Block& block);
void warp_synchronised(Block& block, unsigned warp, unsigned mask, bool orders_memory);
void grid_synchronised();
void fenced(Thread& thread);
void atomic_access(const volatile void* address, size_t size, const void* return_address);

// What an error follows from, where that is known: a read of uninitialised memory, earlier on.
void find_root_cause(ErrorKind* kind, std::string* message);

#else

inline void launch_begins(const LaunchRequest&, unsigned) {}
inline void all_blocks_ended() {}
inline void launch_ends(LaunchResult*) {}
inline void block_begins(Block&) {}
inline void block_activated(Block&) {}
inline void block_ends(Block&) {}
inline void thread_resumes(Block&, Thread&) {}
inline void block_synchronised(Block&) {}
inline void warp_synchronised(Block&, unsigned, unsigned, bool) {}
inline void grid_synchronised() {}
inline void fenced(Thread&) {}
inline void atomic_access(const volatile void*, size_t, const void*) {}
inline void find_root_cause(ErrorKind*, std::string*) {}

#endif

}  // namespace checker
}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_EMULATOR_CHECKER_H_
