// SPDX-License-Identifier: Apache-2.0
// What a thread keeps from call to call.
#pragma once

#include <stdint.h>
#include <stdlib.h>

namespace wavetrain {

// Memory of one thread, kept from call to call: asked of the system each time, it would cost a fault per page.
class ThreadMemory {
  public:
    ~ThreadMemory() { free(start_); }

    // Aligned to 64 bytes; what it held is gone. No kernel can go on without: the process ends where there is none.
    void* reserve(int64_t num_bytes) {
        if (num_bytes > num_bytes_) {
            free(start_);
            num_bytes_ = (num_bytes + num_bytes / 2 + 63) & ~(int64_t)63;
            start_ = aligned_alloc(64, (size_t)num_bytes_);
            if (!start_) abort();
        }
        return start_;
    }

  private:
    void* start_ = nullptr;
    int64_t num_bytes_ = 0;
};

inline ThreadMemory& thread_memory() {
    thread_local ThreadMemory memory;
    return memory;
}

}  // namespace wavetrain
