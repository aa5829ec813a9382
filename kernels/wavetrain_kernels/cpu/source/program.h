// SPDX-License-Identifier: Apache-2.0
// A model's forward pass as one list of calls, recorded once and run at every step: no Python between kernels, and one
// parallel region for all of them. What a CUDA graph is to a GPU; but steps of any size up to the recorded one can be run.
//
// An operation is a struct with
//     bind(step, capacity)   puts this step's sizes and inputs in the place of the recorded ones
//     num_tokens()           the tokens it was recorded for
//     is_large()             whether one call of it alone is worth waking the other threads
// and a function run(operation), which all threads of a team call together. It may end before the other threads have.
//
// A step has two stages: all its tokens, and from the first Selection on those whose outcome somebody wants. Of the last
// layer of a prompt that leaves the keys and values.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <vector>

#include "tile.h"

namespace wavetrain {

struct Selection;

// What changes from step to step, for one of its stages; token_ids of the second are indices of the first one's tokens.
// Declared alike in wavetrain_kernels/cpu/program.py.
struct Step {
    int64_t num_tokens, num_rows, table_stride;
    const int64_t *token_ids, *positions, *slots;                    // [num_tokens]
    const int32_t *query_start_loc, *seq_lens, *block_tables;        // [num_rows + 1], [num_rows], [num_rows, table_stride]
    char* workspace;
};

class Program {
  public:
    explicit Program(int64_t capacity) : capacity_(capacity) {}

    template <typename Operation>
    void append(const Operation& operation) {
        is_sound_ = is_sound_ && operation.num_tokens() == capacity_;
        if (std::is_same_v<Operation, Selection>) stage_ = 1;
        size_t offset = memory_.size();
        memory_.resize(offset + sizeof operation);
        memcpy(memory_.data() + offset, &operation, sizeof operation);
        calls_.push_back({&call<Operation>, offset, stage_});
    }

    // Whether every recorded operation was one over the tokens of the step.
    bool is_sound() const { return is_sound_; }

    void replay(const Step* stages) const {
#pragma omp parallel
        {
            TileScope tiles;
            for (const Call& one : calls_) {
                if (stages[one.stage].num_tokens == 0) continue;   // a chunk of a prompt that nothing is sampled from
                one.function(memory_.data() + one.offset, stages[one.stage], capacity_);
#pragma omp barrier
            }
        }
    }

  private:
    struct Call {
        void (*function)(const char* operation, const Step& step, int64_t capacity);
        size_t offset;
        int stage;
    };

    template <typename Operation>
    static void call(const char* recorded, const Step& step, int64_t capacity) {
        Operation operation;
        memcpy(&operation, recorded, sizeof operation);
        operation.bind(step, capacity);
        run(operation);
    }

    std::vector<char> memory_;
    std::vector<Call> calls_;
    int64_t capacity_;
    int stage_ = 0;
    bool is_sound_ = true;
};

// The program that this thread records, if it does.
inline Program*& recording() {
    static thread_local Program* program = nullptr;
    return program;
}

// Runs an operation now, or has it recorded.
template <typename Operation>
inline void submit(const Operation& operation) {
    if (Program* program = recording()) {
        program->append(operation);
        return;
    }
#pragma omp parallel if (operation.is_large())
    {
        TileScope tiles;
        run(operation);
    }
}

}  // namespace wavetrain
