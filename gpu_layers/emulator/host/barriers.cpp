// Barriers of a block and of a cooperative grid.
#include <cstring>

#include "checker.h"
#include "execution.h"
#include "failure.h"

namespace gpu_layers_emulator {
namespace {

bool same_line(SourceLine a, SourceLine b) {
    return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

// The running thread enters a barrier of its block; false if it is the last one to.
void enter(const char* what, unsigned& waiting, unsigned& waiting_elsewhere, SourceLine where) {
    Block& block = *active_block;
    Thread& self = *running_thread;
    self.where = where;
    if (block.exited > 0) {
        fail(kBarrierError,
             format("%s waits in the %s barrier at %s, but %s has returned: every thread of the block "
                    "must reach it",
                    thread_name(block, self).c_str(), what, place(where).c_str(),
                    thread_name(block, *block.last_exited).c_str()));
    }
    if (waiting == 0 && waiting_elsewhere == 0) block.first_at_barrier = &self;
    const Thread& first = *block.first_at_barrier;
    if (waiting_elsewhere > 0 || !same_line(first.where, where)) {
        fail(kBarrierError, format("divergent barrier: %s is at %s, while %s waits in another at %s",
                                   thread_name(block, self).c_str(), place(where).c_str(),
                                   thread_name(block, first).c_str(), place(first.where).c_str()));
    }
    ++waiting;
}

}  // namespace

int block_barrier(BlockVote vote, int predicate, SourceLine where) {
    Block& block = *active_block;
    enter("block", block.at_block_barrier, block.at_grid_barrier, where);
    if (predicate) ++block.vote_count;
    if (block.at_block_barrier < block.threads.size()) {
        suspend(State::kAtBlockBarrier);
        return block.vote_result;
    }
    const int all = static_cast<int>(block.threads.size());
    block.vote_result = vote == BlockVote::kCount ? block.vote_count
                        : vote == BlockVote::kAnd ? block.vote_count == all
                                                  : block.vote_count > 0;
    block.vote_count = 0;
    block.at_block_barrier = 0;
    checker::block_synchronised(block);
    for (unsigned t : block.order) {
        if (&block.threads[t] != running_thread) make_ready(block, block.threads[t]);
    }
    return block.vote_result;
}

void grid_barrier(SourceLine where) {
    if (!launch_is_cooperative) {
        fail(kBarrierError, format("%s calls grid.sync() at %s, but the launch is not cooperative",
                                   running_thread_name().c_str(), place(where).c_str()));
    }
    Block& block = *active_block;
    enter("grid", block.at_grid_barrier, block.at_block_barrier, where);
    suspend(State::kAtGridBarrier);
}

bool is_cooperative_launch() { return launch_is_cooperative; }

void device_trap(const char* what, SourceLine where) {
    fail(kTrap, format("%s called %s at %s", running_thread_name().c_str(), what, place(where).c_str()));
}

}  // namespace gpu_layers_emulator
