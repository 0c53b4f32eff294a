// Checked mode: judges and counts every access of a kernel.
//
// The kernels are compiled as for a race detector of the compiler's: each load and store calls a hook.
// The detector's own library is not linked; the hooks at the end of this file replace it.
#include "checker.h"

#if GPU_LAYERS_CHECKED

#include <link.h>

#include <algorithm>
#include <unordered_map>

#include "failure.h"
#include "happens_before.h"
#include "memory_map.h"
#include "shadow_memory.h"
#include "traffic.h"

namespace gpu_layers_emulator {
namespace checker {
namespace {

bool is_active;
uintptr_t stack_begin;
size_t stack_bytes;
MemoryRange module_image;  // code, constants and __device__ variables

std::unordered_map<const void*, Site> site_of_address;
std::vector<const void*> address_of_site;
constexpr size_t kSiteSlots = 4096;
struct {
    const void* address;
    Site site;
} recent_sites[kSiteSlots];

std::vector<FootprintRecord> footprints;

// A read of memory that nobody has written may be the first sign of a missing barrier: whoever writes it
// next, before one, shows that. So the verdict waits for the barrier, or for any other error.
std::string uninitialised_shared;
std::string uninitialised_global;

void report_uninitialised(std::string* pending) {
    if (!pending->empty()) fail(kUninitialised, *pending);
}

Site site_of(const void* return_address) {
    auto& recent = recent_sites[reinterpret_cast<uintptr_t>(return_address) % kSiteSlots];
    if (recent.address == return_address) return recent.site;
    auto [found, is_new] =
        site_of_address.try_emplace(return_address, static_cast<Site>(address_of_site.size() + 1));
    if (is_new) address_of_site.push_back(return_address);
    recent = {return_address, found->second};
    return found->second;
}

uint64_t program_counter_of(Site site) { return reinterpret_cast<uint64_t>(address_of_site[site - 1]); }

std::string place_of(Site site) { return place(address_of_site[site - 1]); }

const char* verb(Access access) {
    return access == Access::kLoad ? "reads" : access == Access::kStore ? "writes" : "atomically updates";
}

int find_image(dl_phdr_info* info, size_t, void* result) {
    uintptr_t begin = ~uintptr_t{0}, end = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
        begin = std::min<uintptr_t>(begin, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
        end = std::max<uintptr_t>(end,
                                  info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
    }
    if (reinterpret_cast<uintptr_t>(&is_active) - begin >= end - begin) return 0;
    *static_cast<MemoryRange*>(result) = {reinterpret_cast<unsigned char*>(begin), end - begin};
    return 1;
}

std::string describe(Access access, size_t bytes, const std::string& what, Site site) {
    return format("%s %s %zu bytes at %s: ", running_thread_name().c_str(), verb(access), bytes,
                  place_of(site).c_str()) +
           what;
}

[[noreturn]] void report(ErrorKind kind, Access access, size_t bytes, const std::string& what, Site site) {
    fail(kind, describe(access, bytes, what, site));
}

[[noreturn]] void report_race(const Verdict& verdict, const Region& region, Access access, size_t bytes,
                              Site site) {
    const std::string where = memory_map::describe(region, region.begin + verdict.offset);
    const Stamp other = verdict.earlier.stamp;
    const bool same_warp =
        other.block() == active_block->linear && other.thread() / kWarpSize == running_thread->warp();
    const char* missing = other.block() != active_block->linear ? "blocks run in any order"
                          : same_warp                           ? "no __syncwarp() or barrier orders them"
                                                                : "no barrier orders them";
    report(kRace, access, bytes,
           where + format(", which %s %s at %s: %s", thread_name(other.block(), other.thread()).c_str(),
                          verdict.earlier_is_write ? "wrote" : "read", place_of(verdict.earlier.site).c_str(),
                          missing),
           site);
}

// One access of contiguous bytes, at most 16 of them.
void check(uintptr_t address, size_t bytes, Access access, bool is_aligned_type, Site site) {
    Region* region = memory_map::find(address);
    if (region == nullptr) {
        if (module_image.contains(reinterpret_cast<const void*>(address))) return;
        report(kOutOfBounds, access, bytes, memory_map::describe_nearest(address, bytes), site);
    }
    int32_t parameter = kShared;
    bool is_initialised = false;
    if (!region->is_shared) {
        const ArgumentRecord* argument =
            memory_map::argument_at(*region, address, bytes, access != Access::kLoad);
        if (argument == nullptr) {
            report(kOutOfBounds, access, bytes, memory_map::describe_nearest(address, bytes), site);
        }
        parameter = argument->parameter;
        if (access != Access::kLoad && argument->is_const) {
            report(kReadOnly, access, bytes,
                   memory_map::describe(*region, address) + " is const: the kernel promised not to write it",
                   site);
        }
        for (const ArgumentRecord& any : region->arguments) {
            is_initialised = is_initialised || (any.is_initialised && address >= any.address &&
                                                address + bytes <= any.address + any.bytes);
        }
    } else if (address + bytes > region->begin + region->bytes ||
               (!region->variables.empty() && memory_map::variable_at(*region, address, bytes) == nullptr)) {
        report(kOutOfBounds, access, bytes, memory_map::describe_nearest(address, bytes), site);
    }
    if (is_aligned_type && address % bytes != 0) {
        report(kMisaligned, access, bytes,
               memory_map::describe(*region, address) + format(" is no multiple of %zu in memory", bytes),
               site);
    }
    const Verdict verdict =
        region->shadow.access(address - region->begin, bytes, access, site, is_initialised);
    if (verdict.is_race) report_race(verdict, *region, access, bytes, site);
    if (verdict.is_uninitialised) {
        std::string& pending = region->is_shared ? uninitialised_shared : uninitialised_global;
        if (pending.empty()) {
            const std::string where = memory_map::describe(*region, region->begin + verdict.offset);
            pending = describe(access, bytes, where + " was never written", site);
        }
    }
    traffic::record(*active_block, *running_thread, site, parameter, access, address,
                    static_cast<unsigned>(bytes));
}

}  // namespace

// Wider ones (a struct of several vectors) are what a GPU makes of them: pieces of up to 16 bytes, each
// as wide as the address allows.
void memory_access(const volatile void* pointer, size_t bytes, Access access, bool is_aligned_type,
                   const void* return_address) {
    auto address = reinterpret_cast<uintptr_t>(pointer);
    if (!is_active || address - stack_begin < stack_bytes) return;
    const Site site = site_of(return_address);
    const bool is_one_piece =
        bytes <= 16 && (bytes & (bytes - 1)) == 0 && (is_aligned_type || address % bytes == 0);
    if (is_one_piece) {
        check(address, bytes, access, is_aligned_type, site);
        return;
    }
    while (bytes > 0) {
        size_t piece = 16;
        while (piece > bytes || address % piece != 0) piece /= 2;
        check(address, piece, access, false, site);
        address += piece;
        bytes -= piece;
    }
}

void launch_begins(const LaunchRequest& request, unsigned resident_blocks) {
    const uint64_t blocks = static_cast<uint64_t>(request.grid[0]) * request.grid[1] * request.grid[2];
    if (blocks >> Stamp::kBlockBits != 0) {
        fail(kLimit, "checked mode keeps track of at most 2^28 blocks: run a smaller grid");
    }
    dl_iterate_phdr(find_image, &module_image);
    clocks::launch_begins(resident_blocks);
    memory_map::launch_begins(request, resident_blocks);
    traffic::launch_begins(resident_blocks);
    uninitialised_shared.clear();
    uninitialised_global.clear();
    is_active = true;
}

void all_blocks_ended() { report_uninitialised(&uninitialised_global); }

void find_root_cause(ErrorKind* kind, std::string* message) {
    if (*kind == kRace) return;
    for (std::string* pending : {&uninitialised_shared, &uninitialised_global}) {
        if (pending->empty()) continue;
        *kind = kUninitialised;
        *message = *pending;
        pending->clear();
        return;
    }
}

void launch_ends(LaunchResult* result) {
    is_active = false;
    const auto& records = traffic::totals(program_counter_of);
    result->traffic = records.data();
    result->traffic_count = records.size();
    footprints.clear();
    for (const Region& region : memory_map::global_regions()) {
        for (const ArgumentRecord& argument : region.arguments) {
            const size_t begin = argument.address - region.begin;
            const ShadowFootprint print = region.shadow.footprint(begin, begin + argument.bytes);
            footprints.push_back({argument.parameter, 0, print.bytes_loaded, print.bytes_stored,
                                  print.sectors_loaded, print.sectors_stored});
        }
    }
    result->footprints = footprints.data();
    result->footprint_count = footprints.size();
    result->shared_bytes_touched = memory_map::static_shared_bytes_touched();
}

void block_begins(Block& block) {
    clocks::block_begins(block);
    memory_map::block_begins(block);
    traffic::block_begins(block);
}

void block_activated(Block& block) { memory_map::activate(block); }

void block_ends(Block& block) {
    report_uninitialised(&uninitialised_shared);
    traffic::block_converged(block);
    memory_map::block_ends(block);
}

void thread_resumes(Block& block, Thread& thread) {
    stack_begin = reinterpret_cast<uintptr_t>(thread.fiber->stack);
    stack_bytes = thread.fiber->stack_bytes;
    clocks::thread_resumes(block, thread);
}

void block_synchronised(Block& block) {
    report_uninitialised(&uninitialised_shared);
    clocks::block_synchronised(block);
    traffic::block_converged(block);
}

void warp_synchronised(Block& block, unsigned warp, unsigned mask, bool orders_memory) {
    if (orders_memory) clocks::warp_synchronised(block, warp, mask);
    if ((mask & block.warps[warp].alive) == block.warps[warp].alive) traffic::warp_converged(block, warp);
}

void grid_synchronised() {
    report_uninitialised(&uninitialised_shared);
    report_uninitialised(&uninitialised_global);
    clocks::grid_synchronised();
}

void fenced(Thread& thread) { clocks::fenced(*active_block, thread); }

void atomic_access(const volatile void* address, size_t size, const void* return_address) {
    memory_access(address, size, Access::kAtomic, true, return_address);
    clocks::atomic_performed(*active_block, *running_thread, reinterpret_cast<uintptr_t>(address));
}

}  // namespace checker
}  // namespace gpu_layers_emulator

using gpu_layers_emulator::Access;
using gpu_layers_emulator::checker::memory_access;

extern "C" {

#define GPU_LAYERS_HOOK(name, bytes, access, is_aligned)                                        \
    void name(void* address) {                                                                  \
        memory_access(address, bytes, Access::access, is_aligned, __builtin_return_address(0)); \
    }
#define GPU_LAYERS_HOOKS(bytes)                                        \
    GPU_LAYERS_HOOK(__tsan_read##bytes, bytes, kLoad, true)            \
    GPU_LAYERS_HOOK(__tsan_write##bytes, bytes, kStore, true)          \
    GPU_LAYERS_HOOK(__tsan_volatile_read##bytes, bytes, kLoad, true)   \
    GPU_LAYERS_HOOK(__tsan_volatile_write##bytes, bytes, kStore, true) \
    GPU_LAYERS_HOOK(__tsan_unaligned_read##bytes, bytes, kLoad, false) \
    GPU_LAYERS_HOOK(__tsan_unaligned_write##bytes, bytes, kStore, false)
GPU_LAYERS_HOOKS(1)
GPU_LAYERS_HOOKS(2)
GPU_LAYERS_HOOKS(4)
GPU_LAYERS_HOOKS(8)
GPU_LAYERS_HOOKS(16)

void __tsan_read_range(void* address, size_t bytes) {
    memory_access(address, bytes, Access::kLoad, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
    memory_access(address, bytes, Access::kStore, false, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

}  // extern "C"

#endif  // GPU_LAYERS_CHECKED
