#include "checker.h"

#if GPU_LAYERS_CHECKED

#include <algorithm>
#include <map>
#include <memory>

#include "failure.h"
#include "memory_map.h"

namespace gpu_layers_emulator {

bool Region::is_read_only() const {
    return !is_shared &&
           std::all_of(arguments.begin(), arguments.end(), [](const auto& a) { return a.is_const; });
}

namespace memory_map {
namespace {

constexpr unsigned kSharedCellBytes = 4;

struct SharedRegions {
    Region statics;
    Region dynamic;
};

std::vector<Region> globals;  // by address
std::vector<std::unique_ptr<SharedRegions>> shared_by_slot;
SharedRegions* active_shared;
uint64_t most_static_bytes;

unsigned cell_bytes_for(uint32_t element_size) {
    for (unsigned bytes : {8u, 4u, 2u}) {
        if (element_size % bytes == 0) return bytes;
    }
    return 1;
}

void add_globals(const LaunchRequest& request) {
    globals.clear();
    std::map<int32_t, std::vector<ArgumentRecord>> by_buffer;
    for (uint64_t i = 0; i < request.argument_count; ++i) {
        by_buffer[request.arguments[i].buffer].push_back(request.arguments[i]);
    }
    for (auto& [buffer, arguments] : by_buffer) {
        Region region;
        uintptr_t begin = ~uintptr_t{0}, end = 0;
        unsigned cell_bytes = 8;
        for (const ArgumentRecord& argument : arguments) {
            begin = std::min<uintptr_t>(begin, argument.address);
            end = std::max<uintptr_t>(end, argument.address + argument.bytes);
            cell_bytes = std::min(cell_bytes, cell_bytes_for(argument.element_size));
        }
        region.begin = begin;
        region.bytes = end - begin;
        region.arguments = std::move(arguments);
        region.shadow.reset(region.bytes, cell_bytes, begin);
        region.shadow.set_read_only(region.is_read_only());
        globals.push_back(std::move(region));
    }
    std::sort(globals.begin(), globals.end(),
              [](const Region& a, const Region& b) { return a.begin < b.begin; });
}

void add_shared(const LaunchRequest& request, unsigned resident_blocks) {
    shared_by_slot.clear();
    const MemoryRange segment = static_shared_segment();
    for (unsigned slot = 0; slot < resident_blocks; ++slot) {
        auto regions = std::make_unique<SharedRegions>();
        regions->statics.is_shared = regions->dynamic.is_shared = true;
        regions->statics.begin = reinterpret_cast<uintptr_t>(segment.begin);
        regions->statics.bytes = segment.bytes;
        regions->statics.variables.assign(request.shared_variables,
                                          request.shared_variables + request.shared_variable_count);
        regions->statics.shadow.reset(segment.bytes, kSharedCellBytes, 0);
        shared_by_slot.push_back(std::move(regions));
    }
}

// How far an access lies outside of [begin, begin + size); 0 if it touches it.
uint64_t distance(uintptr_t begin, uint64_t size, uintptr_t address, size_t bytes) {
    if (address + bytes <= begin) return begin - address;
    if (address >= begin + size) return address - (begin + size);
    return 0;
}

std::string describe_miss(const std::string& what, uintptr_t begin, uint64_t size, uintptr_t address,
                          size_t bytes) {
    if (address < begin) {
        return format("%llu bytes before the start of %s (%llu bytes)",
                      static_cast<unsigned long long>(begin - address), what.c_str(),
                      static_cast<unsigned long long>(size));
    }
    const unsigned long long past = address + bytes - (begin + size);
    if (address < begin + size) {
        return format("%s (%llu bytes), the last %llu of them past its end", what.c_str(),
                      static_cast<unsigned long long>(size), past);
    }
    const unsigned long long gap = address - (begin + size);
    return format("%s (%llu bytes), %s past its end", what.c_str(), static_cast<unsigned long long>(size),
                  gap == 0 ? "directly" : format("%llu bytes", gap).c_str());
}

}  // namespace

void launch_begins(const LaunchRequest& request, unsigned resident_blocks) {
    add_globals(request);
    add_shared(request, resident_blocks);
    active_shared = nullptr;
    most_static_bytes = 0;
}

void activate(const Block& block) { active_shared = shared_by_slot[block.slot].get(); }

void block_begins(const Block& block) {
    SharedRegions& shared = *shared_by_slot[block.slot];
    const MemoryRange dynamic = block.dynamic_shared.range();
    if (shared.dynamic.begin != reinterpret_cast<uintptr_t>(dynamic.begin) ||
        shared.dynamic.bytes != dynamic.bytes) {
        shared.dynamic.begin = reinterpret_cast<uintptr_t>(dynamic.begin);
        shared.dynamic.bytes = dynamic.bytes;
        shared.dynamic.shadow.reset(dynamic.bytes, kSharedCellBytes, 0);
    }
}

void block_ends(const Block& block) {
    SharedRegions& shared = *shared_by_slot[block.slot];
    if (most_static_bytes == 0) most_static_bytes = shared.statics.shadow.bytes_touched();
    shared.statics.shadow.forget();
    shared.dynamic.shadow.forget();
}

Region* find(uintptr_t address) {
    for (Region& region : globals) {
        if (region.contains(address)) return &region;
    }
    if (active_shared->dynamic.contains(address)) return &active_shared->dynamic;
    if (active_shared->statics.contains(address)) return &active_shared->statics;
    return nullptr;
}

const ArgumentRecord* argument_at(const Region& region, uintptr_t address, size_t bytes, bool is_store) {
    const ArgumentRecord* fallback = nullptr;
    for (const ArgumentRecord& argument : region.arguments) {
        if (address < argument.address || address + bytes > argument.address + argument.bytes) continue;
        if (static_cast<bool>(argument.is_const) != is_store) return &argument;
        fallback = &argument;
    }
    return fallback;
}

const SharedVariableRecord* variable_at(const Region& region, uintptr_t address, size_t bytes) {
    const uintptr_t offset = address - region.begin;
    for (const SharedVariableRecord& variable : region.variables) {
        if (offset >= variable.offset && offset + bytes <= variable.offset + variable.bytes) return &variable;
    }
    return nullptr;
}

std::string describe_nearest(uintptr_t address, size_t bytes) {
    std::string best = "memory that is not the kernel's";
    uint64_t best_distance = ~uint64_t{0};
    const auto consider = [&](const std::string& what, uintptr_t begin, uint64_t size) {
        const uint64_t away = distance(begin, size, address, bytes);
        if (away >= best_distance) return;
        best_distance = away;
        best = describe_miss(what, begin, size, address, bytes);
    };
    for (const Region& region : globals) {
        for (const ArgumentRecord& argument : region.arguments) {
            consider(format("{arg:%d}", argument.parameter), argument.address, argument.bytes);
        }
    }
    if (active_shared->dynamic.bytes > 0) {
        consider("the dynamic shared memory", active_shared->dynamic.begin, active_shared->dynamic.bytes);
    }
    for (const SharedVariableRecord& variable : active_shared->statics.variables) {
        consider(format("{shared:%d}", variable.index), active_shared->statics.begin + variable.offset,
                 variable.bytes);
    }
    if (address < 4096) return "a null pointer";
    return best;
}

std::string describe(const Region& region, uintptr_t address) {
    const auto at = [](uint64_t offset, const std::string& what) {
        return format("byte %llu of %s", static_cast<unsigned long long>(offset), what.c_str());
    };
    if (!region.is_shared) {
        const ArgumentRecord* argument = argument_at(region, address, 1, false);
        if (argument != nullptr)
            return at(address - argument->address, format("{arg:%d}", argument->parameter));
    }
    const SharedVariableRecord* variable = variable_at(region, address, 1);
    if (variable != nullptr) {
        return at(address - region.begin - variable->offset, format("{shared:%d}", variable->index));
    }
    return at(address - region.begin, "the dynamic shared memory");
}

std::vector<Region>& global_regions() { return globals; }
uint64_t static_shared_bytes_touched() { return most_static_bytes; }

}  // namespace memory_map
}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_CHECKED
