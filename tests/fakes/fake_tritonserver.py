# SPDX-License-Identifier: Apache-2.0
"""A stand-in for tritonserver: a script that says it is ready, and misbehaves as told.

    python fake_tritonserver.py STATE_DIR [--http-port=N] [behaviour ...]

Behaviours: `load-failure` (ends as the real one does when a model cannot load), `crash-once` and `crash-always` (exit 3
when ready), `ignore-sigterm`, `orphan` (a child in a session of its own, as the engine core is). Files in STATE_DIR:
`pids` (a line per start), `orphan` (the child's pid). It ends with exit code 0 on SIGTERM.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

LOAD_FAILURE = (
    'I1120 16:28:41.271827 8085 pb_stub.cc:366] "Failed to initialize Python stub: x"\n'
    'E1120 16:28:41.439213 8085 backend_model.cc:692] "ERROR: Failed to create instance: CheckpointError: invalid: x"\n'
    "E1120 16:28:41.439313 8085 model_lifecycle.cc:642] \"failed to load 'engine' version 1: Internal: "
    'CheckpointError: invalid: tensor lm_head.weight is missing\\n\\nAt:\\n  /somewhere/model.py(9): initialize\\n"\n'
    "error: creating server: Internal - failed to load all models\n"
)


class _Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def main() -> int:
    state, arguments = Path(sys.argv[1]), sys.argv[2:]
    with (state / "pids").open("a") as file:
        file.write(f"{os.getpid()}\n")
    num_starts = len((state / "pids").read_text().split())
    if "load-failure" in arguments:
        sys.stdout.write(LOAD_FAILURE)
        return 1
    if "orphan" in arguments:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        (state / "orphan").write_text(str(child.pid))
    ended = threading.Event()
    on_sigterm = signal.SIG_IGN if "ignore-sigterm" in arguments else lambda *_: ended.set()
    signal.signal(signal.SIGTERM, on_sigterm)
    port = next(int(item.partition("=")[2]) for item in arguments if item.startswith("--http-port="))
    server = HTTPServer(("127.0.0.1", port), _Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if "crash-always" in arguments or ("crash-once" in arguments and num_starts == 1):
        ended.wait(0.3)
        sys.stderr.write('E1120 16:28:41.1 8085 stub.cc:1] "the stub died"\n')
        sys.stderr.flush()
        os._exit(3)
    ended.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
