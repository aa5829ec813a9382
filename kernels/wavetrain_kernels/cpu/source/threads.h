// SPDX-License-Identifier: Apache-2.0
// Dividing work over torch's OpenMP threads. Every kernel opens one parallel region and keeps its threads in step itself.
#pragma once

#include <omp.h>
#include <stdint.h>

namespace wavetrain {

struct Range {
    int64_t begin, end;
};

// This thread's share of `count` units: contiguous, so that each thread streams its own part of memory.
inline Range share(int64_t count) {
    int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    return {count * thread / threads, count * (thread + 1) / threads};
}

// Whether a kernel that touches this many elements, and little more than touches them, is worth a second thread: below, waking one
// takes longer than the work.
inline bool is_worth_threads(int64_t num_elements) { return num_elements >= 65536; }

}  // namespace wavetrain
