"""Models from the Hub, served on this machine: downloads, caches, faults and uploads."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hub_server import TOKEN, connect, serve
from pretrained_folders import flip, same

from medmamba import MedMamba, PretrainedError, create_model
from medmamba.pretrained import fetch

CUT = {"cut": "closed half-way", "reset": "reset half-way", "stall": "silent half-way", "corrupt": "one byte changed"}


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


@pytest.mark.slow
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
    other.wait(timeout=240)
    expected = float(sum(p.detach().double().abs().sum() for p in tiny_model.parameters()))
    assert other.returncode == 0 and float(other.stdout.read()) == pytest.approx(expected, rel=1e-12)
    other.stdout.close()


def test_push_to_hub_is_one_commit_and_loads_back(hub, tiny_model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    url = tiny_model.push_to_hub("org/pushed", private=True)
    assert url.startswith(f"{hub.url}/org/pushed/commit/")
    assert hub.repos["org/pushed"].private and len(hub.repos["org/pushed"].commits) == 2  # initial, ours
    assert same(MedMamba.from_pretrained("org/pushed"), tiny_model)
