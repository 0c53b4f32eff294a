// Turns a kernel's segmentation fault into an error of its launch.
#ifndef GPU_LAYERS_EMULATOR_CRASH_GUARD_H_
#define GPU_LAYERS_EMULATOR_CRASH_GUARD_H_

#include <functional>
#include <string>

namespace gpu_layers_emulator {

// Runs `work`; false if it died of a memory fault or an integer division by zero. Whatever it held is
// lost, which is why only kernels (they own nothing) may run under it.
bool run_guarded(const std::function<void()>& work);

// What happened last.
std::string crash_description();

}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_EMULATOR_CRASH_GUARD_H_
