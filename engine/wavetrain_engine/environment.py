# SPDX-License-Identifier: Apache-2.0
"""The environment variables Wavetrain listens to, read in this one place.

Everything else is a flag or a key of engine.toml; a test looks for other readers.

    WAVETRAIN_LOG_LEVEL   debug, info, warning or error   (debug also shows stack traces of user errors)
    WAVETRAIN_CACHE_DIR   built repositories, logs, compiled kernels; default: wavetrain/ in the user's cache folder
    WAVETRAIN_KERNELS     auto, gpu, cpu or reference
    WAVETRAIN_API_KEYS    the gateway's keys, where they are in no file; and WAVETRAIN_ADMIN_KEY, its admin API's:
                          secrets are kept out of command lines, which everybody on a machine can read
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wavetrain_engine.errors import ConfigError

_LOG_LEVELS = ("debug", "info", "warning", "error")
_KERNELS = ("auto", "gpu", "cpu", "reference")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the environment asks for. Values are checked once, here."""

    log_level: str
    cache_dir: Path
    kernels: str
    api_keys: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)

    @property
    def kernel_cache_dir(self) -> Path:
        """Where compiled kernels are kept."""
        return self.cache_dir / "kernels"

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None) -> Environment:
        """Reads the process's environment, or `variables` in its place. Creates nothing.

        Raises:
            ConfigError: a variable holds none of its values.
        """
        values = os.environ if variables is None else variables
        return cls(
            log_level=_one_of(values, "WAVETRAIN_LOG_LEVEL", _LOG_LEVELS, "info"),
            cache_dir=_cache_dir(values),
            kernels=_one_of(values, "WAVETRAIN_KERNELS", _KERNELS, "auto"),
            api_keys=values.get("WAVETRAIN_API_KEYS") or None,
            admin_key=values.get("WAVETRAIN_ADMIN_KEY") or None,
        )


def bound_waiting_threads() -> None:
    """Lets OpenMP's threads spin for a moment and then sleep while they wait, unless the environment says otherwise.

    To be called before torch is imported, as OpenMP reads its variables when it is loaded. Where server, models and
    clients share the cores with the engine, threads that spin for long wait for ones that are not running: 9 tokens/s
    instead of 117 (demo model, one stream, two cores). Threads that sleep at once cost a third of the speed when
    nobody else needs the cores: 325 tokens/s instead of 468 (129M shape, 16 requests). 30,000 turns, 0.7 ms on an EPYC
    of the Zen 4 kind, bridge the gaps between operators, and end soon enough after a step for who sends its tokens:
    with 100,000 turns, 2.5 ms, one first token of four waited 0.5 to 1.3 ms more between server and client.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")


def _one_of(values: Mapping[str, str], name: str, choices: tuple[str, ...], default: str) -> str:
    value = values.get(name, "").strip().lower() or default
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {values[name]!r}")
    return value


def _cache_dir(values: Mapping[str, str]) -> Path:
    if chosen := values.get("WAVETRAIN_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    # The XDG specification says to ignore relative paths.
    if (base := values.get("XDG_CACHE_HOME")) and Path(base).is_absolute():
        return Path(base) / "wavetrain"
    if home := values.get("HOME"):
        return Path(home) / ".cache" / "wavetrain"
    return Path(tempfile.gettempdir()) / f"wavetrain-{os.getuid()}"
