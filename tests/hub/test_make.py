"""python -m hub.make against a loopback server that holds small copies of the sources, laid out as they are."""

import dataclasses
import io
import json
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("pooch", reason='needs pip install "medmamba[hub]"')

from dataset_server import PER_CLASS, kvasir, layout, serve

from hub import make as tool
from hub import make_download, make_sources
from hub.make import Making, has_seen, make, prepare
from hub.make_download import fetch, records
from hub.make_layouts import arrange
from hub.make_plan import measured_rate
from hub.make_sources import MakeError, mirrored, source_of
from medmamba import MedMamba
from medmamba.data import open_dataset, random_split, registry
from medmamba.pretrained.advice import how_to_make

PUBLIC = [name for name in registry.names() if registry.get(name).source.public]
PRIVATE = [name for name in registry.names() if not registry.get(name).source.public]
# Layout of each: class folders in a folder; an archive in an archive; archives in an archive and a table; a flat folder
# and a table with semicolons; two archives and a table of its own; arrays in colour, grey, of several labels, grades.
LAYOUTS = [
    ("kvasir", 28, False),
    ("cpn-xray", 28, False),
    ("pad-ufes-20", 28, False),
    ("fetal-planes-db", 28, False),
    ("dermamnist", 28, True),
    ("bloodmnist", 64, False),
    ("pneumoniamnist", 28, False),
    ("chestmnist", 28, False),
    ("retinamnist", 28, False),
]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(make_download, "PAUSE", 0.01)


def quiet(_: str) -> None:
    pass


def making(server, tmp_path: Path, name: str, size: int = 28, original: bool = False, **changes) -> Making:
    entry, source = layout(server, name, size, original)
    found = Making(entry, source, tmp_path, size, mirror=server.url, progress=False)
    return dataclasses.replace(found, **changes)


def arranged(run: Making) -> tuple[Path, list[str]]:
    files = fetch(run.source.downloads, run.downloads, run.mirror, False, quiet)
    return arrange(run.source, files, run.entry, run.arranged)


@pytest.mark.parametrize(("name", "size", "original"), LAYOUTS)
def test_every_layout_becomes_the_published_set(name, size, original, tmp_path) -> None:
    with serve() as server:
        run = making(server, tmp_path, name, size, original)
        place, notes = arranged(run)
        index, rule, said = prepare(run, place)
        assert not notes and f"all {run.entry.n_images} images" in said[0]
        assert index.classes == run.entry.classes and len(index) == run.entry.n_images
        assert (index.task == "ordinal") == (name == "retinamnist")
        if original:
            sides: dict[str, set] = {}
            for record in index.records:
                sides.setdefault(record.patient, set()).add(record.split)
            assert "by lesion" in rule and all(len(parts) == 1 for parts in sides.values())
            assert {key[:4] for key in sides} == {"HAM_"}
        else:
            assert index.split_sizes == dict(run.entry.splits)
        if run.entry.split_rule.kind == "random":
            again = random_split(open_dataset(place, dataset=run.entry), list(run.entry.splits.values()), 42)
            assert index.splits == again.splits and rule.startswith("published")
        if run.entry.class_counts:
            assert index.class_counts.tolist() == [PER_CLASS] * len(index.classes)
        asked = len(server.log)
        assert arranged(run)[0] == place and len(server.log) == asked  # nothing is fetched or unpacked twice


def test_labels_follow_the_table_and_not_the_archive(tmp_path) -> None:
    with serve() as server:
        place, _ = arranged(making(server, tmp_path, "pad-ufes-20"))
    assert sorted(path.name for path in (place / "SCC").iterdir())[0] == "PAT_40_0_40.png"
    assert {path.name for path in place.iterdir()} == set(registry.get("pad-ufes-20").classes)


def test_a_cut_download_goes_on_where_it_stopped(tmp_path) -> None:
    with serve() as server:
        run = making(server, tmp_path, "kvasir")
        (content,) = server.files.values()
        half = len(content) // 2
        server.cuts = [half]
        (path,) = fetch(run.source.downloads, run.downloads, run.mirror, False, quiet)
        assert path.read_bytes() == content
        assert [wanted for _, wanted in server.log] == ["", f"bytes={half}-"]
        row = records(run.downloads)["kvasir-dataset.zip"]
        assert row["bytes"] == len(content) and row["published_md5"] is None and len(row["sha256"]) == 64


def test_a_download_that_is_cut_again_and_again_is_kept_for_the_next_call(tmp_path) -> None:
    with serve() as server:
        run = making(server, tmp_path, "kvasir")
        (content,) = server.files.values()
        server.cuts = [1000] + [0] * (make_download.ATTEMPTS - 1)
        with pytest.raises(MakeError, match=r"cut off after 1,000 bytes.*Run the command again"):
            fetch(run.source.downloads, run.downloads, run.mirror, False, quiet)
        assert {path.name for path in run.downloads.iterdir()} == {
            ".kvasir-dataset.zip.part",
            ".kvasir-dataset.zip.part.tag",
        }
        server.log.clear()
        fetch(run.source.downloads, run.downloads, run.mirror, False, quiet)
        assert server.log[0][1] == "bytes=1000-" and (run.downloads / "kvasir-dataset.zip").read_bytes() == content
        assert {path.name for path in run.downloads.iterdir()} == {"kvasir-dataset.zip", "downloads.json"}


@pytest.mark.parametrize("change", ["no ranges", "another file"])
def test_the_rest_of_another_file_is_not_appended(change, tmp_path) -> None:
    with serve() as server:
        run = making(server, tmp_path, "kvasir")
        server.cuts = [1000] + [0] * (make_download.ATTEMPTS - 1)
        with pytest.raises(MakeError):
            fetch(run.source.downloads, run.downloads, run.mirror, False, quiet)
        server.ranges = change != "no ranges"
        (address,) = server.files
        if change == "another file":
            server.files[address] = kvasir(("polyps", "normal-cecum"))
        (path,) = fetch(run.source.downloads, run.downloads, run.mirror, False, quiet)
        assert path.read_bytes() == server.files[address]


def test_a_wrong_checksum_leaves_nothing(tmp_path) -> None:
    with serve() as server:
        run = making(server, tmp_path, "fetal-planes-db")
        (address,) = server.files
        server.files[address] += b"altered"
        with pytest.raises(MakeError, match=f"published is {run.source.downloads[0].md5}. Nothing of it was kept"):
            make(run, quiet)
        assert not list(run.downloads.iterdir()) and not (tmp_path / "data").exists()
        server.files[address] = server.files[address].removesuffix(b"altered")
        arranged(run)  # and the same call succeeds once the source is right


def test_a_missing_class_is_said_and_nothing_is_trained(tmp_path) -> None:
    with serve() as server:
        run = making(server, tmp_path, "kvasir")
        (address,) = server.files
        server.files[address] = kvasir(tuple(name for name in run.entry.classes if name != "esophagitis"))
        with pytest.raises(MakeError, match=r"esophagitis 0 of 10.*--allow partial"):
            make(run, quiet)
        assert not run.model.exists()
        place, _ = arranged(run)
        _, rule, _ = prepare(dataclasses.replace(run, allow={"partial"}), place)
        assert rule.startswith("made by make_splits")  # the published one cannot be drawn without all images


def test_a_damaged_or_unknown_archive_leaves_no_images(tmp_path) -> None:
    with serve() as server:
        run = making(server, tmp_path, "kvasir")
        (address,) = server.files
        whole = server.files[address]
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            last = archive.infolist()[-1]
        spoilt = bytearray(whole)
        spoilt[last.header_offset + 120] ^= 255
        for content, message in ((bytes(spoilt), "is damaged"), (b"<html>", "not a complete zip"),
                                 (kvasir(()), "no folder in the archive has the name of a class")):  # fmt: skip
            server.files[address] = content
            for path in run.downloads.glob("*"):
                path.unlink()
            with pytest.raises(MakeError, match=message):
                make(run, quiet)
            assert not list((tmp_path / "data").glob("*"))


def test_a_table_without_its_columns_or_images(tmp_path) -> None:
    with serve() as server:
        run = making(server, tmp_path, "dermamnist", original=True)
        files = fetch(run.source.downloads, run.downloads, run.mirror, False, quiet)
        whole = files[2].read_text()
        files[2].write_text(whole.replace("image_id", "picture"))
        with pytest.raises(MakeError, match="no column image_id"):
            arrange(run.source, files, run.entry, run.arranged)
        files[2].write_text(whole.replace(",mel,", ",melanom?,"))
        with pytest.raises(MakeError, match=r"no class of DermaMNIST: melanom\? \(10 images\)"):
            arrange(run.source, files, run.entry, run.arranged)
        files[2].write_text(whole)
        _, notes = arrange(run.source, [files[0], files[2]], run.entry, run.arranged)
        assert "35 images that are not in the archives" in notes[0]


def test_a_file_that_the_server_does_not_have(tmp_path) -> None:
    with serve() as server:
        run = making(server, tmp_path, "kvasir")
        server.files.clear()
        with pytest.raises(MakeError, match=r"HTTP 404.*--mirror"):
            make(run, quiet)


def test_every_public_set_has_a_source_and_the_others_say_whom_to_ask(capsys) -> None:
    assert len(PUBLIC) == 15 and set(PRIVATE) == {"cervical-us", "otoscopy2024"}
    for name in PUBLIC:
        source = source_of(registry.get(name))
        assert source.known_from and all(file.url.startswith("https://") for file in source.downloads)
        if name.endswith("mnist"):
            assert {source_of(registry.get(name), size).downloads[0].md5 for size in make_sources.SIZES} == set(
                registry.get(name).source.md5.values()
            )
    for name in PRIVATE:
        assert tool.main([name]) == 1
        assert "not public. Ask the authors" in capsys.readouterr().err
    assert mirrored("https://a.org/b/c.zip?x=1", "http://h:8/data/") == "http://h:8/data/a.org/b/c.zip?x=1"


def test_a_name_without_weights_says_the_command(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Exception, match=r"`python -m hub.make kvasir`"):
        MedMamba.from_pretrained("medmamba/kvasir", cache_dir=tmp_path, local_files_only=True)
    assert "`python -m hub.make pad-ufes-20`" in how_to_make("medmamba/pad_ufes_20")
    assert "Ask the authors" in how_to_make("medmamba/cervical-us")
    assert how_to_make("other/kvasir") == how_to_make("medmamba/nothing") == ""


def test_a_dry_run_fetches_nothing_and_computes_from_measured_rates(tmp_path, capsys) -> None:
    with serve() as server:
        making(server, tmp_path, "kvasir")
        (content,) = server.files.values()
        words = ["kvasir", "--out", str(tmp_path / "x"), "--dry-run", "--mirror", server.url]
        assert tool.main(words) == 0
        said = capsys.readouterr().out
        assert tool.main([*words, "--rate", "100"]) == 0
        own = capsys.readouterr().out
    assert f"{len(content) / 1e9:.2f} GB" in said and "no published checksum" in said
    rate, measured = measured_rate("tiny", 224)
    images = 2408 * 20
    assert rate and f"{images / rate / 3600:.2f} at most ({images:,} images" in said and measured in said
    assert f"{images / 100 / 3600:.2f} at most" in own
    assert not (tmp_path / "x").exists()


def test_a_start_that_has_seen_the_dataset_is_not_the_default(tmp_path, capsys) -> None:
    for variant in ("tiny", "nano"):
        seen = {name for name in PUBLIC if has_seen(f"medmamba/{variant}-medical", registry.get(name))}
        assert seen == {"bloodmnist", "breastmnist", "pneumoniamnist", "cpn-xray", "pad-ufes-20"}
    with serve() as server:
        for name, scratch in (("bloodmnist", True), ("kvasir", False)):
            layout(server, name)
            words = [name, "--out", str(tmp_path), "--dry-run", "--mirror", server.url, "--size", "28"]
            assert tool.main(words) == 0
            assert ("training starts from scratch" in capsys.readouterr().out) == scratch


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kvasir", "chestmnist"])
def test_from_the_download_to_a_model_ready_for_publishing(name, tmp_path) -> None:
    settings = {"epochs": 2, "batch_size": 16, "size": 32}
    with serve() as server:
        run = making(server, tmp_path, name, variant="test", settings=settings, options={"device": "cpu"})
        stopped = dataclasses.replace(run, options={"device": "cpu", "max_seconds": 0.0, "checkpoint_seconds": 0.0})
        assert not make(stopped, quiet)
        asked, said = len(server.log), []
        assert make(run, said.append)
        assert len(server.log) == asked and said[-1].startswith("ready: python -m hub.publish")
        before = (run.model / "model.safetensors").stat().st_mtime_ns
        assert make(run, quiet) and (run.model / "model.safetensors").stat().st_mtime_ns == before
    record = json.loads((run.model / "config.json").read_text())["training"]
    assert list(record["images"]) == [run.source.downloads[0].name] and str(tmp_path) not in json.dumps(record)
    assert (run.model / "README.md").is_file() and (run.model / "golden.json").is_file()
