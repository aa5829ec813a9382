# SPDX-License-Identifier: Apache-2.0
"""The `wavetrain` command line: what a person gets wrong is answered by one line that says what to do."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes.checkpoint_files import write_checkpoint
from wavetrain_cli import doctor
from wavetrain_cli.main import main
from wavetrain_cli.ports import check_ports
from wavetrain_cli.triton_service import example_request
from wavetrain_engine.config import EngineConfig
from wavetrain_kernels.cpu.build import find_compiler
from wavetrain_kernels.cpu.instruction_set import LEVELS, available_levels


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WAVETRAIN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("WAVETRAIN_LOG_LEVEL", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must fail with one line; returns the line."""

    def run(*arguments: str, code: int = 1) -> str:
        assert main(arguments) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("wavetrain: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("serve", "run", "repo", "doctor"))


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("wavetrain ")


@pytest.mark.parametrize("command", [["--help"], ["serve", "--help"], ["repo", "build", "--help"], ["run", "--help"]])
def test_help_needs_no_package_of_the_server(command: list[str]) -> None:
    # A client-only install has none of these, and torch alone would take seconds.
    code = (
        "import sys\n"
        "for name in ('torch', 'msgspec', 'tokenizers', 'safetensors'): sys.modules[name] = None\n"
        "from wavetrain_cli.main import main\n"
        f"sys.exit(main({command!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: wavetrain" in done.stdout


def test_unknown_names_are_answered_with_the_nearest_one(fails: Callable[..., str]) -> None:
    assert "did you mean serve?" in fails("srve", code=2)
    assert "did you mean --version?" in fails("--verson", code=2)
    assert "unknown flag --max-num-seq; did you mean --max-num-seqs?" in fails("serve", "--max-num-seq", "4", code=2)
    assert "did you mean repo build?" in fails("repo", "biuld", code=2)
    assert "see wavetrain serve --help" in fails("serve", "--zzz", code=2)


def test_values_of_the_wrong_kind_are_named(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "--block-size: invalid int value: 'x'" in fails("serve", "--block-size", "x", code=2)
    model_dir = str(write_checkpoint(tmp_path / "model"))
    assert "max_num_seqs: expected int >= 1, got 0" in fails("serve", model_dir, "--max-num-seqs", "0")
    assert "--grace-s" in fails("serve", "--grace-s", "-1", code=2)
    assert "--grace-s" in fails("serve", "--grace-s", "nan", code=2)
    assert "--dtype" in fails("serve", "--dtype", "int3", code=2)


def test_environment_values_are_checked(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAVETRAIN_LOG_LEVEL", "loud")
    assert "expected one of debug, info, warning, error" in fails("doctor")


def test_debugging_shows_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAVETRAIN_LOG_LEVEL", "debug")
    with pytest.raises(Exception, match="no checkpoint directory"):
        main(["serve", "/does/not/exist"])


def test_bad_checkpoints_are_refused_before_anything_starts(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "there is no checkpoint directory" in fails("serve", str(tmp_path / "missing"))
    assert "is not a directory" in fails("serve", __file__)
    (tmp_path / "empty").mkdir()
    assert "config.json" in fails("serve", str(tmp_path / "empty"))

    unknown = write_checkpoint(tmp_path / "unknown", architectures=["LlamaForCausalLn"])
    assert "LlamaForCausalLM" in fails("serve", str(unknown))

    truncated = write_checkpoint(tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "model.safetensors" in fails("serve", str(truncated))

    pickled = write_checkpoint(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pickle" in fails("serve", str(pickled))

    mute = write_checkpoint(tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    assert "--skip-tokenizer-init" in fails("serve", str(mute))


def test_a_port_in_use_is_named_with_its_holder_and_flag(fails: Callable[..., str]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        line = fails("serve", "--http-port", str(free_port()), "--grpc-port", str(port))
    assert f"port {port} is in use by process {os.getpid()}" in line
    assert "--grpc-port" in line


def test_ports_are_checked_for_sense(fails: Callable[..., str]) -> None:
    assert "--http-port: expected a port between 1 and 65535" in fails("serve", "--http-port", "0", code=2)
    port = str(free_port())
    line = fails("serve", "--http-port", port, "--grpc-port", port, code=2)
    assert f"--http-port and --grpc-port are both {port}" in line
    assert "not an address of this machine" in fails("serve", "--host", "192.0.2.1")


def test_free_ports_pass() -> None:
    check_ports("127.0.0.1", {"--http-port": free_port()})


def test_repo_build_binds_the_packaged_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_dir, out = write_checkpoint(tmp_path / "model"), tmp_path / "out" / "repository"
    assert main(["repo", "build", str(model_dir), "--out", str(out), "--max-num-seqs", "7", "--dtype", "float32"]) == 0
    assert f"tritonserver --model-repository={out}" in capsys.readouterr().out

    config = EngineConfig.load(out / "engine" / "1" / "engine.toml")
    assert config.model.model == str(model_dir)
    assert (config.model.dtype, config.scheduler.max_num_seqs) == ("float32", 7)
    for name in ("tokenizer", "engine", "detokenizer", "ensemble", "llm"):
        assert (out / name / "config.pbtxt").is_file()
        assert (out / name / "1").is_dir()
    assert (out / "llm" / "1" / "model.py").is_file()
    assert not list(out.rglob("*.safetensors"))
    assert [item.name for item in out.parent.iterdir()] == ["repository"]


def test_repo_build_replaces_only_what_is_its_own(fails: Callable[..., str], tmp_path: Path) -> None:
    model_dir, out = str(write_checkpoint(tmp_path / "model")), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("all of it")
    for flags in ([], ["--force"]):
        assert "holds other files" in fails("repo", "build", model_dir, "--out", str(out), *flags)
    assert (out / "thesis.txt").exists()

    (out / "thesis.txt").unlink()
    assert main(["repo", "build", model_dir, "--out", str(out)]) == 0


def test_repo_build_needs_force_for_a_repository(
    fails: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir, out = str(write_checkpoint(tmp_path / "model")), str(tmp_path / "out")
    assert main(["repo", "build", model_dir, "--out", out]) == 0
    capsys.readouterr()
    assert "--force" in fails("repo", "build", model_dir, "--out", out)
    assert main(["repo", "build", model_dir, "--out", out, "--force", "--block-size", "32"]) == 0
    assert EngineConfig.load(Path(out, "engine", "1", "engine.toml")).cache.block_size == 32


def test_repo_build_says_what_is_missing(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "--out" in fails("repo", "build", str(write_checkpoint(tmp_path / "model")), code=2)


def test_a_cache_folder_that_cannot_be_made_is_one_line(
    fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("WAVETRAIN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert "Not a directory" in fails(
        "serve", *(f"--{name}-port={free_port()}" for name in ("http", "grpc", "metrics"))
    )


def test_doctor_tells_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == (0 if report["can_serve"] else 1)
    findings = {item["name"]: item for item in report["findings"]}
    assert findings["python"]["status"] == "ok"
    assert findings["triton server"]["status"] == "ok"
    assert {"AVX2", "AVX-512", "AMX", "gpu", "cpu kernels", "memory", "/dev/shm", "torch works"} <= set(findings)
    assert all(item["advice"] for item in report["findings"] if item["status"] == "missing")


@pytest.mark.slow
@pytest.mark.skipif(not available_levels() or find_compiler() is None, reason="no instruction set, or no compiler")
def test_doctor_builds_kernels_ahead_of_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WAVETRAIN_CACHE_DIR", str(tmp_path))
    main(["doctor", "--build", "--json"])
    findings = {item["name"]: item["status"] for item in json.loads(capsys.readouterr().out)["findings"]}
    names = [level.name for level in available_levels()]
    assert {name: findings[f"kernels for {name}"] for name in names} == dict.fromkeys(names, "ok")
    assert len(list((tmp_path / "kernels").glob("*.so"))) == len(names)


def test_doctor_tells_what_a_machine_without_a_compiler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_levels", lambda: LEVELS)
    monkeypatch.setattr(doctor, "find_compiler", lambda: None)
    found = {item.name: item for item in doctor._check_kernels()}
    assert found["compiler"].status == "note"
    assert "apt-get install g++" in found["compiler"].advice
    monkeypatch.setattr(doctor, "available_levels", tuple)
    assert [(item.name, item.status) for item in doctor._check_kernels()] == [("cpu kernels", "note")]
    assert doctor._build_kernels(Path("/does/not/exist")) == []


def test_doctor_says_why_kernels_were_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "available_levels", lambda: LEVELS)
    lines = '{"level": "amx", "error": "g++ took over 120 s"}\n{"level": "avx2", "error": null}\n'
    monkeypatch.setattr(doctor, "_run", lambda *_args, **_options: lines)
    failed, built = doctor._build_kernels(tmp_path)
    assert (failed.name, failed.status, failed.detail) == ("kernels for amx", "note", "g++ took over 120 s")
    assert (built.name, built.status) == ("kernels for avx2", "ok")
    monkeypatch.setattr(doctor, "_run", lambda *_args, **_options: None)
    assert [item.status for item in doctor._build_kernels(tmp_path)] == ["note"]


def test_the_printed_curl_command_is_quoted_for_a_shell() -> None:
    words = shlex.split(example_request(host="127.0.0.1", http_port=8000, prompt='it\'s "here"'))
    assert words[:2] == ["curl", "-sN"]
    assert json.loads(words[-1])["text_input"] == 'it\'s "here"'
