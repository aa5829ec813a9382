// SPDX-License-Identifier: Apache-2.0
// The library's functions, as wavetrain_kernels/cpu/library.py declares them. One translation unit: it compiles in a second.
#include <sys/syscall.h>
#include <unistd.h>

#include "linear.h"

using namespace wavetrain;

extern "C" {

// Asks the kernel for the AMX registers of this process; false where it refuses them.
int wavetrain_enable(void) {
#if WAVETRAIN_AMX
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return 1;
#endif
}

void wavetrain_pack_weight(bf16* packed, const bf16* weight, int64_t stride, int64_t n, int64_t k, int is_gated) {
    pack_weight(packed, weight, stride, n, k, is_gated);
}

void wavetrain_unpack_rows(bf16* out, const bf16* packed, const int64_t* rows, int64_t num_rows, int64_t k) {
    unpack_rows(out, packed, rows, num_rows, k);
}

void wavetrain_linear(void* out, const bf16* x, const bf16* packed, const bf16* bias, bf16* workspace, int64_t out_stride,
                      int64_t x_stride, int64_t m, int64_t k, int64_t n, int activation, int is_float_out) {
    run_linear({out, x, packed, bias, workspace, out_stride, x_stride, m, k, n, (Activation)activation, is_float_out != 0});
}

}  // extern "C"
