# SPDX-License-Identifier: Apache-2.0
"""Limits of a key: requests and tokens per minute, in memory or on Redis, and streams at once."""
