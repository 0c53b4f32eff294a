#include "launch.h"

#include <dlfcn.h>

#include "argument_memory.h"
#include "checker.h"
#include "crash_guard.h"
#include "execution.h"
#include "failure.h"

#define GPU_LAYERS_EXPORT extern "C" __attribute__((visibility("default")))

namespace gpu_layers_emulator {

// Filled by the kernels' registrations when the module is loaded, before any constructor of this file
// could run: it needs none.
const KernelRecord* first_kernel;

namespace {

ErrorKind failure_kind;
std::string failure_message;

const KernelRecord* find_kernel(int32_t index) {
    for (const KernelRecord* kernel = first_kernel; kernel != nullptr; kernel = kernel->next) {
        if (kernel->index == index) return kernel;
    }
    return nullptr;
}

void run(const LaunchRequest& request, void (*invoke)(void**)) {
    try {
        run_all_blocks(request, invoke);
    } catch (const LaunchAbandoned&) {
        forget_abandoned_launch();
    }
}

}  // namespace

void record_failure(ErrorKind kind, const std::string& message) {
    failure_kind = kind;
    failure_message = message;
}

}  // namespace gpu_layers_emulator

using namespace gpu_layers_emulator;

GPU_LAYERS_EXPORT const KernelRecord* gpu_layers_find_kernel(int32_t index) { return find_kernel(index); }

GPU_LAYERS_EXPORT void gpu_layers_launch(const LaunchRequest* request, LaunchResult* result) {
    failure_kind = kOk;
    failure_message.clear();
    const KernelRecord* kernel = find_kernel(request->kernel);
    if (!run_guarded([&] { run(*request, kernel->invoke); })) {
        ErrorKind kind = kCrash;
        std::string message = crash_description();
        checker::find_root_cause(&kind, &message);
        record_failure(kind, message);
        forget_abandoned_launch();
    }
    checker::launch_ends(result);
    result->status = failure_kind;
    result->message = failure_message.c_str();
}

GPU_LAYERS_EXPORT void* gpu_layers_allocate_argument(uint64_t bytes, uint64_t offset) {
    return allocate_argument(bytes, offset);
}
GPU_LAYERS_EXPORT void gpu_layers_free_argument(void* memory) { free_argument(memory); }

// What to subtract from an address to find it in the module's file.
GPU_LAYERS_EXPORT uint64_t gpu_layers_load_address() {
    Dl_info info;
    return dladdr(reinterpret_cast<void*>(&gpu_layers_load_address), &info) != 0
               ? reinterpret_cast<uint64_t>(info.dli_fbase)
               : 0;
}
