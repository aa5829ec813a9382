# SPDX-License-Identifier: Apache-2.0
"""A plugin for pytest that has the tests of the engine run where msgspec is not installed; being imported is all."""

from __future__ import annotations

from gpu import msgspec_stand_in

msgspec_stand_in.install_where_missing()
