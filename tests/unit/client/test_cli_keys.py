# SPDX-License-Identifier: Apache-2.0
"""`wavetrain keys`: keys are shown once, their file holds hashes, and stays whole whatever is asked for."""

from __future__ import annotations

import io
import json
import stat
from pathlib import Path

import pytest

from wavetrain_cli.gateway import check_gateway
from wavetrain_cli.main import main
from wavetrain_engine.environment import Environment
from wavetrain_gateway.keys import KeyRing, hash_key, parse_keys


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["keys", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 1) -> str:
    assert main(["keys", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_key_is_printed_with_its_entry(capsys: pytest.CaptureFixture[str]) -> None:
    key, _, entry = run(capsys, "create", "team", "--tier", "own", "--model", "a", "--model", "b").partition("\n")
    assert key.startswith("wt-")
    (parsed,) = parse_keys(f"[tier.own]\n{entry}".encode(), "keys.toml").keys
    assert (parsed.name, parsed.sha256, parsed.models) == ("team", hash_key(key), {"a", "b"})
    assert key not in entry


def test_a_file_is_made_added_to_listed_and_revoked_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    first = run(capsys, "create", "one", "--append", str(path), "--expires", "2001-01-01").strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    path.write_text(path.read_text() + "\n# a remark\n[tier.gold]\nmax_streams = 3\n")
    limits = ["--tokens-per-minute", "100", "--requests-per-minute", "7", "--tier", "gold"]
    second = run(capsys, "create", "two", "--append", str(path), *limits).strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert first not in path.read_text()
    assert second not in path.read_text()
    ring = KeyRing(parse_keys(path.read_bytes(), path.name))
    assert ring.find(first) is None
    assert ring.find(second) is not None
    rows = json.loads(run(capsys, "list", str(path), "--json"))
    assert [(row["name"], row["state"], row["streams"], row["tokens/min"]) for row in rows] == [
        ("one", "expired", None, None),
        ("two", "valid", 3, 100),
    ]
    assert "two" in run(capsys, "list", str(path))
    run(capsys, "revoke", "one", str(path))
    assert [entry.name for entry in parse_keys(path.read_bytes(), path.name).keys] == ["two"]
    assert "# a remark" in path.read_text() or "[tier.gold]" in path.read_text()
    assert [item.name for item in tmp_path.iterdir()] == ["keys.toml"]
    assert "is the only key" in fails(capsys, "revoke", "two", str(path))
    assert "there is no key 'x'; its keys are two" in fails(capsys, "revoke", "x", str(path))


def test_a_file_is_left_as_it_is_where_the_entry_would_break_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    run(capsys, "create", "one", "--append", str(path))
    before = path.read_bytes()
    assert "two keys have the name 'one'" in fails(capsys, "create", "one", "--append", str(path))
    assert "there is no tier 'x'" in fails(capsys, "create", "two", "--append", str(path), "--tier", "x")
    assert "max_streams: Input should be greater" in fails(
        capsys, "create", "two", "--append", str(path), "--max-streams", "0"
    )
    assert path.read_bytes() == before
    assert "TOML files only" in fails(capsys, "create", "two", "--append", str(tmp_path / "keys.json"))
    path.write_text(f"key = [{{name = 'a', sha256 = '{'1' * 64}'}}, {{name = 'b', sha256 = '{'2' * 64}'}}]")
    assert "take it out by hand" in fails(capsys, "revoke", "a", str(path))


def test_a_key_is_hashed_from_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("wt-abc\n"))
    assert run(capsys, "hash") == hash_key("wt-abc") + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "no key was given" in fails(capsys, "hash")


def test_what_is_wrong_with_the_command_line_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "the key: key[0].name: String should match" in fails(capsys, "create", "a b")
    assert "unknown flag --teir; did you mean --tier?" in fails(capsys, "create", "a", "--teir", "x", code=2)
    assert "unknown command keys revok; did you mean keys revoke?" in fails(capsys, "revok", code=2)
    assert main(["keys"]) == 2
    assert "revoke" in capsys.readouterr().out
    assert "none.toml: No such file" in fails(capsys, "list", str(tmp_path / "none.toml"))


def test_the_gateway_takes_keys_redis_and_routing_from_its_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    environment = Environment.read({})
    flags = ["--keys", "k.toml", "--redis", "redis://h:1", "--routing", "r.toml", "--host", "0.0.0.0"]
    settings = check_gateway(flags, environment)
    assert (settings.keys.file, settings.keys.redis_url) == (Path("k.toml"), "redis://h:1")
    assert settings.routing.file == Path("r.toml")
    config = tmp_path / "gateway.toml"
    config.write_text('[keys]\nfile = "other.toml"\nredis_when_down = "closed"\n', encoding="utf-8")
    settings = check_gateway(["--config", str(config), "--redis", "redis://h:1"], environment)
    assert (settings.keys.file, settings.keys.redis_when_down) == (Path("other.toml"), "closed")
    assert main(["gateway", "--redis", "redis://h:1"]) == 2
    assert "needs a key file (--keys)" in capsys.readouterr().err
