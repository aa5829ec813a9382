// SPDX-License-Identifier: Apache-2.0
// How large arrays lie in memory.
#pragma once

#include <stdint.h>
#include <sys/mman.h>

namespace wavetrain {

// Asks for 2 MiB pages under what of [start, start + num_bytes) fills whole ones, before it is written: streaming
// weights then misses no translation. Advice only: where the system declines, everything works as before.
inline void use_huge_pages(void* start, int64_t num_bytes) {
    constexpr uintptr_t kPage = 2 << 20;
    uintptr_t begin = ((uintptr_t)start + kPage - 1) & ~(kPage - 1), end = ((uintptr_t)start + (uintptr_t)num_bytes) & ~(kPage - 1);
    if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
}

}  // namespace wavetrain
