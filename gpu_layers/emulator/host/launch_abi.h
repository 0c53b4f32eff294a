// The structures that cross between Python (abi.py, the same layout) and a compiled module.
#ifndef GPU_LAYERS_EMULATOR_LAUNCH_ABI_H_
#define GPU_LAYERS_EMULATOR_LAUNCH_ABI_H_

#include <cstdint>

namespace gpu_layers_emulator {

struct ParameterRecord {
    const char* pretty_function;  // the compiler's text, with the type's spelling in it
    uint64_t size;                // of the value; of the pointee for a pointer
    int32_t kind;                 // one of ParameterKind: of the value or the pointee
    int32_t is_pointer;
    int32_t is_const;  // the pointee, for a pointer
};

enum ParameterKind : int32_t {
    kKindOther = 0,  // a struct or a vector type
    kKindFloat = 1,
    kKindHalf = 2,
    kKindBfloat16 = 3,
    kKindSigned = 4,
    kKindUnsigned = 5,
    kKindBool = 6,
    kKindVoid = 7,
};

struct KernelRecord {
    int32_t index;  // in the list of names the module was built for
    int32_t parameter_count;
    const ParameterRecord* parameters;
    void (*invoke)(void** values);
    const KernelRecord* next;
};

enum Schedule : int32_t { kAscending = 0, kDescending = 1, kRandom = 2 };

// One caller's array in checked mode; arrays that share memory share a `buffer`.
struct ArgumentRecord {
    uint64_t address;
    uint64_t bytes;
    int32_t parameter;  // its position in the kernel's parameter list
    int32_t buffer;
    int32_t is_const;
    int32_t is_initialised;
    uint32_t element_size;
    uint32_t reserved;
};

// A static shared array of the module, as an offset into its segment.
struct SharedVariableRecord {
    uint64_t offset;
    uint64_t bytes;
    int32_t index;
    int32_t reserved;
};

struct LaunchRequest {
    int32_t kernel;
    int32_t schedule;
    int32_t shuffle_blocks;
    int32_t cooperative;
    uint64_t seed;
    uint32_t grid[3];
    uint32_t block[3];
    uint64_t shared_bytes;
    void** values;
    // Checked mode only.
    const ArgumentRecord* arguments;
    uint64_t argument_count;
    const SharedVariableRecord* shared_variables;
    uint64_t shared_variable_count;
};

// What one source instruction did to one argument (or to shared memory), over a whole launch.
struct TrafficRecord {
    uint64_t program_counter;
    int32_t parameter;  // position of the argument; kShared for shared memory
    int32_t access;     // 0 load, 1 store, 2 atomic
    uint64_t width;     // bytes each thread moves
    uint64_t accesses;  // one for each thread
    uint64_t bytes;
    uint64_t requests;  // one for each warp
    uint64_t sectors;   // of 32 bytes
    uint64_t lines;     // of 128 bytes
    uint64_t wavefronts;
    uint64_t ideal_wavefronts;
};
constexpr int32_t kShared = -1;

// Distinct bytes of one argument that a launch touched.
struct FootprintRecord {
    int32_t parameter;
    int32_t reserved;
    uint64_t bytes_loaded;
    uint64_t bytes_stored;
    uint64_t sectors_loaded;
    uint64_t sectors_stored;
};

struct LaunchResult {
    int32_t status;  // 0, or an ErrorKind
    int32_t reserved;
    const char* message;
    uint64_t threads_run;
    uint64_t shared_bytes_touched;  // static shared memory; checked mode only
    const TrafficRecord* traffic;
    uint64_t traffic_count;
    const FootprintRecord* footprints;
    uint64_t footprint_count;
};

enum ErrorKind : int32_t {
    kOk = 0,
    kBarrierError = 1,
    kWarpError = 2,
    kDeadlock = 3,
    kCrash = 4,
    kTrap = 5,
    kOutOfBounds = 6,
    kMisaligned = 7,
    kReadOnly = 8,
    kUninitialised = 9,
    kRace = 10,
    kLimit = 11,
};

}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_EMULATOR_LAUNCH_ABI_H_
