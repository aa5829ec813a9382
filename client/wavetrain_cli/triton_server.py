# SPDX-License-Identifier: Apache-2.0
"""Where the Triton server is, and how it has to be started: command line and environment.

Two kinds are known. `path`: a `tritonserver` on PATH, as in NVIDIA's containers, complete in itself. `wheel`: the one
inside the nvidia-pytriton wheel, of which only files are used. The wheel's server needs what this file composes:
    1. a backend directory in which the stub of the running Python's version lies beside libtriton_python.so
    2. the wheel's own shared libraries, and before them the running interpreter's libpython: another interpreter's
       libpython would load this one's standard library, and C extensions then fail
    3. PYTHONPATH with every folder that holds a package the models import (.pth files of editable installs do not
       reach an embedded interpreter)
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import secrets
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wavetrain_cli.errors import CommandError

# What a model's stub and the core process import; the first folder that holds one goes onto PYTHONPATH.
_MODEL_PACKAGES = ("wavetrain_engine", "wavetrain_kernels", "numpy", "msgspec", "tokenizers", "torch")
# Protocols nobody needs here and that 2.51 has known holes in: client shared memory, log files by request, traces.
_RESTRICTED = "shared-memory,logging,trace"


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonServer:
    """A Triton server that can be started. `backend_directory` is None where its built-in one is right."""

    kind: Literal["path", "wheel"]
    executable: Path
    backend_directory: Path | None = None
    library_path: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What a start of the server is made of. `shm_prefix` begins the names of its regions in /dev/shm."""

    model_repository: Path
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    exit_timeout_s: int = 5  # requests are drained before; what is left are idle connections
    shm_prefix: str = "wavetrain"
    is_verbose: bool = False


def find_triton_server(cache_dir: Path, *, search_path: str | None = None) -> TritonServer:
    """Finds `tritonserver` on PATH (or `search_path`), else in the installed nvidia-pytriton wheel.

    Links the wheel's Python backend into a directory under `cache_dir`, as the wheel itself may be read-only.

    Raises:
        CommandError: there is neither, or the wheel has no stub for this Python, or no libpython is found.
    """
    if found := shutil.which("tritonserver", path=search_path):
        return TritonServer(kind="path", executable=Path(found))
    root = _wheel_root()
    if root is None:
        raise CommandError(
            "no Triton server found: `tritonserver` is not on PATH and the nvidia-pytriton wheel is not installed; "
            "run scripts/setup, or pip install --no-deps nvidia-pytriton==0.7.0"
        )
    server = root / "tritonserver"
    return TritonServer(
        kind="wheel",
        executable=server / "bin" / "tritonserver",
        backend_directory=_link_backend(server, cache_dir),
        library_path=(_libpython_folder(), root.parent / "nvidia_pytriton.libs"),
    )


def command_line(server: TritonServer, options: ServerOptions) -> list[str]:
    """The server's command line: hardened, with flags that 2.51 and every later release know."""
    flags = {
        "model-repository": options.model_repository,
        "model-control-mode": "none",  # no load API, so no paths from clients
        "strict-readiness": "true",
        "exit-on-error": "true",
        "exit-timeout-secs": options.exit_timeout_s,
        "http-address": options.host,
        "http-port": options.http_port,
        "grpc-address": options.host,
        "grpc-port": options.grpc_port,
        "metrics-address": options.host,
        "metrics-port": options.metrics_port,
        "allow-sagemaker": "false",
        "allow-vertex-ai": "false",
        "allow-gpu-metrics": str(has_nvidia_device()).lower(),
        # The key is made up per start and told to nobody: a closed door, as these have no off switch.
        "http-restricted-api": f"{_RESTRICTED}:wavetrain-key={secrets.token_hex(16)}",
        "grpc-restricted-protocol": f"{_RESTRICTED}:wavetrain-key={secrets.token_hex(16)}",
        "backend-config": f"python,shm-region-prefix-name={options.shm_prefix}",
        "log-verbose": int(options.is_verbose),
    }
    if server.backend_directory is not None:
        flags["backend-directory"] = server.backend_directory
    return [
        str(server.executable),
        "--disable-auto-complete-config",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]


def server_environment(server: TritonServer, base: Mapping[str, str]) -> dict[str, str]:
    """`base` with what the server, its Python stubs and the core process need to find each other's code.

    PATH begins with this interpreter's folder, so that a stub, whose `sys.executable` is not a Python, finds
    the right one for the core process.
    """
    environment = dict(base)
    _prepend(environment, "LD_LIBRARY_PATH", server.library_path)
    _prepend(environment, "PYTHONPATH", model_import_folders())
    _prepend(environment, "PATH", (Path(sys.executable).parent,))
    return environment


def model_import_folders() -> tuple[Path, ...]:
    """The folders that hold the packages the models import, without importing any."""
    folders = [Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))]
    for name in _MODEL_PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            folders.append(Path(spec.origin).parents[1])
    return tuple(dict.fromkeys(folders))


def has_nvidia_device() -> bool:
    """Whether the kernel shows an NVIDIA device; without one, asking the GPU metrics only logs warnings."""
    return Path("/dev/nvidiactl").exists()


def _wheel_root() -> Path | None:
    # find_spec, not an import: importing pytriton pulls in its own server code.
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    return root if (root / "tritonserver" / "bin" / "tritonserver").is_file() else None


def _link_backend(server: Path, cache_dir: Path) -> Path:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        known = sorted(item.name for item in stub.parents[1].iterdir()) if stub.parents[1].is_dir() else []
        raise CommandError(
            f"the Triton server of the nvidia-pytriton wheel has no stub for Python {version} "
            f"(it has {', '.join(known)}); use one of these, or put a `tritonserver` on PATH"
        )
    # One directory per wheel and Python: two checkouts on one machine do not undo each other's links.
    name = hashlib.sha256(f"{server}\0{version}".encode()).hexdigest()[:16]
    directory = cache_dir / "triton-backends" / name
    backend = directory / "python"
    backend.mkdir(parents=True, exist_ok=True)
    sources = [item for item in (server / "backends" / "python").iterdir() if item.is_file()]
    for source in [*sources, stub]:
        _link(source, backend / source.name)
    return directory


def _link(source: Path, target: Path) -> None:
    if target.is_symlink() and target.readlink() == source:
        return
    # Renaming is atomic: another start that goes on at the same moment never sees a missing file.
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(source)
    temporary.replace(target)


def _libpython_folder() -> Path:
    """The folder of the running interpreter's libpython, as the stub links against it."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    libdir = Path(str(sysconfig.get_config_var("LIBDIR")))
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    # Debian's LIBDIR is /usr/lib, while its libpython lies in the multiarch folder below.
    candidates = [libdir, libdir / multiarch, Path(sys.base_prefix) / "lib"]
    for folder in candidates:
        if (folder / name).exists():
            return folder
    raise CommandError(
        f"{name} was not found: the Triton server embeds Python as a shared library; on Debian or Ubuntu run "
        f"`apt-get install libpython{sys.version_info.major}.{sys.version_info.minor}`, or use a Python built with "
        "--enable-shared"
    )


def _prepend(environment: dict[str, str], name: str, folders: tuple[Path, ...]) -> None:
    present = [item for item in environment.get(name, "").split(os.pathsep) if item]
    wanted = [str(folder) for folder in folders]
    joined = os.pathsep.join([*wanted, *(item for item in present if item not in wanted)])
    if joined:
        environment[name] = joined
