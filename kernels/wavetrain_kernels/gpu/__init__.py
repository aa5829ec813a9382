# SPDX-License-Identifier: Apache-2.0
"""Kernels in the Triton language for NVIDIA GPUs. Importing a module of this package needs `triton`."""
