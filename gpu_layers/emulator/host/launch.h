// The one function of a compiled module that starts kernels, and the error it reports.
#ifndef GPU_LAYERS_EMULATOR_LAUNCH_H_
#define GPU_LAYERS_EMULATOR_LAUNCH_H_

#include <string>

#include "launch_abi.h"

namespace gpu_layers_emulator {

void record_failure(ErrorKind kind, const std::string& message);

}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_EMULATOR_LAUNCH_H_
