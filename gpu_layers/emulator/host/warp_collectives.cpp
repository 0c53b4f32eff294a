// Operations that the lanes of a warp perform together.
#include <cstring>

#include "checker.h"
#include "execution.h"
#include "failure.h"

namespace gpu_layers_emulator {
namespace {

const char* name_of(WarpOperation operation) {
    switch (operation) {
        case WarpOperation::kSync:
            return "__syncwarp";
        case WarpOperation::kShuffle:
            return "__shfl_sync";
        case WarpOperation::kShuffleUp:
            return "__shfl_up_sync";
        case WarpOperation::kShuffleDown:
            return "__shfl_down_sync";
        case WarpOperation::kShuffleXor:
            return "__shfl_xor_sync";
        case WarpOperation::kBallot:
            return "__ballot_sync";
        case WarpOperation::kAll:
            return "__all_sync";
        case WarpOperation::kAny:
            return "__any_sync";
        case WarpOperation::kMatchAny:
            return "__match_any_sync";
        default:
            return "__reduce_*_sync";
    }
}

bool is_shuffle(WarpOperation operation) {
    return operation >= WarpOperation::kShuffle && operation <= WarpOperation::kShuffleXor;
}

Thread& lane_thread(Block& block, unsigned warp, unsigned lane) {
    return block.threads[warp * kWarpSize + lane];
}

bool same_operation(const Thread& a, const Thread& b) {
    return a.request.operation == b.request.operation && a.request.mask == b.request.mask &&
           a.request.width == b.request.width && a.where.line == b.where.line &&
           (a.where.file == b.where.file || strcmp(a.where.file, b.where.file) == 0);
}

std::string describe(const Block& block, const Thread& thread) {
    return format(
        "%s (lane %u) in %s with mask 0x%08x%s at %s", thread_name(block, thread).c_str(), thread.lane(),
        name_of(thread.request.operation), thread.request.mask,
        is_shuffle(thread.request.operation) ? format(" and width %d", thread.request.width).c_str() : "",
        place(thread.where).c_str());
}

// The lane whose value a shuffle hands to `lane`; its own where the source leaves the segment.
unsigned source_lane(const WarpRequest& request, unsigned lane) {
    const unsigned width = static_cast<unsigned>(request.width);
    const unsigned segment = lane & ~(width - 1);
    switch (request.operation) {
        case WarpOperation::kShuffle:
            return segment + (request.operand & (width - 1));
        case WarpOperation::kShuffleUp:
            return lane - segment >= request.operand ? lane - request.operand : lane;
        case WarpOperation::kShuffleDown:
            return request.operand < width - (lane - segment) ? lane + request.operand : lane;
        default: {  // xor: a lower segment may be read, a higher one not
            const unsigned source = lane ^ request.operand;
            return source < segment + width ? source : lane;
        }
    }
}

void shuffle(Block& block, unsigned warp, unsigned lanes) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        if (!(lanes >> lane & 1u)) continue;
        Thread& thread = lane_thread(block, warp, lane);
        const unsigned source = source_lane(thread.request, lane);
        if (source >= kWarpSize || !(lanes >> source & 1u)) {
            const bool in_mask = source < kWarpSize && thread.request.mask >> source & 1u;
            fail(kWarpError,
                 format("%s reads lane %u, which %s: its value is undefined", describe(block, thread).c_str(),
                        source, in_mask ? "has returned (or is beyond the block)" : "is not in the mask"));
        }
        thread.request.result = lane_thread(block, warp, source).request.value;
    }
}

uint64_t reduce(WarpOperation operation, uint64_t a, uint64_t b) {
    const auto left = static_cast<uint32_t>(a), right = static_cast<uint32_t>(b);
    const auto signed_left = static_cast<int32_t>(left), signed_right = static_cast<int32_t>(right);
    switch (operation) {
        case WarpOperation::kReduceAdd:
            return static_cast<uint32_t>(left + right);
        case WarpOperation::kReduceAnd:
            return left & right;
        case WarpOperation::kReduceOr:
            return left | right;
        case WarpOperation::kReduceXor:
            return left ^ right;
        case WarpOperation::kReduceMinSigned:
            return signed_left < signed_right ? left : right;
        case WarpOperation::kReduceMaxSigned:
            return signed_left > signed_right ? left : right;
        case WarpOperation::kReduceMinUnsigned:
            return left < right ? left : right;
        default:
            return left > right ? left : right;
    }
}

void vote_or_reduce(Block& block, unsigned warp, unsigned lanes, WarpOperation operation) {
    unsigned ballot = 0;
    uint64_t reduced = 0;
    bool any = false;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        if (!(lanes >> lane & 1u)) continue;
        const uint64_t value = lane_thread(block, warp, lane).request.value;
        if (value != 0) ballot |= 1u << lane;
        reduced = any ? reduce(operation, reduced, value) : value;
        any = true;
    }
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        if (!(lanes >> lane & 1u)) continue;
        WarpRequest& request = lane_thread(block, warp, lane).request;
        switch (operation) {
            case WarpOperation::kBallot:
                request.result = ballot;
                break;
            case WarpOperation::kAll:
                request.result = ballot == lanes;
                break;
            case WarpOperation::kAny:
                request.result = ballot != 0;
                break;
            case WarpOperation::kMatchAny:
                request.result = 0;
                for (unsigned other = 0; other < kWarpSize; ++other) {
                    if ((lanes >> other & 1u) &&
                        lane_thread(block, warp, other).request.value == request.value) {
                        request.result |= 1u << other;
                    }
                }
                break;
            default:
                request.result = reduced;
        }
    }
}

// All of `lanes` wait in the same operation: does it for them. Those other than the running thread become
// ready.
void complete(Block& block, unsigned warp, unsigned lanes, const Thread& any_of_them) {
    const WarpOperation operation = any_of_them.request.operation;
    if (is_shuffle(operation)) {
        shuffle(block, warp, lanes);
    } else if (operation != WarpOperation::kSync) {
        vote_or_reduce(block, warp, lanes, operation);
    }
    block.warps[warp].waiting &= ~lanes;
    block.warps[warp].alike &= ~lanes;
    checker::warp_synchronised(block, warp, lanes, operation == WarpOperation::kSync);
    const bool descending = !block.order.empty() && block.order.front() != 0;
    for (unsigned i = 0; i < kWarpSize; ++i) {
        const unsigned lane = descending ? kWarpSize - 1 - i : i;
        if (!(lanes >> lane & 1u)) continue;
        Thread& thread = lane_thread(block, warp, lane);
        if (thread.state == State::kAtWarpOperation) make_ready(block, thread);
    }
}

// Two lanes that wait for each other in different operations will do so forever.
void refuse_mismatch(const Block& block, const Thread& self, const Thread& other) {
    if (!(self.request.mask >> other.lane() & 1u) || !(other.request.mask >> self.lane() & 1u)) return;
    if (same_operation(self, other)) return;
    fail(kWarpError, format("lanes of one mask are in different warp operations: %s, but %s",
                            describe(block, self).c_str(), describe(block, other).c_str()));
}

// Notes whether the thread is in the operation of those that are alike: lanes of a warp nearly always are,
// and to compare each with each is most of what a shuffle costs.
void join_alike(Block& block, const Thread& thread) {
    Warp& warp = block.warps[thread.warp()];
    if (warp.alike == 0 ||
        same_operation(thread,
                       lane_thread(block, thread.warp(), static_cast<unsigned>(__builtin_ctz(warp.alike))))) {
        warp.alike |= 1u << thread.lane();
    }
}

// The lanes that may be in another operation than the thread.
unsigned perhaps_unlike(const Warp& warp, const Thread& thread) {
    return warp.alike >> thread.lane() & 1u ? ~warp.alike : ~0u;
}

// Whether every lane of the thread's mask (that has not returned) waits in the thread's operation.
bool is_complete(Block& block, const Thread& thread) {
    const Warp& warp = block.warps[thread.warp()];
    const unsigned expected = thread.request.mask & warp.alive;
    if ((warp.waiting & expected) != expected) return false;
    for (unsigned lanes = expected & perhaps_unlike(warp, thread); lanes != 0; lanes &= lanes - 1) {
        const unsigned lane = static_cast<unsigned>(__builtin_ctz(lanes));
        if (!same_operation(thread, lane_thread(block, thread.warp(), lane))) return false;
    }
    return true;
}

}  // namespace

uint64_t warp_collective(WarpOperation operation, unsigned mask, uint64_t value, unsigned operand, int width,
                         SourceLine where) {
    Block& block = *active_block;
    Thread& self = *running_thread;
    const unsigned warp_index = self.warp();
    Warp& warp = block.warps[warp_index];
    self.where = where;
    self.request = {operation, mask, operand, width, value, 0};
    if (!(mask >> self.lane() & 1u)) {
        fail(kWarpError, describe(block, self) + ": the calling lane is not in its mask");
    }
    if (width < 1 || width > static_cast<int>(kWarpSize) || (width & (width - 1)) != 0) {
        fail(kWarpError, describe(block, self) + ": the width must be a power of two up to 32");
    }
    const unsigned expected = mask & warp.alive;
    join_alike(block, self);
    for (unsigned lanes = warp.waiting & expected & perhaps_unlike(warp, self); lanes != 0;
         lanes &= lanes - 1) {
        refuse_mismatch(block, self,
                        lane_thread(block, warp_index, static_cast<unsigned>(__builtin_ctz(lanes))));
    }
    warp.waiting |= 1u << self.lane();
    if (is_complete(block, self)) {
        complete(block, warp_index, expected, self);
        return self.request.result;
    }
    suspend(State::kAtWarpOperation);
    return self.request.result;
}

void reconsider_warp(Block& block, unsigned warp_index) {
    Warp& warp = block.warps[warp_index];
    for (unsigned lanes = warp.waiting; lanes != 0; lanes &= lanes - 1) {
        const unsigned lane = static_cast<unsigned>(__builtin_ctz(lanes));
        if (!(warp.waiting >> lane & 1u)) continue;
        const Thread& thread = lane_thread(block, warp_index, lane);
        if (is_complete(block, thread)) complete(block, warp_index, thread.request.mask & warp.alive, thread);
    }
}

}  // namespace gpu_layers_emulator
