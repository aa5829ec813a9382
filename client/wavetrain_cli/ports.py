# SPDX-License-Identifier: Apache-2.0
"""Whether the ports are free, and who has them, found out before a server is started on them."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import socket
from collections.abc import Mapping
from pathlib import Path

from wavetrain_cli.errors import CommandError

_TCP_LISTEN = "0A"


def check_ports(host: str, ports: Mapping[str, int]) -> None:
    """Checks that a server can listen on every port; `ports` maps a flag, as `--http-port`, to its port.

    Raises:
        CommandError: a port is out of range, asked for twice, in use (with the holder and the flag to change),
            or the host is not an address of this machine.
    """
    flags: dict[int, str] = {}
    for flag, port in ports.items():
        if not 1 <= port <= 65535:
            raise CommandError(f"{flag}: expected a port between 1 and 65535, got {port}", exit_code=2)
        if port in flags:
            raise CommandError(f"{flags[port]} and {flag} are both {port}; choose two ports", exit_code=2)
        flags[port] = flag
        _check_port(host, port, flag)


def port_holder(port: int) -> str | None:
    """Who listens on a TCP port, in words; None if nobody does or it cannot be seen."""
    for table in ("tcp", "tcp6"):
        for line in _read_lines(Path("/proc/net") / table)[1:]:
            fields = line.split()
            if fields[3] == _TCP_LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                return _socket_owner(inode=fields[9], uid=int(fields[7]))
    return None


def _check_port(host: str, port: int, flag: str) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise CommandError(f"--host {host}: not an address of this machine ({error.strerror})", exit_code=2) from error
    with socket.socket(family, kind, protocol) as probe:
        # As the server itself does; otherwise connections that linger after a restart count as "in use".
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen()
        except OSError as error:
            raise CommandError(_explain(error, host, port, flag)) from error


def _explain(error: OSError, host: str, port: int, flag: str) -> str:
    if error.errno == errno.EADDRINUSE:
        holder = port_holder(port)
        return (
            f"port {port} is in use{f' by {holder}' if holder else ''}; stop that, or choose another port with {flag}"
        )
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges that this user lacks; choose one above 1023 with {flag}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host}: not an address of this machine"
    return f"cannot listen on {host}:{port} ({error.strerror}); choose another port with {flag}"


def _socket_owner(*, inode: str, uid: int) -> str:
    wanted = f"socket:[{inode}]"
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and wanted in _open_files(process):
            words = _read_lines(process / "cmdline", separator="\0")
            return f"process {process.name} ({' '.join(words)[:80] or 'unnamed'})"
    try:
        return f"a process of user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"a process of user id {uid}"


def _open_files(process: Path) -> set[str]:
    files: set[str] = set()
    with contextlib.suppress(OSError):  # it ended meanwhile, or belongs to someone else
        for entry in (process / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                files.add(os.readlink(entry))
    return files


def _read_lines(path: Path, separator: str = "\n") -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").rstrip(separator).split(separator)
    except OSError:
        return [""]
