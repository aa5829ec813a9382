# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch, clear before fast: the oracle of the kernel tests and the fallback on every device."""
