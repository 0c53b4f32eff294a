// The shared memory of blocks: one segment of static arrays, and a dynamic part for each resident block.
#ifndef GPU_LAYERS_EMULATOR_SHARED_MEMORY_H_
#define GPU_LAYERS_EMULATOR_SHARED_MEMORY_H_

#include <cstddef>
#include <vector>

namespace gpu_layers_emulator {

struct MemoryRange {
    unsigned char* begin = nullptr;
    size_t bytes = 0;
    bool contains(const void* address) const {
        return static_cast<size_t>(static_cast<const unsigned char*>(address) - begin) < bytes;
    }
};

// Every static shared array of the module, as the calling (operating system) thread sees it.
MemoryRange static_shared_segment();

// What a block's shared memory holds before the block writes to it: NaN in every floating-point type.
constexpr int kPoison = 0xff;

// The dynamic shared memory of one resident block, exactly as large as asked for.
class DynamicSharedMemory {
  public:
    DynamicSharedMemory() = default;
    DynamicSharedMemory(const DynamicSharedMemory&) = delete;
    DynamicSharedMemory& operator=(const DynamicSharedMemory&) = delete;
    ~DynamicSharedMemory();
    void resize(size_t bytes);
    MemoryRange range() const { return range_; }

  private:
    MemoryRange range_;
    void* allocation_ = nullptr;
};

}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_EMULATOR_SHARED_MEMORY_H_
