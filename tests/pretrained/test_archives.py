"""Models from zips and without a network: limits, links, spellings of paths, and how long it takes to say no."""

import errno
import json
import os
import socket
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from hub_server import connect, serve

from medmamba import ConfigError, MedMamba, PretrainedError, create_model
from medmamba.pretrained import fetch
from medmamba.pretrained.archives import MAX_CONFIG
from medmamba.utils.network import unreachable


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    return tiny_model.save_pretrained(tmp_path / "saved")


def zip_of(target: Path, members: dict, compression=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}


def left(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def zeros(path: Path, megabytes: int) -> bytes:
    """A safetensors file of one tensor of zeros."""
    size = megabytes * 2**20
    header = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    return path.read_bytes()


def test_weights_larger_than_the_configuration_makes_them_are_never_unpacked(folder, tmp_path):
    bomb = files(folder) | {"model.safetensors": zeros(tmp_path / "zeros", 80)}
    file = zip_of(tmp_path / "bomb.zip", bomb)
    assert file.stat().st_size < 2**20
    with pytest.raises(PretrainedError, match="does not match its configuration"):
        MedMamba.from_pretrained(file, cache_dir=tmp_path / "cache")
    assert not left(tmp_path / "cache")


def test_a_zip_that_packs_as_no_model_does_is_refused(tmp_path):
    model = create_model("test", num_classes=3, dims=(64, 128, 256, 512))
    for parameter in (*model.parameters(), *model.buffers()):
        parameter.data.zero_()
    file = zip_of(tmp_path / "zeros.zip", files(model.save_pretrained(tmp_path / "saved")))
    with pytest.raises(PretrainedError, match="times its size"):
        fetch(file, cache_dir=tmp_path / "cache")
    assert not left(tmp_path / "cache")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"config.json": b" " * (MAX_CONFIG + 1)}, PretrainedError, "unpacks to more than 8 MiB"),
        ({"config.json": b'{"model_type": "vit"}'}, ConfigError, "not a MedMamba config"),
        ({"config.json": b"{"}, ConfigError, "not valid JSON"),
        ({"model.safetensors": b"\xff" * 100}, PretrainedError, "does not start like a safetensors file"),
        ({"model.safetensors": b""}, PretrainedError, "does not start"),
        ({"model.safetensors": struct.pack("<Q", 2) + b"{}" + b"x" * 90}, PretrainedError, "only 0 tensors"),
        ({"unusual.json": b" " * (2**26 + 1)}, PretrainedError, "unpacks to more than 64 MiB"),
    ],
)
def test_nothing_is_left_of_a_zip_that_is_refused(folder, tmp_path, changed, error, message):
    file = zip_of(tmp_path / "bad.zip", files(folder) | changed)
    with pytest.raises(error, match=message):
        fetch(file, cache_dir=tmp_path / "cache")
    with pytest.raises((PretrainedError, ConfigError), match=message):
        fetch(f"file://{file}", cache_dir=tmp_path / "cache")
    assert not left(tmp_path / "cache")


def test_links_and_names_that_stand_twice_are_refused(folder, tmp_path):
    link = zipfile.ZipInfo("config.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
        archive.write(folder / "model.safetensors", "model.safetensors")
    with pytest.raises(PretrainedError, match="is a symbolic link"):
        fetch(tmp_path / "link.zip", cache_dir=tmp_path / "cache")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.write(folder / "config.json", "config.json")
        archive.write(folder / "model.safetensors", "model.safetensors")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.write(folder / "config.json", "config.json")
    with pytest.raises(PretrainedError, match="twice"):
        fetch(tmp_path / "two.zip", cache_dir=tmp_path / "cache")


def test_a_zip_with_the_backslashes_of_windows_loads(folder, tmp_path):
    file = zip_of(tmp_path / "windows.zip", {f"eye\\{name}": content for name, content in files(folder).items()})
    assert MedMamba.from_pretrained(file, cache_dir=tmp_path / "cache").config.num_classes == 3


def test_a_header_that_lies_about_its_length_is_refused(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[:8] = struct.pack("<Q", 2**62)
    (folder / "model.safetensors").write_bytes(content)
    data = json.loads((folder / "config.json").read_text())
    del data["weights_sha256"]
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(PretrainedError, match="does not start"):
        MedMamba.from_pretrained(folder)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_cache_that_cannot_be_written_says_what_to_do(folder, tmp_path, monkeypatch, number):
    file = zip_of(tmp_path / "eye.zip", files(folder))
    honest = Path.mkdir

    def mkdir(self, *args, **options):
        if "cache" in self.parts:
            raise OSError(number, os.strerror(number), str(self))
        return honest(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(PretrainedError, match="HF_HOME, or cache_dir") as info:
        fetch(file, cache_dir=tmp_path / "cache")
    assert ("disk is full" in str(info.value)) == (number == errno.ENOSPC)


# --- no network ---


def no_names(*args, **options):
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


def test_a_host_that_has_no_address_is_noticed_at_once(monkeypatch, tmp_path):
    from huggingface_hub import constants

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(PretrainedError, match=r"hub\.invalid cannot be resolved.*Models that come with medmamba"):
        MedMamba.from_pretrained("org/unknown", cache_dir=tmp_path)
    with pytest.raises(PretrainedError, match=r"python -m hub\.make organamnist"):
        MedMamba.from_pretrained("medmamba/organamnist", cache_dir=tmp_path)
    with pytest.raises(PretrainedError, match="cannot be downloaded"):
        MedMamba.from_pretrained("org/unknown", cache_dir=tmp_path, force_download=True)
    assert waits == [], "nothing is tried again"


def test_what_is_cached_loads_without_a_network(folder, monkeypatch, tmp_path):
    with serve() as hub:
        connect(hub, monkeypatch, tmp_path / "home")
        hub.commit("org/eye", "main", files(folder), "first")
        fetch("org/eye")
    # The server is gone: connections are refused.
    assert MedMamba.from_pretrained("org/eye").config.num_classes == 3
    with pytest.raises(PretrainedError, match="no connection to 127"):
        fetch("org/other")


def test_reachable_servers_and_proxies_are_left_to_the_client(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert unreachable(f"http://127.0.0.1:{server.getsockname()[1]}") is None
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    assert unreachable("https://hub.invalid") is None
    assert "cannot be resolved" in unreachable("http://hub.invalid")
