// Copies that a thread has started and not waited for.
#include "execution.h"
#include "failure.h"

namespace gpu_layers_emulator {

void start_async_copy(void* shared, const void* global, size_t size, SourceLine where) {
    if (size != 4 && size != 8 && size != 16)
        fail(kMisaligned, format("%s copies %zu bytes at once at %s: it may be 4, 8 or 16",
                                 running_thread_name().c_str(), size, place(where).c_str()));
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % size != 0)
        fail(kMisaligned,
             format("%s copies %zu bytes at %s from or to an address that is no multiple of that",
                    running_thread_name().c_str(), size, place(where).c_str()));
    AsyncCopies& copies = running_thread->copies;
    copies.started.push_back({shared, global, size, copies.batch});
}

void commit_async_copies() { ++running_thread->copies.batch; }

bool next_async_copy(size_t batches, AsyncCopy& copy) {
    AsyncCopies& copies = running_thread->copies;
    if (copies.finished == copies.started.size()) {
        copies.started.clear();
        copies.finished = 0;
        return false;
    }
    copy = copies.started[copies.finished];
    if (copy.batch + batches >= copies.batch) return false;
    ++copies.finished;
    return true;
}

}  // namespace gpu_layers_emulator
