#include "checker.h"

#if GPU_LAYERS_CHECKED

#include <algorithm>
#include <map>
#include <memory>
#include <tuple>

#include "traffic.h"

namespace gpu_layers_emulator {
namespace traffic {
namespace {

constexpr unsigned kSectorBytes = 32;
constexpr unsigned kLineBytes = 128;
constexpr unsigned kBanks = 32;
constexpr unsigned kBankBytes = 4;

struct Request {
    uintptr_t addresses[kWarpSize];
    unsigned lanes;  // which of them are set
    unsigned bytes;
    int32_t parameter;
    Access access;
};

// The requests of one instruction in one warp, and how many of them each lane has been in.
struct Instruction {
    std::vector<Request> requests;
    uint32_t passed[kWarpSize] = {};
};

struct WarpTraffic {
    std::vector<Instruction> by_site;
    std::vector<Site> touched;
};

using Key = std::tuple<Site, int32_t, Access, unsigned>;
std::vector<std::vector<std::unique_ptr<WarpTraffic>>> warps_by_slot;
std::map<Key, TrafficRecord> sums;
std::vector<TrafficRecord> reported;

// Distinct units of memory that a request touches.
uint64_t count_units(const Request& request, unsigned unit) {
    uintptr_t units[2 * kWarpSize];
    unsigned count = 0;
    bool is_sorted = true;
    for (unsigned lanes = request.lanes; lanes != 0; lanes &= lanes - 1) {
        const uintptr_t address = request.addresses[__builtin_ctz(lanes)];
        for (uintptr_t u = address / unit; u <= (address + request.bytes - 1) / unit; ++u) {
            if (count > 0 && units[count - 1] == u) continue;
            is_sorted = is_sorted && (count == 0 || units[count - 1] < u);
            units[count++] = u;
        }
    }
    if (is_sorted) return count;
    std::sort(units, units + count);
    return static_cast<uint64_t>(std::unique(units, units + count) - units);
}

// Shared memory serves 32 banks of 4 bytes at a time. Wider accesses go by half or quarter warp; lanes
// that need the same word share it, lanes that need different words of one bank wait for each other.
void count_wavefronts(const Request& request, uint64_t* wavefronts, uint64_t* ideal) {
    const unsigned words_each = std::max(1u, request.bytes / kBankBytes);
    const unsigned lanes_each = kWarpSize / words_each;
    for (unsigned first = 0; first < kWarpSize; first += lanes_each) {
        const unsigned group = lanes_each == kWarpSize ? ~0u : ((1u << lanes_each) - 1u) << first;
        uintptr_t words[kWarpSize];
        unsigned count = 0;
        for (unsigned lanes = request.lanes & group; lanes != 0; lanes &= lanes - 1) {
            const uintptr_t word = request.addresses[__builtin_ctz(lanes)] / kBankBytes;
            for (unsigned i = 0; i < words_each; ++i) words[count++] = word + i;
        }
        if (count == 0) continue;
        std::sort(words, words + count);
        count = static_cast<unsigned>(std::unique(words, words + count) - words);
        unsigned in_bank[kBanks] = {};
        unsigned most = 0;
        for (unsigned i = 0; i < count; ++i) most = std::max(most, ++in_bank[words[i] % kBanks]);
        *wavefronts += most;
        *ideal += 1;
    }
}

void add(Site site, const Request& request) {
    TrafficRecord& sum = sums[{site, request.parameter, request.access, request.bytes}];
    const auto lanes = static_cast<uint64_t>(__builtin_popcount(request.lanes));
    sum.accesses += lanes;
    sum.bytes += lanes * request.bytes;
    sum.requests += 1;
    if (request.parameter == kShared) {
        count_wavefronts(request, &sum.wavefronts, &sum.ideal_wavefronts);
    } else {
        sum.sectors += count_units(request, kSectorBytes);
        sum.lines += count_units(request, kLineBytes);
    }
}

void flush(WarpTraffic& warp) {
    for (Site site : warp.touched) {
        Instruction& instruction = warp.by_site[site];
        for (const Request& request : instruction.requests) add(site, request);
        instruction.requests.clear();
        std::fill(std::begin(instruction.passed), std::end(instruction.passed), 0u);
    }
    warp.touched.clear();
}

}  // namespace

void launch_begins(unsigned resident_blocks) {
    sums.clear();
    warps_by_slot.clear();
    warps_by_slot.resize(resident_blocks);
}

void block_begins(const Block& block) {
    auto& warps = warps_by_slot[block.slot];
    warps.resize(block.warps.size());
    for (auto& warp : warps) {
        if (warp == nullptr) warp = std::make_unique<WarpTraffic>();
    }
}

void record(const Block& block, const Thread& thread, Site site, int32_t parameter, Access access,
            uintptr_t address, unsigned bytes) {
    WarpTraffic& warp = *warps_by_slot[block.slot][thread.warp()];
    if (site >= warp.by_site.size()) warp.by_site.resize(site + 16);
    Instruction& instruction = warp.by_site[site];
    const unsigned lane = thread.lane();
    const uint32_t turn = instruction.passed[lane]++;
    if (turn == 0 && instruction.requests.empty()) warp.touched.push_back(site);
    if (turn >= instruction.requests.size()) {
        Request request;
        request.lanes = 0;
        request.bytes = bytes;
        request.parameter = parameter;
        request.access = access;
        instruction.requests.push_back(request);
    }
    Request& request = instruction.requests[turn];
    if (request.parameter != parameter || request.bytes != bytes) {
        // One instruction, lanes in different arrays: the hardware would take them together, but each
        // array gets its own count.
        Request alone;
        alone.lanes = 1u << lane;
        alone.addresses[lane] = address;
        alone.bytes = bytes;
        alone.parameter = parameter;
        alone.access = access;
        add(site, alone);
        return;
    }
    request.lanes |= 1u << lane;
    request.addresses[lane] = address;
}

void warp_converged(const Block& block, unsigned warp) { flush(*warps_by_slot[block.slot][warp]); }

void block_converged(const Block& block) {
    for (auto& warp : warps_by_slot[block.slot]) flush(*warp);
}

const std::vector<TrafficRecord>& totals(uint64_t (*program_counter_of)(Site)) {
    reported.clear();
    for (const auto& [key, sum] : sums) {
        reported.push_back(sum);
        reported.back().program_counter = program_counter_of(std::get<0>(key));
        reported.back().parameter = std::get<1>(key);
        reported.back().access = static_cast<int32_t>(std::get<2>(key));
        reported.back().width = std::get<3>(key);
    }
    return reported;
}

}  // namespace traffic
}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_CHECKED
