"""Saving, and loading from a folder, a zip, an fsspec address and the Hub, whose server here is on loopback."""

import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import fsspec
import pytest
import torch
from hub_server import TOKEN, connect, serve

from medmamba import ConfigError, MedMamba, PretrainedError, create_model
from medmamba.pretrained import fetch, read_config, read_weights
from medmamba.pretrained.sources import ATTEMPTS

CUT = {"cut": "closed half-way", "reset": "reset half-way", "stall": "silent half-way", "corrupt": "one byte changed"}


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    return tiny_model.save_pretrained(tmp_path / "saved")


@pytest.fixture
def hub(monkeypatch, tmp_path, folder):
    """A Hub with one model, org/eye, in two revisions."""
    with serve() as hub:
        connect(hub, monkeypatch, tmp_path / "home")
        hub.commit("org/eye", "main", files_of(folder), "first")
        hub.commit("org/eye", "v2", files_of(folder), "second")
        yield hub


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(a: MedMamba, b: MedMamba) -> bool:
    a_state, b_state = a.state_dict(), b.state_dict()
    return a_state.keys() == b_state.keys() and all(torch.equal(a_state[k], b_state[k]) for k in a_state)


# --- a folder ---


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


# --- zips and addresses ---


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


# --- the Hub ---


def test_by_name_revision_and_commit(hub, tiny_model):
    for name, options in [
        ("org/eye", {}),
        ("org/eye@v2", {}),
        ("org/eye", {"revision": "v2"}),
        ("hf-hub:org/eye", {}),
        ("hf://org/eye@v2", {}),
    ]:
        assert same(MedMamba.from_pretrained(name, **options), tiny_model)
    commit = hub.repos["org/eye"].branches["v2"]
    hub.log.clear()
    assert same(MedMamba.from_pretrained(f"org/eye@{commit}"), tiny_model)
    assert hub.log == []  # a cached commit needs no network


def test_a_new_commit_on_a_branch_is_taken(hub, tmp_path):
    assert MedMamba.from_pretrained("org/eye").config.num_classes == 3
    create_model("test", num_classes=9).save_pretrained(tmp_path / "new")
    hub.commit("org/eye", "main", files_of(tmp_path / "new"), "third")
    assert MedMamba.from_pretrained("org/eye").config.num_classes == 9
    assert MedMamba.from_pretrained("org/eye", local_files_only=True).config.num_classes == 9


def test_a_branch_that_moves_on_while_it_is_read_gives_one_commit(hub, tiny_model, tmp_path, monkeypatch):
    import huggingface_hub

    create_model("test", num_classes=9).save_pretrained(tmp_path / "new")
    honest = huggingface_hub.hf_hub_download

    def download(repo, file, **options):
        path = honest(repo, file, **options)
        if file == "config.json":
            hub.commit("org/eye", "main", files_of(tmp_path / "new"), "third")
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert same(MedMamba.from_pretrained("org/eye"), tiny_model)


def test_what_a_model_says_of_itself_comes_from_the_hub_when_asked_for(hub, folder):
    hub.commit("org/eye", "told", files_of(folder) | {"results.json": b"{}", "other.json": b"{}"}, "told")
    assert not (fetch("org/eye@told") / "results.json").exists()
    found = fetch("org/eye@told", sidecars=True)
    assert sorted(p.name for p in found.iterdir()) == ["config.json", "model.safetensors", "results.json"]
    assert not hub.requests("", "other.json")
    hub.log.clear()
    assert fetch("org/eye@told", local_files_only=True, sidecars=True) == found and hub.log == []
    assert fetch("org/eye", sidecars=True).is_dir()  # has none


def test_offline_from_the_cache(hub, tiny_model):
    with pytest.raises(PretrainedError, match="not in the local cache"):
        MedMamba.from_pretrained("org/eye", local_files_only=True)
    assert hub.log == []
    MedMamba.from_pretrained("org/eye")
    hub.log.clear()
    assert same(MedMamba.from_pretrained("org/eye", local_files_only=True), tiny_model)
    assert hub.log == []
    hub.fail("status", value=503, method="HEAD", times=99)
    assert same(MedMamba.from_pretrained("org/eye"), tiny_model)  # the Hub is down, the cache is not


def test_private_needs_the_token_and_says_so(hub, folder, monkeypatch):
    hub.commit("org/secret", "main", files_of(folder), "first", private=True)
    with pytest.raises(PretrainedError, match="that you may read"):
        fetch("org/secret")
    with pytest.raises(PretrainedError, match="rejects your token") as info:
        fetch("org/secret", token="hf_wrong")
    assert "hf_wrong" not in str(info.value)
    assert fetch("org/secret", token=TOKEN).is_dir()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch("org/secret", force_download=True).is_dir()
    assert not any(authorised for _, path, authorised in hub.log if path.startswith("/cdn/"))  # a host of its own


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/ear", "there is no model 'org/ear'"),
        ("org/eye@v9", "has no revision 'v9'"),
        ("org/empty", "is not a medmamba model"),
        ("no-such-bundled-model", "there is no model 'medmamba/no-such-bundled-model'"),
        ("org/e\u00e9", "neither a folder nor a model name"),
    ],
)
def test_what_is_not_there_is_named(hub, name, message):
    hub.commit("org/empty", "main", {"README.md": b"# nothing"}, "first")
    with pytest.raises(PretrainedError, match=message):
        fetch(name)


@pytest.mark.parametrize("kind", CUT)
def test_a_broken_download_is_tried_again(hub, tiny_model, kind):
    hub.fail(kind, "/cdn/", value=0.6)
    hub.fail(kind, "config.json", value=0.6)
    assert same(MedMamba.from_pretrained("org/eye"), tiny_model)
    assert hub.faults[0].times == hub.faults[1].times == 0
    assert len(hub.requests("GET", "/cdn/")) == 2


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_server_fault_is_tried_again(hub, tiny_model, status):
    hub.fail("status", "/cdn/", value=status)
    assert same(MedMamba.from_pretrained("org/eye"), tiny_model)


def test_rate_limits_are_waited_for(hub, tiny_model):
    hub.fail("status", "/cdn/", value=429, headers={"Retry-After": "1"})
    assert same(MedMamba.from_pretrained("org/eye"), tiny_model)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (dict(kind="cut", path="/cdn/"), "failed after retries"),
        (dict(kind="reset", path="/cdn/"), "failed after retries"),
        pytest.param(
            dict(kind="stall", path="/cdn/", value=0.4), "failed after retries.*timed out", marks=pytest.mark.slow
        ),
        (dict(kind="corrupt", path="/cdn/"), "damaged: model.safetensors does not match its checksum"),
        (dict(kind="corrupt", path="config.json"), "damaged: config.json does not match its checksum"),
        (dict(kind="status", path="/cdn/", value=500), "failed after retries.*500"),
        (dict(kind="status", path="/cdn/", value=429), "HTTP 429"),
        (dict(kind="status", path="config.json", method="HEAD", value=503), "cannot be reached.*503"),
        (dict(kind="status", path="config.json", method="HEAD", value=403), "cannot be reached.*403|HTTP 403"),
    ],
)
def test_a_download_that_never_works_is_named_and_leaves_nothing(hub, fault, message, tmp_path):
    hub.fail(**fault, times=99)
    with pytest.raises(PretrainedError, match=message):
        MedMamba.from_pretrained("org/eye")
    hub.faults.clear()
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    assert MedMamba.from_pretrained("org/eye").config.num_classes == 3


def test_a_cached_file_that_was_damaged_later_is_fetched_again(hub, tiny_model):
    weights = fetch("org/eye") / "model.safetensors"
    flip(weights.resolve())
    with pytest.raises(PretrainedError, match=r"damaged.*force_download"):
        fetch("org/eye", local_files_only=True)
    assert same(MedMamba.from_pretrained("org/eye"), tiny_model)


def test_weights_published_beside_a_foreign_configuration_are_refused_at_once(hub, folder, tmp_path):
    other = create_model("test", num_classes=3).save_pretrained(tmp_path / "other")
    mixed = files_of(folder) | {"model.safetensors": (other / "model.safetensors").read_bytes()}
    hub.commit("org/mixed", "main", mixed, "mixed")
    with pytest.raises(PretrainedError, match=r"is not the one that its config\.json was saved"):
        fetch("org/mixed")
    assert len(hub.requests("GET", "/cdn/")) == 1


def test_concurrent_loads_share_a_cache(hub, tiny_model):
    hub.fail("cut", "/cdn/", times=2)
    results: list = []

    def load() -> None:
        try:
            results.append(same(MedMamba.from_pretrained("org/eye"), tiny_model))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 6


def test_a_mirror_by_environment_and_two_processes_in_one_cache(hub, tiny_model, tmp_path):
    code = (
        "from medmamba import MedMamba; m = MedMamba.from_pretrained('org/eye');"
        "print(float(sum(p.detach().double().abs().sum() for p in m.parameters())))"
    )
    cache = tmp_path / "home" / "hub"  # of this process too
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}
    other = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    while other.poll() is None and not hub.log:
        threading.Event().wait(0.01)  # it is still importing
    for _ in range(8):  # replaces the files that the other process is reading
        assert same(MedMamba.from_pretrained("org/eye", force_download=True), tiny_model)
    other.wait(timeout=60)
    expected = float(sum(p.detach().double().abs().sum() for p in tiny_model.parameters()))
    assert other.returncode == 0 and float(other.stdout.read()) == pytest.approx(expected, rel=1e-12)
    other.stdout.close()


def test_push_to_hub_is_one_commit_and_loads_back(hub, tiny_model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    url = tiny_model.push_to_hub("org/pushed", private=True)
    assert url.startswith(f"{hub.url}/org/pushed/commit/")
    assert hub.repos["org/pushed"].private and len(hub.repos["org/pushed"].commits) == 2  # initial, ours
    assert same(MedMamba.from_pretrained("org/pushed"), tiny_model)


def edit(folder: Path, **changes) -> None:
    """Changes config.json; None removes a key."""
    data = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
