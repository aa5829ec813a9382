# SPDX-License-Identifier: Apache-2.0
"""From a step's logits to its tokens: what each request asked for, as tensors, and the sampler that obeys it."""
