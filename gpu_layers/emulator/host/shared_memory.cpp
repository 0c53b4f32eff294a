#include "shared_memory.h"

#include <link.h>

#include <cstdlib>

namespace gpu_layers_emulator {
namespace {

// Lies in the segment, so that reading it makes the dynamic linker allocate the whole segment for the
// calling thread, and its own address identifies this module among all loaded ones.
thread_local volatile char segment_anchor;
const char module_anchor = 0;

int find_segment(dl_phdr_info* info, size_t, void* result) {
    bool is_this_module = false;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
        const uintptr_t anchor = reinterpret_cast<uintptr_t>(&module_anchor);
        if (header.p_type == PT_LOAD && anchor - begin < header.p_memsz) is_this_module = true;
    }
    if (!is_this_module) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
        auto* range = static_cast<MemoryRange*>(result);
        range->begin = static_cast<unsigned char*>(info->dlpi_tls_data);
        range->bytes = info->dlpi_phdr[i].p_memsz;
    }
    return 1;
}

}  // namespace

MemoryRange static_shared_segment() {
    segment_anchor = 0;
    MemoryRange segment;
    dl_iterate_phdr(find_segment, &segment);
    return segment;
}

DynamicSharedMemory::~DynamicSharedMemory() { free(allocation_); }

void DynamicSharedMemory::resize(size_t bytes) {
    if (range_.bytes == bytes && allocation_ != nullptr) return;
    free(allocation_);
    allocation_ = nullptr;
    // 1024 is what a device aligns to; no slack after it, so that AddressSanitizer sees an overrun.
    if (posix_memalign(&allocation_, 1024, bytes == 0 ? 1 : bytes) != 0) abort();
    range_ = {static_cast<unsigned char*>(allocation_), bytes};
}

}  // namespace gpu_layers_emulator
