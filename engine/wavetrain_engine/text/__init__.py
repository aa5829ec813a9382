# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: tokenizer, detokenizer, stop strings, chat templates. Never imports torch."""
