# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints: what config.json says of them, and from their tensors to weights. One method a file."""
