# SPDX-License-Identifier: Apache-2.0
"""The rules of the code base that no linter knows: sizes, names, and what may never appear."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 150  # a Triton-language kernel
MAX_MODEL_LINES = 50  # a model.py in the repository
TOPS = ("engine", "kernels", "client", "tests", "scripts", "model_repository", "docs", "docker")
FORBIDDEN_STEMS = {"utils", "helpers", "common", "misc"}
UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# The one reader, and the places that hand the environment on unread to a process they start.
ENVIRONMENT_READER = "engine/wavetrain_engine/environment.py"
ENVIRONMENT_PASSERS = {"client/wavetrain_cli/serve.py", "client/wavetrain_cli/doctor.py"}
PACKAGES = ("engine", "kernels", "client", "model_repository")


def _python_files() -> list[Path]:
    # What git does not ignore, so that a half-made file is seen and a virtual environment is not.
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if listed.returncode == 0:
        names = listed.stdout.splitlines()
    else:  # an unpacked source archive
        names = [str(path.relative_to(ROOT)) for top in TOPS for path in (ROOT / top).rglob("*.py")]
    return sorted(path for name in names if (path := ROOT / name).is_file())


FILES = _python_files()
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in FILES}


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _is_in(path: Path, *tops: str) -> bool:
    return path.relative_to(ROOT).parts[0] in tops


def _nodes(path: Path, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(TREES[path]) if isinstance(node, kinds))


def _places(found: Iterator[tuple[Path, ast.AST]]) -> list[str]:
    return [f"{_relative(path)}:{getattr(node, 'lineno', 1)}" for path, node in found]


def _dotted(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=_relative)
def test_first_line_names_the_licence(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    # A script's first line is its interpreter.
    first = next(iter(lines[1:] if lines and lines[0].startswith("#!") else lines), "")
    assert first == "# SPDX-License-Identifier: Apache-2.0"


def test_files_are_short() -> None:
    long = [f"{_relative(path)}: {n}" for path in FILES if (n := len(path.read_bytes().splitlines())) > MAX_FILE_LINES]
    assert long == []


def test_functions_are_short() -> None:
    long: list[str] = []
    for path in FILES:
        for node in _nodes(path, ast.FunctionDef, ast.AsyncFunctionDef):
            assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            is_kernel = any("triton.jit" in ast.unparse(item) for item in node.decorator_list)
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > (MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES):
                long.append(f"{_relative(path)}:{node.lineno} {node.name}: {num_lines}")
    assert long == []


def test_modules_say_why_they_exist() -> None:
    silent = [_relative(path) for path in FILES if TREES[path].body and ast.get_docstring(TREES[path]) is None]
    assert silent == []


def test_no_mixins() -> None:
    classes = ((path, node) for path in FILES for node in _nodes(path, ast.ClassDef))
    assert _places((path, node) for path, node in classes if getattr(node, "name", "").endswith("Mixin")) == []


def test_no_global_state() -> None:
    assert _places((path, node) for path in FILES for node in _nodes(path, ast.Global)) == []


def test_no_init_file_in_the_folders_of_packages() -> None:
    # A kernels/__init__.py, seen from the working directory, breaks transformers, which imports a package of that name.
    forbidden = [ROOT / top / "__init__.py" for top in ("engine", "kernels", "client")]
    forbidden += [path for path in FILES if path.name == "__init__.py" and _is_in(path, "tests", "scripts")]
    assert [_relative(path) for path in forbidden if path.exists()] == []


def test_test_files_have_unique_names() -> None:
    # Without __init__.py files two tests of one name would be one module.
    names = [path.name for path in FILES if _is_in(path, "tests") and path.name.startswith("test_")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_files_are_named_after_what_they_hold() -> None:
    assert [_relative(path) for path in FILES if path.stem in FORBIDDEN_STEMS] == []


def test_the_environment_has_one_reader() -> None:
    readers: set[str] = set()
    for path in (path for path in FILES if _is_in(path, *PACKAGES)):
        names = {_dotted(node) for node in _nodes(path, ast.Attribute, ast.Name)}
        if names & {"os.environ", "os.environb", "os.getenv", "environ", "getenv"}:
            readers.add(_relative(path))
    assert readers - ENVIRONMENT_PASSERS == {ENVIRONMENT_READER}


def test_passers_of_the_environment_do_not_read_it() -> None:
    reads: list[str] = []
    for name in ENVIRONMENT_PASSERS:
        for node in _nodes(ROOT / name, ast.Subscript, ast.Attribute):
            value = node.value if isinstance(node, ast.Subscript | ast.Attribute) else node
            if _dotted(value) == "os.environ":
                reads.append(f"{name}:{getattr(node, 'lineno', 0)}")
    assert reads == []


def test_nothing_unpickles() -> None:
    found: list[str] = []
    for path in FILES:
        for node in _nodes(path, ast.Import, ast.ImportFrom, ast.Call):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and _dotted(node.func) in ("torch.load", "numpy.load", "np.load"):
                names = ["pickle"]
            if any(name.partition(".")[0] in UNPICKLERS for name in names):
                found.append(f"{_relative(path)}:{getattr(node, 'lineno', 0)}")
    assert found == []


def test_no_code_of_strangers_runs_in_the_packages() -> None:
    found: list[str] = []
    for path in (path for path in FILES if _is_in(path, *PACKAGES)):
        for node in _nodes(path, ast.Call):
            assert isinstance(node, ast.Call)
            keywords = {keyword.arg for keyword in node.keywords}
            if _dotted(node.func).endswith("from_pretrained") or "trust_remote_code" in keywords:
                found.append(f"{_relative(path)}:{node.lineno}")
    assert found == []


def test_models_of_the_repository_hold_no_logic() -> None:
    models = sorted((ROOT / "model_repository").glob("*/*/model.py"))
    for path in models:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MAX_MODEL_LINES, _relative(path)
        branches = (ast.If, ast.For, ast.While, ast.Try, ast.With)
        assert not list(_nodes(path, *branches)), _relative(path)
        # What lies beside a model.py becomes a top-level module of its process.
        assert [item.name for item in path.parent.glob("*.py")] == ["model.py"], _relative(path)


def test_todos_name_their_issue() -> None:
    bare = re.compile(r"\b(?:TODO|FIXME|XXX)\b(?!\(#\d+\))")
    own = Path(__file__).resolve()
    found = [
        f"{_relative(path)}:{number}"
        for path in FILES
        if path != own
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if bare.search(line)
    ]
    assert found == []
