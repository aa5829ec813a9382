# SPDX-License-Identifier: Apache-2.0
"""Which replica of which model answers a request, and what becomes of it when the replica fails."""
