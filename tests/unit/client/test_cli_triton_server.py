# SPDX-License-Identifier: Apache-2.0
"""How the Triton server is found and started: from PATH, from the wheel, with flags that keep it closed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from wavetrain_cli import triton_server
from wavetrain_cli.errors import CommandError
from wavetrain_cli.triton_server import (
    ServerOptions,
    TritonServer,
    command_line,
    find_triton_server,
    model_import_folders,
    server_environment,
)
from wavetrain_engine.environment import Environment
from wavetrain_engine.errors import ConfigError


def make_executable(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "tritonserver"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_a_server_on_path_wins(tmp_path: Path) -> None:
    executable = make_executable(tmp_path / "bin")
    server = find_triton_server(tmp_path / "cache", search_path=str(executable.parent))
    assert server == TritonServer(kind="path", executable=executable)
    assert not any(item.startswith("--backend-directory") for item in command_line(server, options(tmp_path)))


def test_the_wheel_gets_a_backend_directory_with_this_pythons_stub(tmp_path: Path) -> None:
    for _ in range(2):  # the second time the links are there
        server = find_triton_server(tmp_path / "cache", search_path=str(tmp_path))
    assert server.kind == "wheel"
    assert server.backend_directory is not None
    assert server.backend_directory.is_relative_to(tmp_path / "cache")
    backend = server.backend_directory / "python"
    assert {item.name for item in backend.iterdir()} == {
        "libtriton_python.so",
        "triton_python_backend_stub",
        "triton_python_backend_utils.py",
    }
    stub = (backend / "triton_python_backend_stub").resolve()
    assert stub.parent.name == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"--backend-directory={server.backend_directory}" in command_line(server, options(tmp_path))


def test_without_a_server_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_server, "_wheel_root", lambda: None)
    with pytest.raises(CommandError, match="nvidia-pytriton"):
        find_triton_server(tmp_path, search_path=str(tmp_path))


def options(repository: Path) -> ServerOptions:
    return ServerOptions(model_repository=repository, http_port=1, grpc_port=2, metrics_port=3, shm_prefix="mine-")


def test_the_server_is_started_closed(tmp_path: Path) -> None:
    server = TritonServer(kind="path", executable=Path("/x/tritonserver"))
    line = command_line(server, options(tmp_path))
    assert line[0] == "/x/tritonserver"
    assert {
        "--model-control-mode=none",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        "--metrics-address=127.0.0.1",
        "--allow-sagemaker=false",
        "--allow-vertex-ai=false",
        "--disable-auto-complete-config",
        "--http-port=1",
        "--grpc-port=2",
        "--metrics-port=3",
        "--backend-config=python,shm-region-prefix-name=mine-",
    } <= set(line)
    keys = [item for item in line if "shared-memory" in item]
    assert len(keys) == 2
    # Nobody knows the key, so nobody registers shared memory.
    assert not set(keys) & set(command_line(server, options(tmp_path)))


def test_the_environment_finds_the_code(tmp_path: Path) -> None:
    server = TritonServer(kind="wheel", executable=tmp_path, library_path=(Path("/lib/python"), Path("/lib/triton")))
    base = {"LD_LIBRARY_PATH": "/mine", "PATH": "/bin", "OTHER": "kept"}
    environment = server_environment(server, base)
    assert environment["LD_LIBRARY_PATH"].split(os.pathsep) == ["/lib/python", "/lib/triton", "/mine"]
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["OTHER"] == "kept"
    assert "PYTHONPATH" not in base
    folders = environment["PYTHONPATH"].split(os.pathsep)
    for package in ("wavetrain_engine", "wavetrain_kernels", "numpy", "torch"):
        assert any(Path(folder, package).is_dir() for folder in folders)
    assert server_environment(server, environment) == environment


def test_import_folders_are_named_once() -> None:
    folders = model_import_folders()
    assert len(set(folders)) == len(folders)


def test_the_environment_has_three_variables_with_checked_values(tmp_path: Path) -> None:
    assert Environment.read({"HOME": "/home/me"}) == Environment(
        log_level="info", cache_dir=Path("/home/me/.cache/wavetrain"), kernels="auto"
    )
    assert Environment.read({"XDG_CACHE_HOME": "/caches", "HOME": "/h"}).cache_dir == Path("/caches/wavetrain")
    assert Environment.read({"XDG_CACHE_HOME": "relative", "HOME": "/h"}).cache_dir == Path("/h/.cache/wavetrain")
    assert str(os.getuid()) in Environment.read({}).cache_dir.name
    chosen = {"WAVETRAIN_LOG_LEVEL": "DEBUG", "WAVETRAIN_CACHE_DIR": str(tmp_path), "WAVETRAIN_KERNELS": "cpu"}
    assert Environment.read(chosen) == Environment(log_level="debug", cache_dir=tmp_path, kernels="cpu")
    with pytest.raises(ConfigError, match="WAVETRAIN_KERNELS: expected one of auto, gpu, cpu, reference, got 'tpu'"):
        Environment.read({"WAVETRAIN_KERNELS": "tpu"})
