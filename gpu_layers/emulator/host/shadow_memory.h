// What is remembered of each piece of memory: who wrote it, who has read it since, and whether ever.
#ifndef GPU_LAYERS_EMULATOR_SHADOW_MEMORY_H_
#define GPU_LAYERS_EMULATOR_SHADOW_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "happens_before.h"

namespace gpu_layers_emulator {

using Site = uint32_t;  // a source instruction; 0 is none

enum class Access : uint8_t { kLoad, kStore, kAtomic };

// One access that an error message names.
struct AccessRecord {
    Stamp stamp;
    Site site = 0;
};

// The verdict on an access, with the earlier one it conflicts with.
struct Verdict {
    bool is_uninitialised = false;
    bool is_race = false;
    bool earlier_is_write = false;
    AccessRecord earlier;
    size_t offset = 0;  // of the first byte concerned
};

struct ShadowFootprint {
    uint64_t bytes_loaded = 0;
    uint64_t bytes_stored = 0;
    uint64_t sectors_loaded = 0;
    uint64_t sectors_stored = 0;
};

// The shadow of one contiguous range. Its cells are as wide as the narrowest access so far.
class ShadowMemory {
  public:
    // `base` matters only modulo 32, for the sectors.
    void reset(size_t bytes, unsigned cell_bytes, uintptr_t base);

    // Forgets everything, but stays as large. Costs as much as was touched.
    void forget();

    // Nobody may write here, so nothing can race: only the footprint is kept.
    void set_read_only(bool is_read_only) { is_read_only_ = is_read_only; }

    // Records an access and judges it; `is_initialised` says that the caller filled the memory.
    Verdict access(size_t offset, size_t bytes, Access kind, Site site, bool is_initialised);

    ShadowFootprint footprint(size_t begin, size_t end) const;
    size_t bytes_touched() const;

  private:
    // The threads that read a cell since its last write, where they are more than one.
    struct Readers {
        uint64_t block;
        unsigned warp;
        uint32_t latest;                // in `block`
        uint32_t lane_time[kWarpSize];  // 0: this lane has not
        AccessRecord last;              // of the warp
        AccessRecord elsewhere;         // of another warp or block, if any
    };
    struct Cell {
        Stamp write;
        uint64_t read = 0;  // a stamp, or kManyReaders and an index
        Site write_site = 0;
        Site read_site = 0;
        uint8_t flags = 0;
    };
    static constexpr uint8_t kLoaded = 1, kStored = 2, kLastWriteWasAtomic = 4;
    static constexpr uint64_t kTimeMask = (uint64_t{1} << Stamp::kTimeBits) - 1;

    static bool is_many(uint64_t read) { return read != 0 && (read & kTimeMask) == 0; }
    Readers& many(uint64_t read) { return readers_[(read >> Stamp::kTimeBits) - 1]; }
    uint64_t add_readers(const Readers& readers);

    void narrow_cells(unsigned cell_bytes);
    bool conflicting_reader(Cell& cell, AccessRecord* earlier);
    void add_reader(Cell& cell, Stamp now, Site site);

    std::vector<Cell> cells_;
    std::vector<uint8_t> loaded_;  // instead of cells, where nobody may write
    std::deque<Readers> readers_;
    size_t bytes_ = 0;
    unsigned shift_ = 2;
    uintptr_t base_ = 0;
    size_t first_touched_ = 0, last_touched_ = 0;
    bool is_read_only_ = false;
};

}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_EMULATOR_SHADOW_MEMORY_H_
