"""The Space: a folder that holds all it needs, in which the app starts and answers."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import venv
from importlib import metadata
from pathlib import Path

import pytest
from demo_helpers import save_model

import medmamba

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')
gradio_client = pytest.importorskip("gradio_client")
httpx = pytest.importorskip("httpx")

from huggingface_hub import SpaceCard  # noqa: E402
from packaging.requirements import Requirement  # noqa: E402

from demo.options import EXAMPLES  # noqa: E402
from hub import space  # noqa: E402

ZERO_GPU_TORCH = ("2.8.0", "2.9.1", "2.10.0", "2.11.0")
ZERO_GPU_PYTHON = ("3.10", "3.12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model = save_model(tmp_path_factory.mktemp("models") / "blood-test")
    target = tmp_path_factory.mktemp("space") / "space"
    assert space.main(["build", str(target), "--models", str(model), "medmamba/pad-lesions"]) == 0
    return target


def requirements(folder: Path) -> list[Requirement]:
    lines = (folder / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_the_front_matter_is_what_the_hub_takes(folder):
    card = SpaceCard((folder / "README.md").read_text(encoding="utf-8")).data
    assert card.sdk == "gradio" and (folder / card.app_file).is_file()
    assert card.sdk_version == metadata.version("gradio"), "the version that was tested"
    assert str(card.python_version) in ZERO_GPU_PYTHON
    assert len(card.short_description) <= 60 and card.license == "apache-2.0"
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {card.colorFrom, card.colorTo} <= colours


def test_models_from_the_hub_are_preloaded(tmp_path):
    here = medmamba.DEFAULT_MODEL.removeprefix("medmamba/")  # of which the files are known
    space.build(tmp_path / "s", [f"org/{here}", "org/others@abc"], from_hub=True)
    card = SpaceCard((tmp_path / "s" / "README.md").read_text(encoding="utf-8")).data
    assert card.models == [f"org/{here}", "org/others"]
    assert card.preload_from_hub == [
        f"org/{here} config.json,model.safetensors,decisions.json,results.json,similar.safetensors,unusual.json",
        "org/others config.json,model.safetensors abc",
    ]
    assert not (tmp_path / "s" / "medmamba" / "weights").exists()
    with pytest.raises(space.SpaceError, match="org/name"):
        space.build(tmp_path / "t", ["bloodmnist"], from_hub=True)


def test_all_models_of_a_clone_are_on_offer_the_default_first(tmp_path, monkeypatch):
    models = {}
    for name in ("alpha-test", "beta-test", "gamma-test"):
        save_model(tmp_path / "models" / name)
        (tmp_path / "models" / name / "unusual.json").write_text("{}")
        models[f"medmamba/{name}"] = tmp_path / "models" / name
    for name, kind in (("alpha-boxes", "detector"), ("beta-masks", "segmenter")):
        shutil.copytree(tmp_path / "models" / "alpha-test", tmp_path / "models" / name)
        (tmp_path / "models" / name / "config.json").write_text(json.dumps({"model_type": f"medmamba-{kind}"}))
        models[f"medmamba/{name}"] = tmp_path / "models" / name
    monkeypatch.setattr(space, "bundled_models", lambda: models)
    monkeypatch.setattr(space, "DEFAULT_DENSE", "medmamba/beta-masks")
    monkeypatch.setattr(space, "DEFAULT_MODEL", "medmamba/beta-test")
    files = space.build(tmp_path / "s")
    order = re.search(r"Options\(\((.+?)\)", (tmp_path / "s" / "app.py").read_text())[1]
    names = ["beta-test", "alpha-test", "gamma-test", "beta-masks", "alpha-boxes"]
    assert re.findall(r"'(.+?)'", order) == [f"medmamba/{name}" for name in names]
    assert len([path for path in files if path.name == "model.safetensors"]) == 5
    assert len([path for path in files if path.name == "unusual.json"]) == 5


def test_requirements_are_those_of_the_package_and_of_zero_gpu(folder):
    listed = {r.name: r for r in requirements(folder)}
    assert str(listed["torch"].specifier).removeprefix("==") in ZERO_GPU_TORCH
    assert not {"mamba-ssm", "causal-conv1d", "gradio", "spaces"} & set(listed)
    project = pytest.importorskip("tomllib").loads((space.ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    used = ("demo", "explain", "dicom", "train", "report", "segment")
    texts = project["dependencies"] + [text for extra in used for text in extras[extra]]
    declared = {r.name: r for r in map(Requirement, texts)}
    # Without use there, installed by the Hub, and in the folder itself.
    unused = {"tensorboard", "nibabel", "pycocotools", "gradio", "medmamba"}
    assert set(declared) - set(listed) == unused
    torch_minor, vision_minor = (int(str(listed[name].specifier).split(".")[1]) for name in ("torch", "torchvision"))
    assert vision_minor == torch_minor + 15, "torchvision 0.25 is of torch 2.10"
    for name, requirement in listed.items():
        assert name in ("torch", "torchvision") or requirement.specifier == declared[name].specifier, name


def test_what_weasyprint_loads_is_installed_by_apt(folder):
    """The file is handed to apt-get as it is: names alone. Pango brings GObject, HarfBuzz and Fontconfig."""
    names = (folder / "packages.txt").read_text(encoding="ascii").splitlines()
    assert names == ["libpango-1.0-0", "libpangoft2-1.0-0", "libharfbuzz-subset0", "fonts-dejavu-core"]
    try:
        loader = Path(str(metadata.distribution("weasyprint").locate_file("weasyprint/text/ffi.py")))
    except metadata.PackageNotFoundError:
        pytest.skip('needs pip install "medmamba[report]"')
    loaded = set(re.findall(r"'lib([\w.-]+?)\.so\.\d+'", loader.read_text(encoding="utf-8")))
    here = {"gobject-2.0", "pango-1.0", "pangoft2-1.0", "harfbuzz", "harfbuzz-subset", "fontconfig"}
    optional = {"harfbuzz-vector"}  # without it, weasyprint draws as it did before
    assert here <= loaded <= here | optional


def test_nothing_is_in_it_that_does_not_belong(folder):
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    assert {"app.py", "README.md", "requirements.txt", "LICENSE", "demo/app.py", "medmamba/model/network.py"} <= set(
        files
    )
    assert "medmamba/weights/blood-test/model.safetensors" in files
    if "medmamba/nano-medical" in medmamba.bundled_models():
        assert "medmamba/weights/nano-medical/model.safetensors" in files
        assert "PUBLIC, ('medmamba/nano-medical',))" in (folder / "app.py").read_text(), "Fine-tune starts from it"
    assert "demo/examples/README.md" in files and "demo/README.md" not in files, "the images keep their sources"
    wrong = re.compile(r"__pycache__|\.pyc$|\.dll$|\.dylib$|/csrc/|\.pth$|\.pt$|\.pkl$")
    assert not [name for name in files if wrong.search(name)]
    assert max((folder / name).stat().st_size for name in files) < 10 * 2**20, "would need LFS"


def test_it_is_built_anew_but_nothing_foreign_is_deleted(folder, tmp_path):
    (folder / "demo" / "left_over.py").write_text("")
    (folder / ".git").mkdir()
    model = str(folder / "medmamba" / "weights" / "blood-test")
    copy = tmp_path / "blood-test"
    copy.mkdir()
    for path in Path(model).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    space.build(folder, [str(copy), "medmamba/pad-lesions"])
    assert (folder / ".git").is_dir() and not (folder / "demo" / "left_over.py").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    assert space.main(["build", str(tmp_path / "thesis"), "--models", str(copy)]) == 2
    assert (tmp_path / "thesis" / "thesis.tex").exists()
    assert space.main(["build", str(tmp_path / "x"), "--models", "nobody/nothing"]) == 2


def start_and_ask(python: str, folder: Path) -> tuple[dict, dict]:
    """Runs the Space as the Hub does, classifies an example, and outlines the lesion in another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("GRADIO", "PYTHON", "HF_"))}
    environment = {**keep, "GRADIO_SERVER_PORT": str(port), "SPACE_ID": "org/medmamba", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([python, "app.py"], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 240
        while True:
            assert process.poll() is None, "the Space ended by itself"
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
                break
            except httpx.TransportError:
                assert time.monotonic() < until, "the Space did not start"
                time.sleep(0.3)
        client = gradio_client.Client(f"http://127.0.0.1:{port}/", verbose=False)
        image = gradio_client.handle_file(str(EXAMPLES / "blood_monocyte.webp"))
        answer = client.predict(image, api_name="/classify")
        nevus = gradio_client.handle_file(str(EXAMPLES / "skin_nevus.webp"))
        return answer, client.predict(nevus, api_name="/segment")[0]
    finally:
        process.terminate()
        process.wait(120)


@pytest.mark.slow
def test_it_starts_from_its_own_folder_and_answers(folder):
    where = [sys.executable, "-c", "import medmamba; print(medmamba.__file__)"]
    found = subprocess.run(where, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found).is_relative_to(folder), "its own copy of the package, not the one installed here"
    pytest.importorskip("segmentation_models_pytorch")
    answer, outlined = start_and_ask(sys.executable, folder)
    assert answer["model"] == "medmamba/blood-test"
    model = medmamba.MedMamba.from_pretrained(folder / "medmamba" / "weights" / "blood-test")
    expected = dict(model.predict(EXAMPLES / "blood_monocyte.webp").top)
    assert answer["probabilities"] == pytest.approx(expected, abs=1e-4)
    assert outlined["model"] == "medmamba/pad-lesions"
    found = medmamba.MedMambaSegmenter.from_pretrained("medmamba/pad-lesions").predict(EXAMPLES / "skin_nevus.webp")
    assert outlined["classes"][0]["area"] == pytest.approx(found.to_dict()["classes"][0]["area"], rel=0.01)


@pytest.mark.skipif("MEDMAMBA_TEST_INSTALL" not in os.environ, reason="downloads gigabytes; MEDMAMBA_TEST_INSTALL=1")
@pytest.mark.timeout(1800)
def test_it_starts_in_a_clean_environment_from_its_requirements(folder, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    version = SpaceCard((folder / "README.md").read_text(encoding="utf-8")).data.sdk_version
    install = [python, "-m", "pip", "install", "--quiet", "-r", str(folder / "requirements.txt"), f"gradio=={version}"]
    subprocess.run(install, check=True)
    answer, outlined = start_and_ask(python, folder)
    assert answer["label"] and outlined["classes"][0]["area"] > 0
