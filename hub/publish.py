"""python -m hub.publish FOLDER_OR_NAME --repo ORG/NAME: validates a model and uploads it to the Hub.

Uploads everything in one commit, so that a revision is always a complete model. An interrupted upload leaves the
repository unchanged; rerun the same command to resume it without resending files. Afterwards the model is loaded from
the Hub and must reproduce its golden prediction.

Log in with `hf auth login` or set HF_TOKEN. The token is never printed.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import medmamba
from medmamba import __version__
from medmamba.cards import CARD_NAME, default_repo, is_dense, read_dense_facts, read_facts
from medmamba.config import ORGANISATION
from medmamba.pretrained import PretrainedError, bundled_models, model_kind
from medmamba.pretrained.folder import LOADERS
from medmamba.utils.text import json_text

from . import dense_models
from .golden import GoldenError, check_golden
from .validate import Report, validate

MODELS = Path(__file__).parent / "models"
COLLECTION = Path(__file__).parent / "collection.json"
COLLECTION_TITLE = "MedMamba"
COLLECTION_TEXT = "Medical image classification with MedMamba. For research; not a medical device."


class PublishError(RuntimeError):
    """A model cannot be published; the message says what to do."""


@dataclass(frozen=True)
class Published:
    """A published model. Pin `commit`: `from_pretrained(repo, revision=commit)`."""

    repo: str
    commit: str
    url: str
    private: bool
    unchanged: bool


def publish(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str = "main",
    licence: str | None = None,
    permission: str = "",
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> Published | None:
    """Validates a model folder, uploads it in one commit, and verifies the upload.

    Args:
        folder: a model folder, or the name of one in hub/models.
        repo: "org/name"; created if it does not exist.
        private: create a private repository. An existing one keeps its visibility.
        revision: branch; created from main if missing.
        licence, permission: see `medmamba.cards.read_facts`.
        dry_run: stop before the first request to the Hub and return None.
        say: called with progress messages.

    Raises:
        PublishError: the folder fails validation, the Hub rejects the request, or the connection fails.
    """
    folder = find_folder(folder)
    report = validate(folder, repo, licence=licence, permission=permission, private=private)
    for warning in report.warnings:
        say(f"warning: {warning}")
    if report.problems:
        raise PublishError(f"{folder} is not published:\n" + "\n".join(f"  - {problem}" for problem in report.problems))
    for name in report.files:
        say(f"  {name:20} {(folder / name).stat().st_size:>12,} bytes")
    visibility = "private" if private else "public"
    if dry_run:
        say(f"{repo} ({visibility}, {revision}): would be published; nothing was sent")
        return None
    published = _upload(report, repo, private, revision)
    _verify(report, published)
    state = "was already there" if published.unchanged else "is published"
    say(f"{repo} {state} ({'private' if published.private else 'public'}), verified: {published.url}")
    if published.private and not private:
        say(f"{repo} existed as a private repository and stays private; its settings on the Hub change that")
    return published


def find_folder(name: str | Path) -> Path:
    """Returns a model folder, by path or by its name in hub/models.

    Raises:
        PublishError: not found.
    """
    for folder in (Path(name), MODELS / str(name).removeprefix(f"{ORGANISATION}/")):
        if folder.is_dir():
            return folder.resolve()
    known = ", ".join(path.name for path in model_folders()) or "none"
    raise PublishError(f"{name} is neither a folder nor a model in hub/models; models there: {known}")


def model_folders() -> list[Path]:
    """Lists the model folders in hub/models."""
    return sorted(path for path in bundled_models().values() if path.parent == MODELS)


def _upload(report: Report, repo: str, private: bool, revision: str) -> Published:
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    token = get_token()
    if not token:
        raise PublishError("not logged in to the Hub: run `hf auth login` once, or set HF_TOKEN")
    api = HfApi(token=token, library_name="medmamba", library_version=__version__)
    # Errors of whichever HTTP library the client uses; it wraps failures of large files in RuntimeError.
    transport: tuple[Any, ...] = (*HfHubHTTPError.__bases__, OSError, RuntimeError)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision != "main":
            api.create_branch(repo, branch=revision, exist_ok=True)
        before = api.model_info(repo, revision=revision)
        if private and not before.private:
            raise PublishError(
                f"{repo} exists and is public; --private cannot change that, use its settings on the Hub"
            )
        if report.facts and report.facts.terms.needs_permission and not before.private:
            raise PublishError(f"{repo} is public, but these weights must not be")
        commit = api.create_commit(
            repo,
            [
                CommitOperationAdd(name, report.card.encode() if name == CARD_NAME else report.folder / name)
                for name in report.files
            ],
            commit_message=f"Publish {report.folder.name} with medmamba {__version__}",
            revision=revision,
            parent_commit=before.sha,  # rejects the commit if the branch has moved
        )
    except PublishError:
        raise
    except HFValidationError as error:
        raise PublishError(f"{repo!r} is not a repository name such as medmamba/bloodmnist: {error}") from error
    except ValueError as error:  # the Hub rejected the metadata of the card
        raise PublishError(_hidden(str(error), token)) from None
    except transport as error:
        raise PublishError(_refusal(error, repo, token)) from None  # a chained cause would print request headers
    return Published(repo, commit.oid, str(commit.commit_url), bool(before.private), commit.oid == before.sha)


def _refusal(error: BaseException, repo: str, token: str) -> str:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    why = _hidden(next(iter(str(error).strip().splitlines()), type(error).__name__), token)
    if status in (401, 403):
        why = f"the token is invalid or lacks write access to {repo}"
        return f"the Hub denied access (HTTP {status}): {why}; log in with `hf auth login`"
    if status == 412:
        return f"{repo} was changed by someone else meanwhile: review that commit, then run the same command again"
    if status == 429:
        return f"the Hub is rate limiting (HTTP 429): wait a few minutes and run the same command again. {why}"
    return f"the upload of {repo} was interrupted ({why}); {repo} is unchanged. Run the same command again to finish it"


def _hidden(text: str, token: str) -> str:
    return text.replace(token, "hf_...")


def _verify(report: Report, published: Published) -> None:
    """Loads the commit into an empty cache, as a new user would, and compares the golden prediction."""
    if not report.golden:
        return
    with tempfile.TemporaryDirectory() as cache:
        try:
            dense = is_dense(report.folder)
            loader = getattr(medmamba, LOADERS[model_kind(report.folder)])
            model = loader.from_pretrained(published.repo, revision=published.commit, cache_dir=cache)
            check = dense_models.check_golden if dense else check_golden
            check(model, report.golden, f"{published.repo}@{published.commit[:8]}")
        except (PretrainedError, GoldenError) as error:
            raise PublishError(
                f"{published.repo} was uploaded ({published.url}), but could not be verified: {error}. "
                "Run the same command again; if it persists, revert that commit on the Hub"
            ) from error


def publish_all(
    organisation: str, *, private: bool = False, revision: str = "main", dry_run: bool = False, say=print
) -> list[str]:
    """Publishes every model in hub/models and a Collection of them; failures do not stop the others.

    Returns:
        Error messages, one per failed model.
    """
    failures, published = [], {}
    folders = model_folders()
    if not folders:
        return [f"no models in {MODELS}"]
    for folder in folders:
        repo = f"{organisation}/{folder.name}"
        try:
            published[folder.name] = publish(folder, repo, private=private, revision=revision, dry_run=dry_run, say=say)
        except PublishError as error:
            failures.append(str(error))
    if published:
        failures += _collect(organisation, list(published), private, dry_run, say)
    return failures


def _collect(organisation: str, names: list[str], private: bool, dry_run: bool, say) -> list[str]:
    """Creates or updates the Collection on the Hub and writes it to hub/collection.json."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    items = [{"id": f"{organisation}/{name}", "note": _note(MODELS / name)} for name in names]
    wanted = {"title": COLLECTION_TITLE, "namespace": organisation, "description": COLLECTION_TEXT, "items": items}
    if dry_run:
        say(f"the collection {COLLECTION_TITLE!r} of {organisation} would hold {len(items)} models")
        return []
    token = get_token()
    api = HfApi(token=token, library_name="medmamba", library_version=__version__)
    transport: tuple[Any, ...] = (*HfHubHTTPError.__bases__, OSError)
    try:
        collection = api.create_collection(
            COLLECTION_TITLE, namespace=organisation, description=COLLECTION_TEXT, private=private, exists_ok=True
        )
        for item in items:
            api.add_collection_item(
                collection.slug, item_id=item["id"], item_type="model", note=item["note"], exists_ok=True
            )
    except transport as error:
        return [_refusal(error, f"the collection of {organisation}", token or "")]
    COLLECTION.write_text(json_text({"slug": collection.slug, **wanted}, indent=2) + "\n", encoding="utf-8")
    say(f"collection: {collection.url}")
    return []


def _note(folder: Path) -> str:
    """Summarises the test results of a model in one line."""
    if is_dense(folder):
        about = read_dense_facts(folder)
        figures = [f"{name} {score['value']:.3f}" for name, score in about.scores("test")[:2] if score["value"]]
        return f"{about.dataset}, {about.config.encoder.architecture}: {', '.join(figures)}"
    facts = read_facts(folder)
    if not facts.split:
        return facts.dataset
    found = facts.evaluations[facts.split]
    return f"{facts.dataset}, {facts.config.architecture}: accuracy {found['accuracy']:.3f}, AUROC {found['auroc']:.3f}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hub.publish", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a model folder, or the name of one in hub/models")
    parser.add_argument("--repo", metavar="ORG/NAME", help="repository on the Hub; with --all: the organisation")
    parser.add_argument("--all", action="store_true", help="every model in hub/models, and their Collection")
    parser.add_argument(
        "--dry-run", action="store_true", help="validate and list what would be uploaded, without uploading"
    )
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument("--revision", default="main", metavar="BRANCH", help="branch to publish to (%(default)s)")
    parser.add_argument("--license", metavar="ID", help="licence of the weights; default: that of the data")
    parser.add_argument("--permission", default="", metavar="TEXT", help="who permitted unlicensed weights, and when")
    args = parser.parse_args(argv)
    if args.all == bool(args.model):
        parser.error("name one model, or --all")
    try:
        if args.all:
            failures = publish_all(
                args.repo or ORGANISATION, private=args.private, revision=args.revision, dry_run=args.dry_run
            )
            for failure in failures:
                print(f"hub.publish: {failure}", file=sys.stderr)
            return 1 if failures else 0
        folder = find_folder(args.model)
        publish(
            folder,
            args.repo or default_repo(folder),
            private=args.private,
            revision=args.revision,
            licence=args.license,
            permission=args.permission,
            dry_run=args.dry_run,
        )
    except PublishError as error:
        print(f"hub.publish: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
