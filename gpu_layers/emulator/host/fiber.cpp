#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define GPU_LAYERS_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GPU_LAYERS_ASAN 1
#endif
#endif
#ifndef GPU_LAYERS_ASAN
#define GPU_LAYERS_ASAN 0
#endif

#if GPU_LAYERS_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace gpu_layers_emulator {
namespace {

// Sanitizers put red zones around each local; pages that are never touched cost nothing.
constexpr size_t kStackBytes = GPU_LAYERS_ASAN ? 512 * 1024 : 256 * 1024;

// Every guard page splits a memory mapping, and Linux allows a process 65530 of them, of which each loaded
// module has stacks of its own. Beyond this many, stacks lie side by side over one guard page: what overflows
// there runs through stacks alone, never into other memory. Guarded ones are taken first, so that what
// overflows in all threads is noticed in the first.
constexpr size_t kGuardedStacks = 64;
constexpr size_t kStacksOverOneGuard = 64;

// Stacks lie so many bytes apart that the top of each falls into the same few sets of a cache. So each begins
// lower than its neighbour, by lines in a number that is odd: 64 of them in all 64 sets of a first-level
// cache.
constexpr size_t kStacksInDifferentSets = 64;
constexpr size_t kBytesBetweenSets = 9 * 64;

size_t bytes_above(const unsigned char* stack) {
    return reinterpret_cast<uintptr_t>(stack) / kStackBytes % kStacksInDifferentSets * kBytesBetweenSets;
}

std::vector<std::unique_ptr<Fiber>> all_fibers;
std::vector<Fiber*> free_fibers, free_guarded_fibers;

// Memory for `count` stacks over a guard page.
unsigned char* new_stacks(size_t count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, page + count * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "gpu_layers emulator: no memory for the stack of another thread\n");
        abort();
    }
    mprotect(memory, page, PROT_NONE);
    return static_cast<unsigned char*>(memory) + page;
}

unsigned char* new_stack(bool guarded) {
    if (guarded) return new_stacks(1);
    static unsigned char* stacks;
    static size_t left = 0;
    if (left == 0) {
        stacks = new_stacks(kStacksOverOneGuard);
        left = kStacksOverOneGuard;
    }
    return stacks + --left * kStackBytes;
}

void make_free(Fiber* fiber) { (fiber->is_guarded ? free_guarded_fibers : free_fibers).push_back(fiber); }

FiberEntry current_entry;
Fiber* starting_fiber;

void finish_sanitizer_switch(Fiber* self) {
#if GPU_LAYERS_ASAN
    __sanitizer_finish_switch_fiber(self->sanitizer_state, nullptr, nullptr);
#else
    (void)self;
#endif
}

void start_sanitizer_switch(Fiber* from, Fiber* to) {
#if GPU_LAYERS_ASAN
    __sanitizer_start_switch_fiber(&from->sanitizer_state, to->stack, to->stack_bytes);
#else
    (void)from;
    (void)to;
#endif
}

void first_activation() {
    Fiber* self = starting_fiber;
    finish_sanitizer_switch(self);
    current_entry(self);
    abort();  // an entry never returns: it switches away for good
}

}  // namespace

#if !GPU_LAYERS_USES_UCONTEXT
// Saves the registers a callee must preserve, swaps stacks, restores. Everything else is the caller's
// to save, since this is an ordinary call to it. Rounding modes are never changed by kernels.
extern "C" void gpu_layers_swap_stacks(void** save, void* load);
__asm__(
    ".text\n"
    ".p2align 4\n"
    ".hidden gpu_layers_swap_stacks\n"
    ".globl gpu_layers_swap_stacks\n"
    ".type gpu_layers_swap_stacks,@function\n"
    "gpu_layers_swap_stacks:\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  ret\n"
    ".size gpu_layers_swap_stacks,.-gpu_layers_swap_stacks\n");
#endif

void prepare_fiber(Fiber* fiber, FiberEntry entry) {
    current_entry = entry;
    if (fiber->stack == nullptr) {
        fiber->is_guarded = all_fibers.size() <= kGuardedStacks;
        fiber->stack = new_stack(fiber->is_guarded);
        fiber->stack_bytes = kStackBytes;
    }
#if GPU_LAYERS_ASAN
    // An abandoned thread leaves the red zones of its locals.
    __asan_unpoison_memory_region(fiber->stack, fiber->stack_bytes);
#endif
    fiber->sanitizer_state = nullptr;
    const size_t usable = fiber->stack_bytes - bytes_above(fiber->stack);
#if GPU_LAYERS_USES_UCONTEXT
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = usable;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, first_activation, 0);
#else
    void** top = reinterpret_cast<void**>(fiber->stack + usable);
    *--top = nullptr;  // ends backtraces, and aligns the stack as a call would
    *--top = reinterpret_cast<void*>(&first_activation);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
    fiber->stack_pointer = top;
#endif
}

void switch_fiber(Fiber* from, Fiber* to) {
    starting_fiber = to;
    start_sanitizer_switch(from, to);
#if GPU_LAYERS_USES_UCONTEXT
    swapcontext(&from->context, &to->context);
#else
    gpu_layers_swap_stacks(&from->stack_pointer, to->stack_pointer);
#endif
    finish_sanitizer_switch(from);
}

void adopt_main_fiber(Fiber* fiber) {
#if GPU_LAYERS_ASAN
    // The sanitizer needs the bounds of the stack it returns to.
    pthread_attr_t attributes;
    void* stack = nullptr;
    size_t bytes = 0;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
        pthread_attr_getstack(&attributes, &stack, &bytes);
        pthread_attr_destroy(&attributes);
    }
    fiber->stack = static_cast<unsigned char*>(stack);
    fiber->stack_bytes = bytes;
#else
    (void)fiber;
#endif
}

Fiber* take_fiber(FiberEntry entry) {
    std::vector<Fiber*>& free = free_guarded_fibers.empty() ? free_fibers : free_guarded_fibers;
    if (free.empty()) {
        all_fibers.push_back(std::make_unique<Fiber>());
        prepare_fiber(all_fibers.back().get(), entry);
        return all_fibers.back().get();
    }
    Fiber* fiber = free.back();
    free.pop_back();
    return fiber;
}

void give_back_fiber(Fiber* fiber) { make_free(fiber); }

void reclaim_all_fibers() {
    free_fibers.clear();
    free_guarded_fibers.clear();
    for (auto& fiber : all_fibers) {
        prepare_fiber(fiber.get(), current_entry);
        make_free(fiber.get());
    }
}

}  // namespace gpu_layers_emulator
