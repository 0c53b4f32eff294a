// Stacks of their own for the threads of a kernel, and the switch between them.
#ifndef GPU_LAYERS_EMULATOR_FIBER_H_
#define GPU_LAYERS_EMULATOR_FIBER_H_

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(GPU_LAYERS_UCONTEXT)
#define GPU_LAYERS_USES_UCONTEXT 1
#include <ucontext.h>
#else
#define GPU_LAYERS_USES_UCONTEXT 0
#endif

namespace gpu_layers_emulator {

struct Thread;

struct Fiber {
#if GPU_LAYERS_USES_UCONTEXT
    ucontext_t context;
#else
    void* stack_pointer = nullptr;
#endif
    unsigned char* stack = nullptr;  // lowest address
    bool is_guarded = false;         // whether no other stack lies below
    size_t stack_bytes = 0;
    void* sanitizer_state = nullptr;
    Thread* thread = nullptr;  // the one it runs
};

using FiberEntry = void (*)(Fiber*);

// Gives `fiber` a stack (once) and makes its next activation start at `entry`.
void prepare_fiber(Fiber* fiber, FiberEntry entry);

// Saves the running context in `from` and continues `to`.
void switch_fiber(Fiber* from, Fiber* to);

// The context of the caller of a launch: it owns no stack.
void adopt_main_fiber(Fiber* fiber);

// Fibers whose threads are done, ready to be used again. They outlive a launch.
Fiber* take_fiber(FiberEntry entry);
void give_back_fiber(Fiber* fiber);

// After an error left threads in mid-flight: every fiber is free again.
void reclaim_all_fibers();

}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_EMULATOR_FIBER_H_
