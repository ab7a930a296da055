"""What people install: an archive of the source, the wheel that is built from it, and the model inside."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import medmamba

pytest.importorskip("hatchling", reason="needs the extra: pip install 'medmamba[dev]'")

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = medmamba.DEFAULT_MODEL.removeprefix("medmamba/")
LARGEST = 10 * 2**20  # bytes; the models of hub/models together have many times as many


def build(source: Path, kind: str, target: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the source archive, as the tools of the package index do."""
    folder = tmp_path_factory.mktemp("package")
    archive = build(ROOT, "sdist", folder / "sdist")
    assert archive.stat().st_size < LARGEST
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (source,) = folder.glob("medmamba-*")
    return build(source, "wheel", folder / "wheel")


def test_the_wheel_holds_the_package_and_one_model(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    models = {name.split("/")[2] for name in names if name.startswith("medmamba/weights/")}
    assert models == {BUNDLED}
    present = {name.rpartition("/")[2] for name in names if name.startswith("medmamba/weights/")}
    assert present == {path.name for path in (ROOT / "hub" / "models" / BUNDLED).iterdir()}
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2 and "medmamba" in tops, tops  # the other: metadata
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "medmamba").rglob("*")
        if path.is_file() and path.suffix in (".py", ".json", ".typed") and "__pycache__" not in path.parts
    }
    assert "medmamba/py.typed" in package
    assert package <= set(names)
    assert "medmamba/kernels/lib/linux-x86_64.so" in names and "medmamba/kernels/lib/windows-x86_64.dll" in names
    examples = {name.removeprefix("medmamba/examples/") for name in names if name.startswith("medmamba/examples/")}
    folder = ROOT / "demo" / "examples"
    beside = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert examples == {name for name in beside if not name.endswith(".zip")} and "README.md" in examples
    assert wheel.stat().st_size < LARGEST


@pytest.mark.slow
def test_installed_it_classifies_without_a_network_and_names_what_it_lacks(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"""
import medmamba
assert medmamba.__file__.startswith({str(tmp_path)!r}), medmamba.__file__
assert list(medmamba.bundled_models()) == [medmamba.DEFAULT_MODEL]
print(medmamba.MedMamba.from_pretrained(medmamba.DEFAULT_MODEL).predict(medmamba.example_image()).label)
try:
    medmamba.MedMamba.from_pretrained("medmamba/no-such-model")
except medmamba.PretrainedError as error:
    print(error)
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
    env |= {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    label, message = done.stdout.splitlines()
    assert label == "neutrophil"
    assert "not in the local cache" in message and medmamba.DEFAULT_MODEL in message
