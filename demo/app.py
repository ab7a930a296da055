"""The medmamba web app: `python -m demo.app`, or `make demo`.

The package does the work; this file shows it.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import gradio as gr

import medmamba
from medmamba import MedMamba
from medmamba.cli import DEFAULT_MODEL, pick_device
from medmamba.images import ImageError, load_image
from medmamba.kernels import resolve_backend
from medmamba.preprocess import preprocess, to_display

EXAMPLES = Path(__file__).parent / "examples"
FILE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".dcm"]
NOTICE = (
    "**For research and teaching only.** Not a medical device: do not use it for diagnosis or treatment. "
    "Do not upload images that identify a person."
)


class Predictor:
    """A model on a device, answering one image at a time."""

    def __init__(self, name: str = DEFAULT_MODEL, device: str = "auto"):
        self.name = name
        self.device = pick_device(device)
        self.model = MedMamba.from_pretrained(name).fuse().to(self.device)

    def classify(self, path: str | None):
        """Classify one medical image.

        Args:
            path: PNG, JPEG, WebP, TIFF, BMP (8 or 16 bit) or DICOM file.

        Returns:
            Calibrated probability of each class, the image as the model sees it, and what was done to get there.
        """
        if not path:
            raise gr.Error("Choose an image first: upload one or pick an example.")
        start = time.perf_counter()
        try:
            image = load_image(path)
            prediction = self.model.predict(image)
        except (ImageError, ValueError) as error:
            # The server's own path says nothing to the person who uploaded the file.
            raise gr.Error(str(error).replace(path, Path(path).name), duration=None) from None
        milliseconds = 1e3 * (time.perf_counter() - start)
        seen = to_display(
            preprocess(image, self.model.config.preprocess, self.model.config.in_chans), self.model.config.preprocess
        )
        notes = "".join(f"\n- {note}" for note in prediction.image_notes)
        backend = resolve_backend(self.device, next(self.model.parameters()).dtype)
        footer = (
            f"Answered by **{self.name}** (MedMamba-{self.model.config.architecture}, "
            f"{self.model.config.num_classes} classes) in {milliseconds:.0f} ms on {self.device}, "
            f"scan backend *{backend}*, medmamba {medmamba.__version__}.\n{notes}"
        )
        return dict(prediction.top), seen, footer


def build_demo(predictor: Predictor) -> gr.Blocks:
    """The app for one predictor; nothing is loaded or computed while building it."""
    config = predictor.model.config
    dataset = config.training.get("title") or config.training.get("dataset") or "images"
    with gr.Blocks(title="medmamba", delete_cache=(3600, 3600), analytics_enabled=False) as demo:
        gr.Markdown(f"# medmamba\nClassifies {dataset}: {', '.join(config.labels)}.")
        gr.Markdown(NOTICE, elem_id="notice")
        with gr.Row():
            with gr.Column():
                file = gr.File(label="Image (PNG, JPEG, TIFF, DICOM, …)", file_types=FILE_TYPES, type="filepath")
                button = gr.Button("Classify", variant="primary")
                examples = sorted(str(p) for p in EXAMPLES.glob("blood_*"))
                gallery = gr.Gallery(
                    examples, label="Examples: click one", columns=4, height="auto", allow_preview=False, format="png"
                )
            with gr.Column():
                label = gr.Label(label="Probability")
                seen = gr.Image(label="The image as the model sees it", format="png", interactive=False)
                footer = gr.Markdown()
        outputs = [label, seen, footer]
        button.click(predictor.classify, file, outputs, api_name="classify", concurrency_id="model")
        file.upload(predictor.classify, file, outputs, api_visibility="private", concurrency_id="model")

        def choose(event: gr.SelectData):
            return examples[event.index]

        gallery.select(choose, None, file, api_visibility="private").then(
            predictor.classify, file, outputs, api_visibility="private", concurrency_id="model"
        )
    return demo.queue(max_size=20)


def main(argv: list[str] | None = None) -> int:
    """Starts the server and waits; returns the exit code."""
    parser = argparse.ArgumentParser(prog="demo.app", description="The medmamba web app.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name, org/name[@revision] or folder (%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=None, help="port (default: the first free one from 7860)")
    parser.add_argument("--open", action="store_true", help="open the app in a browser")
    args = parser.parse_args(argv)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        predictor = Predictor(args.model, args.device)
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    demo = build_demo(predictor)
    demo.launch(
        server_name=args.host,
        server_port=args.port,
        inbrowser=args.open,
        share=False,
        max_file_size="64mb",
        allowed_paths=[str(EXAMPLES)],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
