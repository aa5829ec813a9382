# SPDX-License-Identifier: Apache-2.0
"""The gateway's log: one JSON object a line, one line for each request. No text of prompts or answers, no keys."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from wavetrain_gateway.errors import GatewayError
from wavetrain_gateway.exchange import Exchange
from wavetrain_gateway.settings import LogSettings

_LOGGER = logging.getLogger("wavetrain_gateway")


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level and message; the fields of a request; a stack where there is one."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info is not None:
            line["stack"] = self.formatException(record.exc_info)
        return json.dumps(line)


class RequestLog:
    """Writes the access log, and what went wrong."""

    def __init__(self, settings: LogSettings) -> None:
        self._settings = settings

    def request(self, exchange: Exchange) -> None:
        """One line for a request that has ended."""
        if not self._settings.access_log:
            return
        record, stats = exchange.record, exchange.record.stats
        fields: dict[str, Any] = {
            "request_id": exchange.request_id,
            "method": exchange.scope.get("method", "WEBSOCKET"),
            "route": record.route,
            "status": record.status,
            "caller": exchange.caller.name,
            "duration_ms": round(exchange.elapsed_s * 1000, 1),
        }
        if record.error_code:
            fields["error"] = record.error_code
        if record.model:
            fields |= {"model": record.model, "stream": record.is_streamed, "finish_reasons": record.finish_reasons}
        if record.is_from_cache:
            fields["cache"] = "hit"
        if stats is not None:
            fields |= {
                "replica": stats.replica,
                "prompt_tokens": stats.num_prompt_tokens,
                "cached_tokens": stats.num_cached_tokens,
                "output_tokens": stats.num_output_tokens,
            }
            if stats.first_news_s is not None:
                fields["ttft_ms"] = round((stats.first_news_s - stats.started_s) * 1000, 1)
        _LOGGER.info("request", extra={"fields": fields})

    def failure(self, error: BaseException, request_id: str) -> None:
        """What nobody foresaw, with its stack."""
        _LOGGER.error("a request failed", exc_info=(type(error), error, error.__traceback__), extra=_about(request_id))

    def upstream_failure(self, error: GatewayError, request_id: str) -> None:
        """What a replica really said, of which the caller is told only the kind."""
        cause = error.__cause__
        _LOGGER.warning("a request ended with %s: %s", error.code, cause or error, extra=_about(request_id))

    def cache_failure(self, error: BaseException) -> None:
        """The response cache's store does not answer."""
        _LOGGER.warning("the response cache failed: %s", type(error).__name__)


def install_log(settings: LogSettings) -> None:
    """Sends the gateway's and uvicorn's log to stderr, as lines of JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("wavetrain_gateway", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(settings.level.upper() if name == "wavetrain_gateway" else logging.WARNING)


def _about(request_id: str) -> dict[str, Any]:
    return {"fields": {"request_id": request_id}}
