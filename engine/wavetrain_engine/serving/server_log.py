# SPDX-License-Identifier: Apache-2.0
"""Python's logging into the Triton server's log, with its levels."""

from __future__ import annotations

import logging

import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from wavetrain_engine.environment import Environment


class ServerLogHandler(logging.Handler):
    """Writes records through pb_utils.Logger."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record."""
        message = self.format(record)
        if record.levelno >= logging.ERROR:
            pb_utils.Logger.log_error(message)
        elif record.levelno >= logging.WARNING:
            pb_utils.Logger.log_warn(message)
        else:
            pb_utils.Logger.log_info(message)


def install_server_log() -> None:
    """Sends this process's log to the server's. Idempotent."""
    logger = logging.getLogger("wavetrain_engine")
    if not any(isinstance(handler, ServerLogHandler) for handler in logger.handlers):
        logger.addHandler(ServerLogHandler())
    logger.setLevel(Environment.read().log_level.upper())
    logger.propagate = False
