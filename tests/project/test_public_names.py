"""Public names of the package: complete, imported only when used; old module names warn and still work."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import medmamba
from medmamba import _moved

PACKAGE = Path(medmamba.__file__).parent


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_public_names_resolve_and_are_declared_for_type_checkers():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    declared = {alias.name for statement in block.body for alias in statement.names}
    assert set(medmamba.__all__) == {*medmamba._HOME, "__version__"} == {*declared, "__version__"}
    assert set(medmamba.__all__) <= set(dir(medmamba))
    for name in (*medmamba.__all__, *medmamba._PACKAGES):
        assert getattr(medmamba, name) is not None
    assert set(medmamba._PACKAGES) <= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_importing_the_package_and_asking_its_version_import_no_pytorch():
    heavy = "print([name for name in ('torch', 'numpy', 'PIL', 'huggingface_hub') if name in sys.modules])"
    assert run(f"import sys, medmamba; {heavy}").strip() == "[]"
    command = f"""
import sys
from medmamba.__main__ import main
try:
    main(["--version"])
except SystemExit:
    pass
{heavy}
"""
    version, loaded = run(command).splitlines()
    assert medmamba.__version__ in version and loaded == "[]"


def test_every_old_module_name_warns_once_and_is_the_new_module():
    code = """
import importlib, warnings
from medmamba import _moved

for old, new in _moved.MODULES.items():
    try:
        expected = importlib.import_module(f"medmamba.{new}")
    except ImportError as error:
        if str(error).startswith("No module named 'medmamba"):
            raise
        print(old, "needs", error)
        continue
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [importlib.import_module(f"medmamba.{old}") for _ in range(2)]
    said = [str(w.message) for w in caught if w.category is DeprecationWarning and "old name" in str(w.message)]
    assert len(said) == 1 and f"medmamba.{old} is now medmamba.{new}" in said[0], (old, said)
    assert found == [expected, expected], old
    print(old)
"""
    assert {line.split()[0] for line in run(code).splitlines()} == set(_moved.MODULES)


def test_no_old_name_hides_a_module():
    for old in _moved.MODULES:
        path = PACKAGE.joinpath(*old.split("."))
        assert not path.with_suffix(".py").exists() and not path.is_dir(), old


def test_the_warning_points_at_the_import(tmp_path):
    (tmp_path / "script.py").write_text("from medmamba.unusual import Unusual\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "always::DeprecationWarning", tmp_path / "script.py"],
        cwd=PACKAGE.parent,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "script.py:1: DeprecationWarning: medmamba.unusual is now medmamba.inference" in done.stderr, done.stderr


def test_unknown_names_are_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = medmamba.nothing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("medmamba.nothing")
