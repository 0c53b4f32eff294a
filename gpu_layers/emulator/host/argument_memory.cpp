#include "argument_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <unordered_map>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace gpu_layers_emulator {
namespace {

struct Allocation {
    void* begin;
    uint64_t bytes;
    uint64_t offset;
};
std::unordered_map<void*, Allocation> allocations;

#if !defined(__SANITIZE_ADDRESS__)
// So wide that an access which misses one array by a row or a plane still does not meet another.
constexpr uint64_t kGapBytes = uint64_t{256} << 20;
#endif

}  // namespace

#if defined(__SANITIZE_ADDRESS__)

void* allocate_argument(uint64_t bytes, uint64_t offset) {
    void* begin = nullptr;
    if (posix_memalign(&begin, 512, offset + bytes == 0 ? 1 : offset + bytes) != 0) return nullptr;
    __asan_poison_memory_region(begin, offset);
    void* memory = static_cast<unsigned char*>(begin) + offset;
    allocations[memory] = {begin, bytes, offset};
    return memory;
}

void free_argument(void* memory) {
    const Allocation allocation = allocations.at(memory);
    __asan_unpoison_memory_region(allocation.begin, allocation.offset);
    free(allocation.begin);
    allocations.erase(memory);
}

#else

void* allocate_argument(uint64_t bytes, uint64_t offset) {
    const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    const uint64_t inner = (offset + bytes + page - 1) / page * page;
    const uint64_t total = inner + 2 * kGapBytes;
    void* begin = mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin == MAP_FAILED) return nullptr;
    unsigned char* usable = static_cast<unsigned char*>(begin) + kGapBytes;
    if (inner > 0) mprotect(usable, inner, PROT_READ | PROT_WRITE);
    allocations[usable + offset] = {begin, total, offset};
    return usable + offset;
}

void free_argument(void* memory) {
    const Allocation allocation = allocations.at(memory);
    munmap(allocation.begin, allocation.bytes);
    allocations.erase(memory);
}

#endif

}  // namespace gpu_layers_emulator
