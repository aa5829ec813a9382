# SPDX-License-Identifier: Apache-2.0
"""Fast kernels for CPUs: C++ with intrinsics, compiled for this machine at first use. No validation, no allocation."""
