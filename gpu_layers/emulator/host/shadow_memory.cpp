#include "checker.h"

#if GPU_LAYERS_CHECKED

#include <algorithm>

#include "shadow_memory.h"

namespace gpu_layers_emulator {
namespace {

constexpr size_t kSectorBytes = 32;

unsigned log2_of(unsigned power_of_two) { return static_cast<unsigned>(__builtin_ctz(power_of_two)); }

}  // namespace

void ShadowMemory::reset(size_t bytes, unsigned cell_bytes, uintptr_t base) {
    bytes_ = bytes;
    base_ = base;
    shift_ = log2_of(cell_bytes);
    is_read_only_ = false;
    cells_.clear();
    loaded_.clear();
    readers_.clear();
    first_touched_ = ~size_t{0};
    last_touched_ = 0;
}

void ShadowMemory::forget() {
    if (first_touched_ <= last_touched_) {
        std::fill(cells_.begin() + static_cast<ptrdiff_t>(first_touched_),
                  cells_.begin() + static_cast<ptrdiff_t>(last_touched_) + 1, Cell());
    }
    readers_.clear();
    first_touched_ = ~size_t{0};
    last_touched_ = 0;
}

uint64_t ShadowMemory::add_readers(const Readers& readers) {
    readers_.push_back(readers);
    return static_cast<uint64_t>(readers_.size()) << Stamp::kTimeBits;
}

void ShadowMemory::narrow_cells(unsigned cell_bytes) {
    const unsigned shift = log2_of(cell_bytes);
    const size_t copies = size_t{1} << (shift_ - shift);
    std::vector<Cell> narrow;
    narrow.reserve(cells_.size() * copies);
    for (const Cell& cell : cells_) {
        for (size_t i = 0; i < copies; ++i) {
            narrow.push_back(cell);
            if (i > 0 && is_many(cell.read)) narrow.back().read = add_readers(Readers(many(cell.read)));
        }
    }
    cells_ = std::move(narrow);
    std::vector<uint8_t> loaded(loaded_.size() * copies);
    for (size_t i = 0; i < loaded.size(); ++i) loaded[i] = loaded_[i / copies];
    loaded_ = std::move(loaded);
    if (first_touched_ <= last_touched_) {
        first_touched_ *= copies;
        last_touched_ = last_touched_ * copies + copies - 1;
    }
    shift_ = shift;
}

// Whether somebody read the cell since its last write, and is not ordered before the running thread.
bool ShadowMemory::conflicting_reader(Cell& cell, AccessRecord* earlier) {
    if (cell.read == 0) return false;
    if (!is_many(cell.read)) {
        *earlier = {{cell.read}, cell.read_site};
        return !clocks::is_ordered_before_now(earlier->stamp);
    }
    const Readers& readers = many(cell.read);
    for (const AccessRecord& reader : {readers.elsewhere, readers.last}) {
        if (reader.stamp.bits != 0 && !clocks::is_ordered_before_now(reader.stamp)) {
            *earlier = reader;
            return true;
        }
    }
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        if (readers.lane_time[lane] == 0) continue;
        const Stamp stamp =
            Stamp::of(readers.block, readers.warp * kWarpSize + lane, readers.lane_time[lane]);
        if (!clocks::is_ordered_before_now(stamp)) {
            *earlier = {stamp, readers.last.site};
            return true;
        }
    }
    return false;
}

void ShadowMemory::add_reader(Cell& cell, Stamp now, Site site) {
    if (cell.read == now.bits) return;
    if (cell.read == 0 || (!is_many(cell.read) && clocks::is_ordered_before_now({cell.read}))) {
        cell.read = now.bits;
        cell.read_site = site;
        return;
    }
    if (!is_many(cell.read)) {
        const Stamp first{cell.read};
        Readers readers = {};
        readers.block = first.block();
        readers.warp = first.thread() / kWarpSize;
        readers.latest = first.time();
        readers.lane_time[first.thread() % kWarpSize] = first.time();
        readers.last = {first, cell.read_site};
        cell.read = add_readers(readers);
    }
    Readers& readers = many(cell.read);
    if (clocks::is_behind_barrier(readers.block, readers.latest) &&
        (readers.elsewhere.stamp.bits == 0 ||
         clocks::is_behind_barrier(readers.elsewhere.stamp.block(), readers.elsewhere.stamp.time()))) {
        // A barrier lies between: the readers before it no longer matter.
        readers = {};
        readers.block = now.block();
        readers.warp = now.thread() / kWarpSize;
    }
    if (readers.block == now.block() && readers.warp == now.thread() / kWarpSize) {
        readers.lane_time[now.thread() % kWarpSize] = now.time();
        readers.latest = std::max(readers.latest, now.time());
        readers.last = {now, site};
    } else if (readers.elsewhere.stamp.bits == 0 || readers.elsewhere.stamp.block() == readers.block) {
        readers.elsewhere = {now, site};
    }
}

Verdict ShadowMemory::access(size_t offset, size_t bytes, Access kind, Site site, bool is_initialised) {
    Verdict verdict;
    // Cells must not be wider than the access, nor may it start or end inside of one.
    while (((offset | bytes) & ((size_t{1} << shift_) - 1)) != 0 && offset + bytes != bytes_) {
        narrow_cells(1u << (shift_ - 1));
    }
    while ((offset & ((size_t{1} << shift_) - 1)) != 0) narrow_cells(1u << (shift_ - 1));
    const size_t first = offset >> shift_;
    const size_t last = (offset + bytes - 1) >> shift_;
    const size_t cell_count = (bytes_ + (size_t{1} << shift_) - 1) >> shift_;
    if (is_read_only_) {
        if (loaded_.empty()) loaded_.resize(cell_count);
        for (size_t i = first; i <= last; ++i) loaded_[i] = 1;
        return verdict;
    }
    if (cells_.empty()) cells_.resize(cell_count);
    first_touched_ = std::min(first_touched_, first);
    last_touched_ = std::max(last_touched_, last);
    const Stamp now = clocks::now();
    for (size_t i = first; i <= last; ++i) {
        Cell& cell = cells_[i];
        if (kind != Access::kStore && !is_initialised && !(cell.flags & kStored) &&
            !verdict.is_uninitialised) {
            verdict.is_uninitialised = true;
            verdict.offset = i << shift_;
        }
        const bool both_atomic = kind == Access::kAtomic && (cell.flags & kLastWriteWasAtomic);
        if (cell.write.bits != 0 && !(cell.write == now) && !both_atomic &&
            !clocks::is_ordered_before_now(cell.write)) {
            verdict.is_race = verdict.earlier_is_write = true;
            verdict.earlier = {cell.write, cell.write_site};
            verdict.offset = i << shift_;
            return verdict;
        }
        if (kind == Access::kLoad) {
            cell.flags |= kLoaded;
            add_reader(cell, now, site);
            continue;
        }
        if (conflicting_reader(cell, &verdict.earlier)) {
            verdict.is_race = true;
            verdict.offset = i << shift_;
            return verdict;
        }
        cell.write = now;
        cell.write_site = site;
        cell.read = 0;
        cell.flags = static_cast<uint8_t>((cell.flags & (kLoaded | kStored)) | kStored |
                                          (kind == Access::kAtomic ? kLoaded | kLastWriteWasAtomic : 0));
    }
    return verdict;
}

ShadowFootprint ShadowMemory::footprint(size_t begin, size_t end) const {
    ShadowFootprint result;
    const size_t width = size_t{1} << shift_;
    uintptr_t last_loaded = ~uintptr_t{0}, last_stored = ~uintptr_t{0};
    const auto count = [](bool counts, uintptr_t sector, uintptr_t& last, size_t bytes, uint64_t& total,
                          uint64_t& sectors) {
        if (!counts) return;
        total += bytes;
        if (sector != last) ++sectors;
        last = sector;
    };
    for (size_t i = begin >> shift_; i << shift_ < end; ++i) {
        const bool loaded = is_read_only_ ? i < loaded_.size() && loaded_[i] != 0
                                          : i < cells_.size() && (cells_[i].flags & kLoaded) != 0;
        const bool stored = !is_read_only_ && i < cells_.size() && (cells_[i].flags & kStored);
        const size_t bytes = std::min(width, end - (i << shift_));
        const uintptr_t sector = (base_ + (i << shift_)) / kSectorBytes;
        count(loaded, sector, last_loaded, bytes, result.bytes_loaded, result.sectors_loaded);
        count(stored, sector, last_stored, bytes, result.bytes_stored, result.sectors_stored);
    }
    return result;
}

size_t ShadowMemory::bytes_touched() const {
    size_t cells = 0;
    for (const Cell& cell : cells_) cells += (cell.flags & (kLoaded | kStored)) != 0;
    return cells << shift_;
}

}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_CHECKED
