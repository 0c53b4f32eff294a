// How a launch ends early: a message, and no return.
#ifndef GPU_LAYERS_EMULATOR_FAILURE_H_
#define GPU_LAYERS_EMULATOR_FAILURE_H_

#include <string>

#include "device_runtime.h"
#include "launch_abi.h"

namespace gpu_layers_emulator {

struct Block;
struct Thread;

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

// "block (0,0,0), thread (3,0,0)" of the running thread, or of any other.
std::string running_thread_name();
std::string thread_name(const Block& block, const Thread& thread);
std::string thread_name(uint64_t linear_block, unsigned linear_thread);

// "file:line", and "{pc:...}", which Python turns into one: only it can read the debug information.
std::string place(SourceLine where);
std::string place(const void* return_address);

// Records the error of the running launch and leaves every thread of it where it is.
[[noreturn]] void fail(ErrorKind kind, const std::string& message);

}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_EMULATOR_FAILURE_H_
