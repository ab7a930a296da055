"""What the app is started with: which models, where, and how much of everything it takes."""

from dataclasses import dataclass, field
from pathlib import Path

EXAMPLES = Path(__file__).parent / "examples"
SAMPLE_SET = EXAMPLES / "chest_xray_sample.zip"
NOTICE = (
    "For research and teaching only. Not a medical device: do not use it for diagnosis or treatment, and do not "
    "upload images that identify a person."
)

BUSY = "Too many are waiting, or the server had a problem. Try again in a minute."


@dataclass(frozen=True)
class Limits:
    """How much one visitor may ask for. Sizes are of the uploaded file unless it says otherwise."""

    image_mb: int = 64
    batch_files: int = 64
    zip_mb: int = 256
    zip_unpacked_mb: int = 1024
    zip_images: int = 3000
    zip_classes: int = 50
    epochs: int = 30
    train_minutes: float = 15
    sessions: int = 200  # visitors at once; beyond, the one idle for longest is forgotten
    idle_minutes: float = 60  # after which a visitor's files are deleted
    upload_minutes: float = 15  # after which an upload goes that belongs to no visitor, such as a program's
    queue: int = 64  # requests that may wait; further ones are told to come back
    requests_per_minute: int = 0  # of one address; 0: no limit


@dataclass(frozen=True)
class Options:
    """
    Attributes:
        models: names, "org/name[@revision]" or folders on offer, the default first.
        device: "cpu", "cuda", "mps" or "auto".
    """

    models: tuple[str, ...]
    device: str = "auto"
    limits: Limits = field(default_factory=Limits)


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
"""Of a server that anybody can reach."""
