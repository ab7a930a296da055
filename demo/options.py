"""Options of the app: models, device and limits."""

from dataclasses import dataclass, field
from pathlib import Path

from medmamba.serving.record import NOTICE

__all__ = ["EXAMPLES", "NOTICE", "SAMPLE_SET", "Limits", "Options"]

EXAMPLES = Path(__file__).parent / "examples"
SAMPLE_SET = EXAMPLES / "chest_xray_sample.zip"

BUSY = "Too many requests are waiting, or the server had a problem. Try again in a minute."


@dataclass(frozen=True)
class Limits:
    """Limits per visitor. Sizes are of the uploaded file unless stated otherwise."""

    image_mb: int = 64
    batch_files: int = 64
    zip_mb: int = 256
    zip_unpacked_mb: int = 1024
    zip_images: int = 3000
    zip_classes: int = 50
    epochs: int = 30
    train_minutes: float = 15
    sessions: int = 200  # concurrent visitors; beyond that, the longest idle session is closed
    idle_minutes: float = 60  # after which a visitor's files are deleted
    upload_minutes: float = 15  # after which uploads without a session, such as those of API clients, are deleted
    queue: int = 64  # waiting requests; further ones are rejected
    requests_per_minute: int = 0  # per address; 0: no limit


@dataclass(frozen=True)
class Options:
    """Start-up options of the app.

    Attributes:
        models: names, "org/name[@revision]" or folders to offer, the default first.
        backbones: names of general backbones, without classes, from which Fine-tune starts unless told otherwise.
        device: "cpu", "cuda", "mps" or "auto".
    """

    models: tuple[str, ...]
    device: str = "auto"
    limits: Limits = field(default_factory=Limits)
    backbones: tuple[str, ...] = ()


PUBLIC = Limits(
    image_mb=32,
    batch_files=32,
    zip_mb=64,
    zip_unpacked_mb=256,
    zip_images=800,
    zip_classes=20,
    epochs=15,
    train_minutes=5,
    idle_minutes=20,
    upload_minutes=5,
    requests_per_minute=120,
)
"""Limits of a public server."""
