# SPDX-License-Identifier: Apache-2.0
"""`wavetrain doctor`: what this machine can run, and what to do about the rest.

Looks and never changes anything but the cache folder, where links to the wheel's Python backend go and the kernels that
`--build` compiles. Torch is asked in a process of its own, as it may be missing, broken, or made for other hardware.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from wavetrain_cli.engine_flags import FlagParser
from wavetrain_cli.errors import CommandError
from wavetrain_cli.triton_server import find_triton_server, has_nvidia_device, server_environment
from wavetrain_engine.environment import Environment
from wavetrain_kernels.cpu.build import find_compiler
from wavetrain_kernels.cpu.instruction_set import available_levels

Status = Literal["ok", "note", "missing"]

_SERVER_PACKAGES = ("torch", "safetensors", "tokenizers", "jinja2", "msgspec", "numpy")
_CLIENT_PACKAGES = ("wavetrain", "tritonclient", "rich")
_MIN_MEMORY_BYTES = 2 << 30
# Each model's process maps 1 MiB at first, and Triton grows that with the requests in flight.
_MIN_SHARED_MEMORY_BYTES = 64 << 20
_WHEEL_RELEASES = {"0.7.0": "2.51.0"}  # the binary itself does not tell
_COMMAND_TIMEOUT_S = 60.0
_BUILD_TIMEOUT_S = 600.0
_MARKS: dict[Status, str] = {"ok": "[green]✓[/]", "note": "[yellow]–[/]", "missing": "[red]✗[/]"}
_TORCH_PROBE = (
    "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda, torch.cuda.is_available() and "
    "[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]]))"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `missing` keeps the server from running, `note` does not."""

    name: str
    status: Status
    detail: str
    advice: str = ""


def main(arguments: list[str], environment: Environment) -> int:
    """Runs the subcommand; returns 1 if a model cannot be served here."""
    parser = FlagParser(prog="wavetrain doctor", description="Tells what this machine can run, and what to do.")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--build", action="store_true", help="compile the CPU kernels for each instruction set of this machine now"
    )
    given = parser.parse(arguments)
    findings = examine(environment) + (_build_kernels(environment.kernel_cache_dir) if given.build else [])
    can_serve = all(finding.status != "missing" for finding in findings)
    if given.json:
        print(json.dumps({"can_serve": can_serve, "findings": [asdict(item) for item in findings]}, indent=2))
    else:
        _print_table(findings, can_serve=can_serve)
    return 0 if can_serve else 1


def examine(environment: Environment) -> list[Finding]:
    """Looks at everything, in the order a person mends it."""
    checks: list[Callable[[], list[Finding]]] = [
        _check_system,
        _check_python,
        lambda: _check_packages(_CLIENT_PACKAGES, "pip install wavetrain"),
        lambda: _check_packages(_SERVER_PACKAGES, "pip install 'wavetrain[server]'"),
        lambda: _check_triton_server(environment.cache_dir),
        _check_cpu,
        _check_gpu,
        _check_memory,
        _check_kernels,
        lambda: [_check_cache(environment.cache_dir)],
    ]
    return [finding for check in checks for finding in check()]


def cpu_features(cpuinfo: str) -> dict[str, bool]:
    """Which instruction sets that kernels are written for are in the text of /proc/cpuinfo."""
    line = next((item for item in cpuinfo.splitlines() if item.startswith(("flags", "Features"))), "")
    flags = set(line.partition(":")[2].split())
    return {
        "AVX2": "avx2" in flags,
        "AVX-512": "avx512f" in flags,
        "AVX-512 BF16": "avx512_bf16" in flags,
        "AMX": {"amx_tile", "amx_bf16"} <= flags,
    }


def _check_system() -> list[Finding]:
    system = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver()) or 'unknown libc'}"
    if sys.platform != "linux":
        return [Finding("system", "missing", system, "the Triton server runs on Linux; use a container")]
    return [Finding("system", "ok", system)]


def _check_python() -> list[Finding]:
    detail = f"{platform.python_version()} ({sys.executable})"
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        return [Finding("python", "missing", detail, "use Python 3.10 to 3.13")]
    return [Finding("python", "ok", detail)]


def _check_packages(names: tuple[str, ...], advice: str) -> list[Finding]:
    found = {name: _installed(name) for name in names}
    return [
        Finding(name, "ok", text) if text else Finding(name, "missing", "not installed", advice)
        for name, text in found.items()
    ]


def _check_triton_server(cache_dir: Path) -> list[Finding]:
    try:
        server = find_triton_server(cache_dir)
    except CommandError as error:
        return [Finding("triton server", "missing", "not found", str(error))]
    except OSError as error:
        advice = "make WAVETRAIN_CACHE_DIR a folder that can be written"
        return [Finding("triton server", "missing", f"{cache_dir}: {error.strerror}", advice)]
    # It prints its help and ends with 1; the dynamic linker would end it with 127.
    output = _run([str(server.executable), "--help"], server_environment(server, os.environ), codes=(0, 1))
    if output is None:
        advice = "run it with --help by hand: a shared library may be missing"
        return [Finding("triton server", "missing", f"{server.executable} does not start", advice)]
    if server.kind == "path":
        # NVIDIA's containers note the version beside the server.
        release = _read(server.executable.resolve().parents[1] / "TRITON_VERSION").strip() or "unknown version"
        return [Finding("triton server", "ok", f"{release}, on PATH: {server.executable}")]
    wheel = version("nvidia-pytriton")
    release = _WHEEL_RELEASES.get(wheel, "unknown version")
    findings = [Finding("triton server", "ok", f"{release}, from the nvidia-pytriton {wheel} wheel")]
    numpy_version = _installed("numpy")
    if numpy_version is not None and int(numpy_version.partition(".")[0]) >= 2:
        detail = f"numpy {numpy_version} with the wheel's Triton server: every tensor would arrive empty"
        findings.append(Finding("numpy for the wheel", "missing", detail, "pip install 'numpy<2'"))
    return findings


def _check_cpu() -> list[Finding]:
    cpuinfo = _read(Path("/proc/cpuinfo"))
    names = [item.partition(":")[2].strip() for item in cpuinfo.splitlines() if item.startswith("model name")]
    detail = f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} usable threads"
    findings = [Finding("cpu", "ok", detail)]
    for name, is_there in cpu_features(cpuinfo).items():
        status: Status = "ok" if is_there else "note"
        findings.append(Finding(name, status, "yes" if is_there else "no", "" if is_there else "slower, still correct"))
    return findings


def _check_gpu() -> list[Finding]:
    findings: list[Finding] = []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    seen = _run(query, dict(os.environ)) if shutil.which("nvidia-smi") else None
    if seen:
        findings.append(Finding("gpu", "ok", "; ".join(seen.strip().splitlines())))
    elif has_nvidia_device():
        findings.append(Finding("gpu", "note", "a device, but nvidia-smi does not answer", "check the NVIDIA driver"))
    else:
        findings.append(Finding("gpu", "note", "none", "models run on the CPU"))
    if _installed("torch") is None:
        return findings
    output = _run([sys.executable, "-c", _TORCH_PROBE], dict(os.environ))
    if output is None:
        findings.append(Finding("torch works", "missing", "import torch fails", "install torch again"))
        return findings
    torch_version, cuda, devices = json.loads(output)
    if devices:
        findings.append(Finding("torch works", "ok", f"{torch_version}, CUDA {cuda}: {', '.join(devices)}"))
    elif seen:
        advice = "install a CUDA build of torch that suits the driver, to use the GPU"
        findings.append(Finding("torch works", "note", f"{torch_version} does not see the GPU", advice))
    else:
        findings.append(Finding("torch works", "ok", f"{torch_version}, on the CPU"))
    return findings


def _check_memory() -> list[Finding]:
    fields = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines() if ":" in line)
    available = int(fields.get("MemAvailable", "0 kB").split()[0]) * 1024
    total = int(fields.get("MemTotal", "0 kB").split()[0]) * 1024
    findings = [
        Finding(
            "memory",
            "ok" if available >= _MIN_MEMORY_BYTES else "note",
            f"{_gib(available)} of {_gib(total)} free",
            "" if available >= _MIN_MEMORY_BYTES else "small models only; lower --kv-cache-memory",
        )
    ]
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return [*findings, Finding("/dev/shm", "missing", "not there", "the Python backend needs it: mount a tmpfs")]
    if size < _MIN_SHARED_MEMORY_BYTES:
        advice = "make it larger, in a container with --shm-size=1g"
        return [*findings, Finding("/dev/shm", "missing", f"{size >> 20} MiB", advice)]
    return [*findings, Finding("/dev/shm", "ok", _gib(size))]


def _check_kernels() -> list[Finding]:
    levels = available_levels()
    if not levels:
        advice = "models run on plain PyTorch: several times slower, still correct"
        return [Finding("cpu kernels", "note", "none for this CPU, which has no AVX2", advice)]
    compiler = find_compiler()
    if compiler is None:
        advice = "apt-get install g++; without it models run on plain PyTorch, several times slower"
        return [
            Finding("compiler", "note", "no C++ compiler", advice),
            Finding("cpu kernels", "note", f"{levels[0].name}, if there were a compiler"),
        ]
    output = _run([compiler, "--version"], dict(os.environ)) or compiler
    return [
        Finding("compiler", "ok", output.splitlines()[0]),
        Finding("cpu kernels", "ok", f"{levels[0].name}, compiled at first use or by wavetrain doctor --build"),
    ]


def _build_kernels(cache_dir: Path) -> list[Finding]:
    if not available_levels():
        return []
    command = [sys.executable, "-m", "wavetrain_kernels.cpu.build_all", str(cache_dir)]
    output = _run(command, dict(os.environ), timeout_s=_BUILD_TIMEOUT_S)
    if output is None:
        advice = "mend what is marked above; models run on plain PyTorch until then"
        return [Finding("kernels built", "note", "they could not be compiled", advice)]
    findings: list[Finding] = []
    for line in output.splitlines():
        report = json.loads(line)
        name, error = f"kernels for {report['level']}", report["error"]
        if error is None:
            findings.append(Finding(name, "ok", f"in {cache_dir}"))
        else:
            findings.append(Finding(name, "note", error, "models run on plain PyTorch, several times slower"))
    return findings


def _check_cache(cache_dir: Path) -> Finding:
    existing = next(item for item in (cache_dir, *cache_dir.parents) if item.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        return Finding("cache folder", "ok", f"{cache_dir} ({_gib(shutil.disk_usage(existing).free)} free)")
    advice = "set WAVETRAIN_CACHE_DIR to a folder that can be written"
    return Finding("cache folder", "missing", f"{cache_dir} cannot be written", advice)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _run(
    command: list[str],
    environment: dict[str, str],
    *,
    codes: tuple[int, ...] = (0,),
    timeout_s: float = _COMMAND_TIMEOUT_S,
) -> str | None:
    """A command's output, or what it said on standard error; None if it ends with another than these codes."""
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout or done.stderr) if done.returncode in codes else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _print_table(findings: list[Finding], *, can_serve: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    for item in findings:
        detail = escape(item.detail) + (f" [dim]→ {escape(item.advice)}[/]" if item.advice else "")
        table.add_row(_MARKS[item.status], item.name, detail)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "\nThis machine can serve: wavetrain serve"
        if can_serve
        else "\nMend what is marked ✗, then this machine can serve."
    )
