# SPDX-License-Identifier: Apache-2.0
"""The gateway: OpenAI's API over HTTP, SSE and WebSocket in front of Wavetrain's Triton models."""
