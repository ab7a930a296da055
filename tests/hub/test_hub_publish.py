"""Publishing: nothing unfit goes up, everything goes up in one commit, and what arrived is checked."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from hub_folder import finished_model
from hub_server import TOKEN, connect, serve

from hub import golden
from hub import publish as tool
from hub.publish import PublishError, publish, publish_all
from medmamba import MedMamba, create_model

REPO = "org/bloodmnist"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return finished_model(tmp_path_factory.mktemp("made") / "bloodmnist")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "bloodmnist")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve() as hub:
        connect(hub, monkeypatch, tmp_path / "home")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def quiet(text: str) -> None:
    assert TOKEN not in text


# --- what goes up ---


def test_everything_goes_up_in_one_commit_and_loads(hub, folder):
    done = publish(folder, REPO, say=quiet)
    repo = hub.repos[REPO]
    assert len(repo.commits) == 2 and done.commit == repo.branches["main"]  # the first one is the Hub's own
    expected = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert hub.files(REPO).pop(".gitattributes") and hub.files(REPO).items() >= expected.items()
    assert {"README.md", "golden.json", "results.json", "confusion.png", "config.json"} < expected.keys()
    assert len(hub.requests("PUT", "/lfs/")) == 4  # the weights and three pictures; the rest is in the commit itself
    model = MedMamba.from_pretrained(REPO, revision=done.commit)
    local = MedMamba.from_pretrained(folder)
    image = golden.golden_image(3)
    assert model.predict(image).logits == local.predict(image).logits


def test_publishing_again_changes_nothing(hub, folder):
    first = publish(folder, REPO, say=quiet)
    hub.log.clear()
    second = publish(folder, REPO, say=quiet)
    assert second.commit == first.commit and second.unchanged and not first.unchanged
    assert not hub.requests("PUT") and not hub.requests("POST", "/commit/")


def test_a_changed_card_is_one_small_commit(hub, folder):
    publish(folder, REPO, say=quiet)
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("Research and teaching", "Teaching and research"))
    hub.log.clear()
    publish(folder, REPO, say=quiet)
    assert not hub.requests("PUT") and len(hub.requests("POST", "/commit/")) == 1


def test_a_branch_leaves_main_alone(hub, folder):
    publish(folder, REPO, revision="v2", say=quiet)
    assert set(hub.files(REPO)) == {".gitattributes"} and "model.safetensors" in hub.files(REPO, "v2")
    assert MedMamba.from_pretrained(f"{REPO}@v2").config.num_classes == 8


def test_private_is_private_and_stays_so(hub, folder, monkeypatch):
    assert publish(folder, REPO, private=True, say=quiet).private
    said = []
    assert publish(folder, REPO, say=said.append).private
    assert "stays private" in said[-1]
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="that you may read"):
        MedMamba.from_pretrained(REPO, force_download=True)


def test_a_public_repository_is_not_taken_for_a_private_one(hub, folder):
    publish(folder, REPO, say=quiet)
    with pytest.raises(PublishError, match="exists and is public"):
        publish(folder, REPO, private=True, say=quiet)


def test_a_dry_run_sends_nothing(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    said = []
    assert publish(folder, REPO, dry_run=True, say=said.append) is None
    assert hub.log == []
    assert any("model.safetensors" in line for line in said) and "nothing was sent" in said[-1]


def test_the_command_line(hub, folder, capsys, monkeypatch):
    assert tool.main([str(folder), "--repo", REPO, "--private"]) == 0
    out, err = capsys.readouterr()
    assert f"{REPO} is published (private), verified: {hub.url}/{REPO}/commit/" in out
    monkeypatch.setenv("HF_TOKEN", "hf_wrongTokenThatNobodyMayPrint")
    assert tool.main([str(folder), "--repo", REPO]) == 1
    wrong = capsys.readouterr()
    assert "denied access (HTTP 401)" in wrong.err
    for text in (out, err, *wrong):
        assert TOKEN not in text and "hf_wrong" not in text
    monkeypatch.delenv("HF_TOKEN")
    assert tool.main([str(folder), "--repo", REPO]) == 1 and "hf auth login" in capsys.readouterr().err
    assert tool.main(["no-such-model", "--repo", REPO]) == 1 and "neither a folder" in capsys.readouterr().err


def test_the_token_is_in_no_output_at_any_verbosity(hub, folder, monkeypatch, capfd, caplog):
    from huggingface_hub import constants, logging

    monkeypatch.setattr(constants, "HF_DEBUG", True)  # prints every request as a curl command
    monkeypatch.setattr(logging.get_logger(), "propagate", True)
    caplog.set_level("DEBUG")
    logging.set_verbosity_debug()
    hub.fail("status", "/commit/", method="POST", value=500)
    try:
        assert tool.main([str(folder), "--repo", REPO]) == 1
        assert tool.main([str(folder), "--repo", REPO]) == 0
    finally:
        logging.set_verbosity_warning()
    out, err = capfd.readouterr()
    assert "interrupted" in err and "verified" in out and "curl" in caplog.text + err
    assert TOKEN not in out + err + caplog.text


# --- interruptions ---


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (dict(path="/lfs/", method="PUT", kind="status", value=500, times=99), "interrupted"),
        (dict(path="/lfs/", method="PUT", kind="status", value=403, times=1), r"HTTP 403|interrupted"),
        (dict(path="objects/batch", method="POST", kind="cut", times=99), "interrupted"),
        (dict(path="/preupload/", method="POST", kind="status", value=503, times=99), "interrupted"),
        (dict(path="/commit/", method="POST", kind="status", value=500), "interrupted"),
        (dict(path="/commit/", method="POST", kind="status", value=429), "rate limiting"),
        (dict(path="/repos/create", method="POST", kind="status", value=403), "lacks write access"),
        (dict(path="/api/models/", method="GET", kind="reset", times=99), "interrupted"),
    ],
)
def test_an_interrupted_upload_leaves_the_repository_as_it_was_and_a_second_run_finishes(hub, folder, fault, message):
    hub.fail(**fault)
    with pytest.raises(PublishError, match=message):
        publish(folder, REPO, say=quiet)
    if REPO in hub.repos:
        assert set(hub.files(REPO)) == {".gitattributes"}  # nothing half-published
    hub.faults.clear()
    before = len(hub.blobs)
    hub.log.clear()
    publish(folder, REPO, say=quiet)
    assert len(hub.requests("PUT", "/lfs/")) == 4 - before  # what had arrived is not sent again
    assert len(hub.repos[REPO].commits) == 2


def test_a_short_fault_is_not_even_noticed(hub, folder):
    hub.fail("status", "/lfs/", method="PUT", value=503)
    hub.fail("status", "/preupload/", method="POST", value=502)
    assert publish(folder, REPO, say=quiet).commit


def test_somebody_elses_commit_is_not_overwritten(hub, folder, monkeypatch):
    from huggingface_hub import HfApi

    honest = HfApi.create_commit

    def later(self, *args, **kwargs):
        hub.commit(REPO, "main", {"theirs.txt": b"first"}, "somebody else")
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", later)
    with pytest.raises(PublishError, match="changed by someone else"):
        publish(folder, REPO, say=quiet)
    assert set(hub.files(REPO)) == {"theirs.txt"}


def test_what_arrived_wrong_is_found_out(hub, folder, monkeypatch):
    hub.fail("corrupt", "/cdn/", times=99)
    with pytest.raises(PublishError, match=r"could not be verified.*damaged"):
        publish(folder, REPO, say=quiet)
    hub.faults.clear()
    monkeypatch.setattr(golden, "golden_image", lambda c: np.full((96, 128, c), 77, np.uint8))  # "another code"
    with pytest.raises(PublishError, match="golden prediction is not reproduced"):
        publish(folder, REPO, say=quiet)


def test_metadata_that_the_hub_refuses_stops_before_any_upload(hub, folder):
    hub.fail("status", "validate-yaml", method="POST", value=400)
    with pytest.raises(PublishError, match="Invalid metadata"):
        publish(folder, REPO, say=quiet)
    assert not hub.requests("PUT") and set(hub.files(REPO)) == {".gitattributes"}


def test_a_name_that_is_none_is_refused(hub, folder):
    with pytest.raises(PublishError, match="is not a repository name"):
        publish(folder, "a/b/c", say=quiet)


# --- validation ---


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def retrain(folder):
    """Other weights under the old golden prediction."""
    golden.write_golden(MedMamba.from_pretrained(folder), folder)
    model = MedMamba.from_pretrained(folder)
    with torch.no_grad():
        model.head.bias += 1
    model.save_pretrained(folder)


def remeasure(folder, change):
    results = json.loads((folder / "results.json").read_text())
    change(results)
    (folder / "results.json").write_text(json.dumps(results))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "best.pth").write_bytes(b"x"), "best.pth is a pickle"),
        (lambda f: (f / "other.safetensors").write_bytes(b"x"), "weights must be in model.safetensors"),
        (lambda f: (f / "run.sh").write_text("rm"), "run.sh does not belong"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "results.json").unlink(), "results.json is missing"),
        (lambda f: (f / "confusion.png").unlink(), "confusion.png is missing"),
        (
            lambda f: (f / "history.csv").write_text("/home/me/patients/1.png"),
            "path of your machine, /home/me/patients",
        ),
        (lambda f: (f / "notes.md").write_text(r"C:\\Users\\me\\x.png"), "path of your machine"),
        (lambda f: edit(f, id2label={}), "classes have no names"),
        (lambda f: edit(f, training={}), "does not say what the model was trained on|not on record"),
        (lambda f: edit(f, weights_sha256=None), "no weights_sha256"),
        (lambda f: edit(f, calibration={"temperature": 3.0}), "different calibrations"),
        (lambda f: edit(f, weights_sha256="0" * 64), "does not match its checksum"),
        (retrain, "golden prediction is not reproduced"),
        (lambda f: (f / "golden.json").write_text("{}"), "labels"),
        (lambda f: remeasure(f, lambda r: r["training"].update(seed=9)), "different training runs"),
        (lambda f: remeasure(f, lambda r: r["splits"]["test"].update(resamples=0)), "no confidence intervals"),
        (lambda f: remeasure(f, lambda r: r["splits"]["test"]["classes"].reverse()), "different classes"),
        (lambda f: (f / "README.md").write_text("# my model"), 'section "Limits" is missing'),
    ],
)
def test_what_is_unfit_is_not_published_and_named(hub, folder, spoil, message):
    spoil(folder)
    with pytest.raises(PublishError, match=message):
        publish(folder, REPO, say=quiet)
    assert hub.log == []


def test_all_problems_are_told_at_once(folder):
    edit(folder, id2label={}, weights_sha256=None)
    (folder / "confusion.png").unlink()
    with pytest.raises(PublishError) as info:
        publish(folder, REPO, dry_run=True, say=quiet)
    assert len(re.findall(r"^  - ", str(info.value), re.M)) >= 3


def test_a_generated_card_follows_to_another_repository(hub, folder):
    publish(folder, REPO, say=quiet)
    here = (folder / "README.md").read_bytes()
    said = []
    publish(folder, "org/other", say=said.append)
    assert "the card is regenerated for org/other" in said[0]
    assert (folder / "README.md").read_bytes() == here == hub.files(REPO)["README.md"]
    assert 'from_pretrained("org/other")' in hub.files("org/other")["README.md"].decode()
    assert 'from_pretrained("org/bloodmnist")' in hub.files(REPO)["README.md"].decode()
    assert publish(folder, "org/other", say=quiet).unchanged


def test_an_edited_card_of_another_repository_is_noticed(hub, folder):
    publish(folder, REPO, say=quiet)
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("Research and teaching", "Teaching and research"))
    with pytest.raises(PublishError, match="shows how to load org/bloodmnist, not org/other"):
        publish(folder, "org/other", say=quiet)


def test_figures_that_changed_after_the_card_was_written_are_noticed(hub, folder):
    publish(folder, REPO, dry_run=True, say=quiet)
    remeasure(folder, lambda r: r["splits"]["test"]["overall"]["accuracy"].update(value=0.999))
    with pytest.raises(PublishError, match=r"results.json says 0\.9990"):
        publish(folder, REPO, say=quiet)


# --- the golden prediction ---


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_golden_prediction_of_any_channels(tmp_path, channels):
    torch.manual_seed(0)
    labels = {0: "a", 1: "b"}
    model = create_model("test", num_classes=2, in_chans=channels, id2label=labels).eval()
    record = golden.write_golden(model, tmp_path)
    assert golden.check_golden(model, record, "here") == pytest.approx(0, abs=1e-5)
    model.config = model.config.replace(id2label={0: "b", 1: "a"})
    with pytest.raises(golden.GoldenError, match="the classes are"):
        golden.check_golden(model, record, "here")


def test_the_golden_image_never_changes():
    """Others compare with it; these sums are of the first release."""
    assert [int(golden.golden_image(c).sum(dtype=np.int64)) for c in (1, 3)] == [1563495, 4686227]


# --- the zoo ---


@pytest.fixture
def zoo(made, tmp_path, monkeypatch):
    """Models of different data, terms and tasks."""
    models = tmp_path / "models"
    shutil.copytree(made, models / "bloodmnist")
    finished_model(models / "dermamnist", "dermamnist", seed=1)
    finished_model(models / "breastmnist", "breastmnist", seed=2, pretraining=["dermamnist"], init="zoo-joint, seed 0")
    monkeypatch.setattr(tool, "MODELS", models)
    monkeypatch.setattr(tool, "COLLECTION", tmp_path / "collection.json")
    monkeypatch.setattr(tool, "bundled_models", lambda: {f"medmamba/{p.name}": p for p in models.iterdir()})
    return models


@pytest.mark.slow
def test_all_models_and_their_collection(hub, zoo, tmp_path, capsys):
    assert tool.main(["--all", "--repo", "org"]) == 0
    assert set(hub.repos) == {"org/bloodmnist", "org/breastmnist", "org/dermamnist"}
    licences = {
        repo: re.search(r"^license: (.+)$", hub.files(repo)["README.md"].decode(), re.M)[1] for repo in hub.repos
    }
    assert licences == {
        "org/bloodmnist": "cc-by-4.0",
        "org/breastmnist": "cc-by-nc-4.0",  # from weights that have seen the next
        "org/dermamnist": "cc-by-nc-4.0",
    }
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == sorted(hub.repos)
    written = json.loads((tmp_path / "collection.json").read_text())
    assert written["slug"] == collection["slug"]
    notes = {item["id"]: item["note"] for item in written["items"]}
    results = json.loads((zoo / "breastmnist" / "results.json").read_text())["splits"]["test"]["overall"]
    expected = f"accuracy {results['accuracy']['value']:.3f}, AUROC {results['auroc']['value']:.3f}"
    assert notes["org/breastmnist"] == f"BreastMNIST, test: {expected}"
    assert tool.main(["--all", "--repo", "org"]) == 0  # again: no second collection, no second items
    assert len(hub.collections) == 1 and len(collection["items"]) == 3
    assert TOKEN not in "".join(capsys.readouterr())


@pytest.mark.slow
def test_one_unfit_model_does_not_stop_the_others(hub, zoo, capsys):
    (zoo / "bloodmnist" / "best.pth").write_bytes(b"x")
    failures = publish_all("org", say=quiet)
    assert len(failures) == 1 and "best.pth is a pickle" in failures[0]
    assert set(hub.repos) == {"org/breastmnist", "org/dermamnist"}
    assert [i["id"] for i in next(iter(hub.collections.values()))["items"]] == ["org/breastmnist", "org/dermamnist"]
    assert tool.main(["--all", "--repo", "org", "--dry-run"]) == 1


def test_an_empty_zoo_says_so(zoo, capsys):
    shutil.rmtree(zoo)
    zoo.mkdir()
    assert tool.main(["--all"]) == 1 and "no models in" in capsys.readouterr().err
