# SPDX-License-Identifier: Apache-2.0
"""Makes quantized checkpoints of unquantized ones, layer by layer. What reads them is `wavetrain_engine.weights`."""
