# SPDX-License-Identifier: Apache-2.0
"""`wavetrain gateway` as a person runs it: its flags and file, what it refuses, and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from wavetrain_cli.errors import CommandError
from wavetrain_cli.gateway import check_gateway
from wavetrain_engine.environment import Environment


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment.read({"WAVETRAIN_CACHE_DIR": str(tmp_path)})


def test_flags_go_before_the_file_and_the_file_before_defaults(tmp_path: Path, environment: Environment) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text('model = "from-file"\n[listen]\nport = 9100\nkeep_alive_s = 5\n[caps]\nmax_choices = 2\n')
    given = ["--config", str(config), "--port", "9200", "--upstream", "a:1", "--upstream", "b:2"]
    settings = check_gateway(given, environment)
    assert (settings.model, settings.upstreams) == ("from-file", ("a:1", "b:2"))
    assert (settings.listen.port, settings.listen.keep_alive_s, settings.caps.max_choices) == (9200, 5, 2)
    assert settings.listen.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("arguments", "content", "words"),
    [
        (["--prot", "1"], "", "did you mean --port"),
        (["--port", "99999"], "", "listen.port"),
        (["--served-model-name", "../x"], "", "model"),
        (["--host", "0.0.0.0"], "", "configure keys"),
        ([], "[listen]\nprot = 1\n", "did you mean 'port'"),
        ([], "[caps]\nmax_choices = 0\n", "caps.max_choices"),
        ([], "model = \n", "is not TOML"),
        ([], "[admin]\nport = 9001\n", "WAVETRAIN_ADMIN_KEY"),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, environment: Environment, arguments: list[str], content: str, words: str
) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text(content)
    with pytest.raises(CommandError, match=words) as refused:
        check_gateway([*arguments, "--config", str(config)], environment)
    assert refused.value.exit_code == 2
    assert "\n" not in str(refused.value)


def test_keys_or_a_word_open_it_to_others(tmp_path: Path, environment: Environment) -> None:
    assert check_gateway(["--host", "0.0.0.0", "--insecure"], environment).listen.host == "0.0.0.0"
    with_keys = Environment.read({"WAVETRAIN_CACHE_DIR": str(tmp_path), "WAVETRAIN_API_KEYS": "wt-secret"})
    assert check_gateway(["--host", "::"], with_keys).listen.host == "::"
    assert "wt-secret" not in repr(with_keys)


def test_it_answers_without_a_server_behind_and_ends_with_0() -> None:
    command = [sys.executable, "-m", "wavetrain_cli.main", "gateway", "--port", "0", "--upstream", "127.0.0.1:1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", env=os.environ
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("wavetrain: gateway ready on http://127.0.0.1:")
        url = line.split()[-1].removesuffix("/v1")
        assert httpx.get(f"{url}/livez", trust_env=False).status_code == 200
        assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 503
        models = httpx.get(f"{url}/v1/models", trust_env=False).json()
        assert [model["id"] for model in models["data"]] == ["wavetrain"]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "wavetrain_cli.main", "gateway", "--port", port]
        ended = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("wavetrain: cannot listen on 127.0.0.1:")
    assert len(ended.stderr.splitlines()) == 1
