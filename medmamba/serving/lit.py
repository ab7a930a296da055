"""The model behind LitServe, and requests as FastAPI reads them; imported where the extra "serve" is installed."""

import time
from typing import Annotated, Any

import torch
from fastapi import Depends, File, Form, HTTPException, Request, UploadFile
from fastapi.responses import JSONResponse
from litserve import LitAPI

from ..utils.memory import cores
from .answers import Answers
from .record import check_view
from .upload import PATH, Upload

Number = Annotated[float | None, Form(allow_inf_nan=False)]


async def read_upload(
    request: Request,
    file: Annotated[UploadFile, File()],
    frame: Number = None,
    window_center: Number = None,
    window_width: Number = None,
) -> Upload:
    """Returns the request in a form; `app.state.max_bytes` is the largest file."""
    limit = request.app.state.max_bytes
    content = await file.read(limit + 1)
    if len(content) > limit:
        raise HTTPException(413, f"the file is larger than {limit / 2**20:g} MiB")
    try:
        view = check_view(frame, window_center, window_width)
    except ValueError as error:
        raise HTTPException(422, str(error)) from None
    return Upload(file.filename or "file", content, *view, time.monotonic())


class ClassifyAPI(LitAPI):
    """Answers batches of uploads; each process of the server holds one.

    Args:
        source: of the model.
        batch_size, wait, workers: see `build_server`.
    """

    def __init__(self, source: str, batch_size: int, wait: float, workers: int) -> None:
        super().__init__(max_batch_size=max(2, batch_size), batch_timeout=wait, api_path=PATH)
        self.source, self.workers = source, workers

    def setup(self, device: str) -> None:
        if device == "cpu":
            torch.set_num_threads(max(1, cores() // self.workers))
        self.answers = Answers(self.source, device)

    def decode_request(self, request: Annotated[Upload, Depends(read_upload)]) -> Upload:
        return request

    def batch(self, inputs: list[Upload]) -> list[Upload]:
        return list(inputs)

    def predict(self, x: list[Upload]) -> list[tuple[int, dict[str, Any]]]:
        return self.answers(x)

    def unbatch(self, output: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
        return output

    def encode_response(self, output: tuple[int, dict[str, Any]]):  # type: ignore[no-untyped-def]
        status, content = output
        return JSONResponse(content, status)
