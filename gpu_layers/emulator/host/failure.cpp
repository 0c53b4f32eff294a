#include "failure.h"

#include <cstdarg>
#include <cstdio>

#include "checker.h"
#include "execution.h"
#include "launch.h"

namespace gpu_layers_emulator {

std::string format(const char* pattern, ...) {
    char buffer[1024];
    va_list arguments;
    va_start(arguments, pattern);
    vsnprintf(buffer, sizeof(buffer), pattern, arguments);
    va_end(arguments);
    return buffer;
}

std::string thread_name(uint64_t linear_block, unsigned linear_thread) {
    const uint3 block = block_position(linear_block);
    const uint3 thread = thread_position(linear_thread);
    return format("block (%u,%u,%u), thread (%u,%u,%u)", block.x, block.y, block.z, thread.x, thread.y,
                  thread.z);
}

std::string thread_name(const Block& block, const Thread& thread) {
    return thread_name(block.linear, thread.linear);
}

std::string running_thread_name() {
    if (running_thread == nullptr) return "no thread";
    return thread_name(*active_block, *running_thread);
}

std::string place(SourceLine where) {
    if (where.file == nullptr) return "an unknown line";
    return format("{file:%s:%d}", where.file, where.line);
}

std::string place(const void* return_address) { return format("{pc:%p}", return_address); }

void fail(ErrorKind kind, const std::string& message) {
    std::string root_message = message;
    checker::find_root_cause(&kind, &root_message);
    record_failure(kind, root_message);
    abandon_launch();
}

}  // namespace gpu_layers_emulator
