"""Helpers of the tests of the app."""

from pathlib import Path

NEUTROPHIL = Path(__file__).resolve().parents[2] / "demo" / "examples" / "blood_neutrophil.webp"


SECRET = "DOE^JANE-4711"


def classify(client, path, *arguments):
    import gradio_client

    return client.predict(gradio_client.handle_file(str(path)), *arguments, api_name="/classify")


class Request:
    def __init__(self, session_hash):
        self.session_hash = session_hash
