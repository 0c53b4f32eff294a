#include "crash_guard.h"

#include <pthread.h>

#include <csetjmp>
#include <csignal>
#include <cstring>

#include "failure.h"

namespace gpu_layers_emulator {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
constexpr int kSignalCount = 3;
constexpr size_t kHandlerStackBytes = 64 * 1024;

struct sigaction previous[kSignalCount];
sigjmp_buf landing;
volatile bool armed;
pthread_t guarded_thread;
int crash_signal;
void* crash_address;
std::string crashed_thread;

// The stack that faulted may be the one that overflowed.
alignas(16) unsigned char handler_stack[kHandlerStackBytes];

void on_signal(int signal, siginfo_t* info, void*) {
    if (!armed || !pthread_equal(pthread_self(), guarded_thread)) {
        // Somebody else's crash: as if this handler had never been there.
        for (int i = 0; i < kSignalCount; ++i) {
            if (kSignals[i] == signal) sigaction(signal, &previous[i], nullptr);
        }
        return;
    }
    armed = false;
    crash_signal = signal;
    crash_address = info->si_addr;
    siglongjmp(landing, 1);
}

}  // namespace

bool run_guarded(const std::function<void()>& work) {
#if defined(__SANITIZE_ADDRESS__)
    work();  // AddressSanitizer reports crashes itself, with a stack
    return true;
#else
    stack_t stack = {}, previous_stack = {};
    stack.ss_sp = handler_stack;
    stack.ss_size = kHandlerStackBytes;
    sigaltstack(&stack, &previous_stack);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &action, &previous[i]);
    guarded_thread = pthread_self();

    bool survived = true;
    if (sigsetjmp(landing, 1) == 0) {
        armed = true;
        work();
    } else {
        crashed_thread = running_thread_name();
        survived = false;
    }
    armed = false;
    for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &previous[i], nullptr);
    previous_stack.ss_flags &= ~SS_ONSTACK;
    sigaltstack(&previous_stack, nullptr);
    return survived;
#endif
}

std::string crash_description() {
    const char* what = crash_signal == SIGFPE ? "divided an integer by zero"
                                              : "accessed memory that is not mapped, or overflowed its stack";
    return format("%s %s (%s, address %p)", crashed_thread.c_str(), what, strsignal(crash_signal),
                  crash_address);
}

}  // namespace gpu_layers_emulator
