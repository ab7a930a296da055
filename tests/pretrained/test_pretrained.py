"""Saving, and loading from a folder, a zip, an fsspec address and the Hub, whose server here is on loopback."""

import json
import os
import zipfile
from pathlib import Path

import fsspec
import pytest
import torch
from pretrained_folders import flip, same

from medmamba import ConfigError, MedMamba, PretrainedError, create_model
from medmamba.pretrained import fetch, read_config, read_weights
from medmamba.pretrained.sources import ATTEMPTS

# --- a folder -------------------------------------------------------------------------------------------------------


def test_round_trip_keeps_weights_and_configuration(tiny_model, folder):
    loaded = MedMamba.from_pretrained(folder)
    assert same(loaded, tiny_model)
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    expected = tiny_model.config.to_dict() | {"medmamba_version": loaded.config.medmamba_version}
    assert loaded.config.to_dict() == expected and loaded.config.medmamba_version


def test_half_precision_halves_the_file_and_keeps_the_scan_exact(tiny_model, folder, tmp_path):
    half = tiny_model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert (half / "model.safetensors").stat().st_size < 0.75 * (folder / "model.safetensors").stat().st_size
    loaded, exact = MedMamba.from_pretrained(half).state_dict(), tiny_model.state_dict()
    assert all(t.dtype == exact[k].dtype for k, t in loaded.items())
    assert all(torch.equal(loaded[k], exact[k]) for k in exact if k.endswith(("A_log", ".D", "dt_bias")))
    assert all(torch.allclose(loaded[k].float(), exact[k].float(), rtol=1e-3, atol=1e-6) for k in exact)


def test_saved_over_itself_after_a_change(tiny_model, folder):
    tiny_model.reset_classifier(5)
    tiny_model.save_pretrained(folder)
    assert MedMamba.from_pretrained(folder).config.num_classes == 5
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["custom", "my_own-net", "small-paper"])
def test_the_name_of_the_architecture_survives(name, tmp_path):
    model = create_model("test", num_classes=2, architecture=name)
    assert read_config(model.save_pretrained(tmp_path)).architecture == name


def test_configurations_of_earlier_versions_load(tiny_model, folder):
    data = {**tiny_model.config.to_dict(), "architecture": "test"}  # without checksum and without what timm reads
    (folder / "config.json").write_text(json.dumps(data))
    assert same(MedMamba.from_pretrained(folder), tiny_model)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), PretrainedError, "has no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), PretrainedError, "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), ConfigError, "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), ConfigError, "expected an object"),
        (lambda f: edit(f, model_type="vit"), ConfigError, "not a MedMamba config"),
        (lambda f: edit(f, hat="red"), ConfigError, r"unknown fields \['hat'\]"),
        (lambda f: edit(f, dims=[8, 16, 32, 65]), ConfigError, "even"),
        (lambda f: edit(f, num_classes=4, id2label={}), PretrainedError, r"head.weight is \(3, 64\), expected \(4"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), PretrainedError, "does not match its checksum"),
        (lambda f: flip(f / "model.safetensors"), PretrainedError, "does not match its checksum"),
        (lambda f: create_model("test", num_classes=3).save_pretrained(f / "x") and (f / "x/model.safetensors").replace(
            f / "model.safetensors"), PretrainedError, "not the file that config.json was saved with"),
        (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
         PretrainedError, "git lfs pull"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_with_the_reason(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        MedMamba.from_pretrained(folder)


def test_weights_without_a_recorded_checksum_must_still_be_whole(folder):
    edit(folder, weights_sha256=None)
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(PretrainedError, match="damaged or truncated"):
        MedMamba.from_pretrained(folder)


def test_strict_about_missing_and_unknown_tensors(tiny_model, folder):
    from safetensors.torch import save_file

    tensors = read_weights(folder)
    tensors["extra.weight"] = tensors.pop("head.bias")
    save_file(tensors, folder / "model.safetensors")
    edit(folder, weights_sha256=None)
    with pytest.raises(PretrainedError, match=r"missing head.bias; unexpected extra.weight"):
        MedMamba.from_pretrained(folder)


def test_a_folder_with_a_pickle_names_the_converter(tmp_path):
    torch.save({}, tmp_path / "weights.pth")
    with pytest.raises(PretrainedError, match="load_upstream"):
        MedMamba.from_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match="load_upstream"):
        MedMamba.from_pretrained(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["no/such/folder", Path("nowhere"), "./nowhere"])
def test_a_name_that_is_nowhere_says_what_exists(name):
    with pytest.raises(PretrainedError, match="Models that come with medmamba"):
        MedMamba.from_pretrained(name)


def test_a_revision_needs_the_hub(folder):
    with pytest.raises(PretrainedError, match="is for models on the Hub"):
        MedMamba.from_pretrained(folder, revision="v2")


# --- zips and addresses ---------------------------------------------------------------------------------------------


def zipped(folder: Path, target: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.iterdir():
            archive.write(path, inside + path.name)
    return target


@pytest.mark.parametrize("inside", ["", "eye-v2/"])
def test_a_zip_loads_and_is_unpacked_once(tiny_model, folder, tmp_path, inside):
    file = zipped(folder, tmp_path / "eye.zip", inside)
    first = fetch(file, cache_dir=tmp_path / "cache")
    assert same(MedMamba.from_pretrained(file, cache_dir=tmp_path / "cache"), tiny_model)
    assert fetch(str(file), cache_dir=tmp_path / "cache") == first
    assert sorted(p.name for p in (tmp_path / "cache").rglob("*.safetensors")) == ["model.safetensors"]


def test_a_bad_zip_is_refused_with_the_reason(folder, tmp_path):
    def refuses(file: Path, message: str) -> None:
        with pytest.raises(PretrainedError, match=message):
            fetch(file, cache_dir=tmp_path / "cache")

    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        for inside in ("a/", "b/", "../evil/"):
            for path in folder.iterdir():
                archive.write(path, inside + path.name)
    refuses(tmp_path / "two.zip", r"holds 3: \.\./evil/, a/, b/")
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refuses(tmp_path / "none.zip", "holds none")
    file = zipped(folder, tmp_path / "damaged.zip")
    flip(file)
    refuses(file, "damaged")
    os.truncate(file, 3000)
    refuses(file, "is not a folder or zip")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_an_fsspec_address_is_kept_and_works_offline_later(tiny_model, folder, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/eye", recursive=True)
    options = dict(cache_dir=tmp_path / "cache")
    assert same(MedMamba.from_pretrained("memory://bucket/eye", **options), tiny_model)
    try:
        tiny_model.reset_classifier(7)
        tiny_model.save_pretrained(tmp_path / "new")
        memory.put(f"{tmp_path}/new/", "/bucket/eye/", recursive=True)
        assert MedMamba.from_pretrained("memory://bucket/eye/", **options).config.num_classes == 7
        memory.rm("/bucket", recursive=True)
        with pytest.raises(PretrainedError, match="nor a zip"):
            MedMamba.from_pretrained("memory://bucket/eye", **options)
        newest = MedMamba.from_pretrained("memory://bucket/eye", local_files_only=True, **options)
        assert newest.config.num_classes == 7
        with pytest.raises(PretrainedError, match="is not in the local cache"):
            fetch("memory://bucket/ear", local_files_only=True, **options)
    finally:
        memory.store.clear()


def test_an_address_of_a_zip_and_a_chained_one(tiny_model, folder, tmp_path):
    file = zipped(folder, tmp_path / "eye.zip")
    for address in (f"file://{file}", f"zip://::file://{file}", f"local://{folder}"):
        assert same(MedMamba.from_pretrained(address, cache_dir=tmp_path / "cache"), tiny_model), address


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("wolf://x/y", "Protocol not known: wolf"),
        ("gs://bucket/eye", "needs another package: .*gcsfs"),
        ("file:///no/such", "nor a zip"),
    ],
)
def test_an_unreadable_address_is_named(address, message, tmp_path):
    with pytest.raises(PretrainedError, match=message):
        fetch(address, cache_dir=tmp_path)


def test_an_address_that_arrives_damaged_is_asked_again_then_named(folder, tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    MemoryFileSystem().put(str(folder), "/damaged", recursive=True)
    honest, calls = MemoryFileSystem.get_file, []

    def get_file(self, source, target, **options):
        calls.append(source)
        honest(self, source, target, **options)
        if source.endswith(".safetensors") and len(calls) < limit:
            flip(Path(target))

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    try:
        limit = 4  # the second copy of the weights is whole
        assert fetch("memory://damaged", cache_dir=tmp_path).is_dir() and len(calls) == 4
        limit, calls = 1000, []
        with pytest.raises(PretrainedError, match="was damaged in"):
            fetch("memory://damaged", cache_dir=tmp_path / "other")
        assert len(calls) == 2 * ATTEMPTS
    finally:
        MemoryFileSystem.store.clear()


def test_what_a_model_says_of_itself_comes_out_of_zips_and_addresses(folder, tmp_path):
    (folder / "results.json").write_text('{"splits": {}}')
    (folder / "notes.txt").write_text("nobody asked for these")
    file = zipped(folder, tmp_path / "eye.zip", "eye/")
    for address in (file, f"file://{folder}", f"file://{file}"):
        found = fetch(address, cache_dir=tmp_path / "cache")
        assert (found / "results.json").read_text() == '{"splits": {}}', address
        assert sorted(p.name for p in found.iterdir()) == ["config.json", "model.safetensors", "results.json"]


# --- the Hub --------------------------------------------------------------------------------------------------------


def edit(folder: Path, **changes) -> None:
    """Changes config.json; None removes a key."""
    data = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
