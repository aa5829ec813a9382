# SPDX-License-Identifier: Apache-2.0
"""GGUF files: what one says of model, tokenizer and tensors, in the words of a Hugging Face checkpoint. No torch."""
