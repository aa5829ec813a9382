# SPDX-License-Identifier: Apache-2.0
"""Runs the Supervisor over fake_tritonserver in a process of its own, as it adopts and ends everything below it.

    python supervised.py STATE_DIR HTTP_PORT GRACE_S [behaviour ...]

Draining and being idle are files in STATE_DIR: the supervisor makes `draining`, the test makes `idle`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from wavetrain_cli.errors import CommandError
from wavetrain_cli.server_log import ServerLog
from wavetrain_cli.supervisor import Supervisor, SupervisorPolicy
from wavetrain_cli.triton_service import TritonService


class _Service(TritonService):
    def __init__(self, state: Path, http_port: int) -> None:
        super().__init__(host="127.0.0.1", http_port=http_port, engine_config=Path("none"))
        self._state = state

    def begin_drain(self, server_pid: int) -> None:
        (self._state / "draining").write_text(str(server_pid))

    def is_idle(self) -> bool:
        return (self._state / "idle").exists()


def say(message: str) -> None:
    sys.stdout.write(f"{message}\n")
    sys.stdout.flush()


def main() -> int:
    state, port, grace_s = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    fake = Path(__file__).with_name("fake_tritonserver.py")
    with (state / "log").open("w") as file:
        supervisor = Supervisor(
            command=[sys.executable, "-S", str(fake), str(state), f"--http-port={port}", *sys.argv[4:]],
            environment=os.environ,
            service=_Service(state, port),
            log=ServerLog(
                file=file,
                show=lambda line: say(f"{line.origin}: {line.text}"),
                show_progress=lambda update: say(f"progress {update.phase}"),
                has_gpu=False,
            ),
            say=say,
            on_ready=lambda: say("ready"),
            on_ended=lambda: None,
            policy=SupervisorPolicy(
                grace_s=grace_s,
                exit_timeout_s=0.5,
                orphan_grace_s=0.3,
                first_back_off_s=0.05,
                max_back_off_s=0.1,
                poll_interval_s=0.02,
            ),
        )
        try:
            return supervisor.run()
        except CommandError as error:
            say(f"error: {error}")
            return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
