"""Compiles CUDA kernels at first use with NVRTC, the compiler library in PyTorch's CUDA builds, and launches them.

Users need no nvcc. Machine code is cached in `$MEDMAMBA_CACHE` (default ~/.cache/medmamba).

Launching is thread-safe: concurrent launches share no memory that they write to.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..once import once

SOURCES = Path(__file__).parent
HEADERS = ("common.cuh", "pairs.cuh", "fours.cuh")
TENSOR = ("conv3x3.cu", "between.cu")  # files that also need tensor.cuh
LINES = ("lines.cu", "lines_across.cu", "lines_backward.cu")  # files that also need lines.cuh
TENSOR_CAPABILITY = (8, 0)  # the least that they are compiled for
OPTIONS = ("--std=c++17", "--use_fast_math", "--extra-device-vectorization")
INVALID_CONTEXT = 201
DIGEST = 32  # bytes of SHA-256 before the machine code in a file
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as the kernels number them
FORMATS = {"p": "P", "i": "i", "l": "q", "f": "f"}  # pointer, int, long long, float


class CudaError(RuntimeError):
    """A kernel cannot be compiled, loaded or launched."""


@functools.cache
def compiler() -> ctypes.CDLL:
    """Loads NVRTC.

    Raises:
        OSError: it is not found.
    """
    major = (torch.version.cuda or "12").partition(".")[0]
    if sys.platform == "win32":
        names, folder = [f"nvrtc64_{major}0_0.dll"], "bin"
    else:
        names, folder = [f"libnvrtc.so.{major}", "libnvrtc.so"], "lib"
    for name in names:  # loaded by PyTorch, or on the system's search path
        try:
            return ctypes.CDLL(name)
        except OSError:
            pass
    places = [Path(torch.__file__).parent / "lib"]
    if (spec := importlib.util.find_spec("nvidia")) and spec.submodule_search_locations:
        for root in map(Path, spec.submodule_search_locations):
            places += [root / f"cu{major}" / folder, root / "cuda_nvrtc" / folder]
    for path in (place / name for place in places for name in names):
        if path.is_file():
            return ctypes.CDLL(str(path))
    raise OSError(f"NVRTC ({names[0]}) was not found; pip install nvidia-cuda-nvrtc brings it")


@functools.cache
def driver() -> ctypes.PyDLL:
    """Loads the CUDA driver. A PyDLL holds the GIL, because a launch is shorter than releasing and taking it."""
    return ctypes.PyDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def compile_kernel(source: str, defines: Sequence[str], capability: tuple[int, int]) -> bytes:
    """Compiles a source to machine code for a compute capability, or to PTX if the compiler does not know it.

    Raises:
        CudaError: with the log of the compiler.
    """
    nvrtc = compiler()
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(known)
    wanted = 10 * capability[0] + capability[1]
    exact = wanted in known
    number = wanted if exact else max((arch for arch in known if arch < wanted), default=wanted)
    options = [*OPTIONS, f"--gpu-architecture={'sm' if exact else 'compute'}_{number}", *defines]
    program = ctypes.c_void_p()
    _compiled(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"medmamba.cu", 0, None, None), "")
    try:
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), words)
        if status:
            _compiled(status, _text(nvrtc, "ProgramLog", program).decode(errors="replace").strip("\0"))
        return _text(nvrtc, "CUBIN" if exact else "PTX", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


class Kernel:
    """One compiled kernel on one device; thread-safe.

    The driver reads arguments from memory while it launches. Each call takes a buffer from a pool and returns it
    afterwards, so that concurrent calls never share one.

    Args:
        signature: a letter per argument: p pointer, i int, l long long, f float.
        shared: bytes of dynamic shared memory.
    """

    def __init__(self, code: bytes, name: str, signature: str, shared: int, device: int):
        self.name, self.shared, self.device = name, shared, device
        use_context(device)
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        call_driver("cuModuleLoadData", ctypes.byref(self._module), code)
        call_driver("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())
        if shared > 48 * 1024:
            limit = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call_driver("cuFuncSetAttribute", self._function, limit, shared)
        self._format = struct.Struct("@" + "".join(FORMATS[letter] for letter in signature))
        self._offsets, layout = [], "@"
        for letter in signature:
            layout += FORMATS[letter]
            self._offsets.append(struct.calcsize(layout) - struct.calcsize(FORMATS[letter]))
        self._free: list[tuple[ctypes.Array, ctypes.Array]] = []  # buffers: arguments, and pointers to each
        self._launch = driver().cuLaunchKernel

    def _room(self) -> tuple[ctypes.Array, ctypes.Array]:
        buffer = ctypes.create_string_buffer(self._format.size)
        start = ctypes.addressof(buffer)
        return buffer, (ctypes.c_void_p * len(self._offsets))(*(start + offset for offset in self._offsets))

    def __call__(self, grid: int, threads: int, stream: int, *arguments) -> None:
        try:
            room = self._free.pop()  # pop and append are atomic
        except IndexError:
            room = self._room()
        self._format.pack_into(room[0], 0, *arguments)
        size = (grid, 1, 1, threads, 1, 1, self.shared, ctypes.c_void_p(stream) if stream else None)
        status = self._launch(self._function, *size, room[1], None)
        if status == INVALID_CONTEXT:
            use_context(self.device)
            status = self._launch(self._function, *size, room[1], None)
        self._free.append(room)
        if status:
            raise CudaError(f"{self.name} does not launch on {grid} blocks of {threads} threads: {_message(status)}")


def launch(kernel: Callable[..., None], grid: int, threads: int, on: Tensor, *arguments: Tensor | float | None) -> None:
    """Runs a kernel on the device of the tensor `on` and PyTorch's current stream there.

    Args:
        grid: number of programs; 0, for an empty batch, launches nothing.
        arguments: tensors are passed by address, None as a null pointer.

    Raises:
        CudaError: the kernel does not launch.
    """
    if not grid:
        return
    device = on.get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, threads, on, *arguments)
    values = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in arguments]
    kernel(grid, threads, current_stream(device), *values)


def load_and_launch(
    file: str,
    name: str,
    signature: str,
    constants: tuple[tuple[str, int], ...],
    shared: int,
    grid: int,
    threads: int,
    on: Tensor,
    *arguments: Tensor | float | None,
) -> None:
    """Runs `load_kernel(file, name, signature, constants, shared, device of on)`, see `launch`."""
    if grid:
        kernel = load_kernel(file, name, signature, constants, shared, on.get_device())
        launch(kernel, grid, threads, on, *arguments)


def current_stream(device: int) -> int:
    """Returns the handle of PyTorch's current stream on a device, without the object around it."""
    return torch._C._cuda_getCurrentRawStream(device)


@once
def load_kernel(
    file: str, name: str, signature: str, defines: tuple[tuple[str, int], ...], shared: int, device: int
) -> Kernel:
    """Returns the kernel `name` of a file in `cuda/`, compiled for this device with these constants.

    Raises:
        CudaError: it does not compile or load.
    """
    source = kernel_source(file)
    capability = torch.cuda.get_device_capability(device)
    flags = [f"-D{key}={value}" for key, value in defines]
    version = ctypes.c_int(), ctypes.c_int()
    compiler().nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1]))
    key = repr((source, flags, capability, OPTIONS, [number.value for number in version]))
    path = cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"
    with torch.cuda.device(device):
        with contextlib.suppress(OSError, CudaError):  # not cached yet, or damaged
            return Kernel(_kept(path), name, signature, shared, device)
        code = compile_kernel(source, flags, capability)
        _keep(path, code)
        return Kernel(code, name, signature, shared, device)


def kernel_source(file: str) -> str:
    """Returns a file of `cuda/` with the headers prepended, as NVRTC reads no files."""
    more = ["tensor.cuh"] if file in TENSOR else ["lines.cuh"] if file in LINES else []
    parts = (*HEADERS, *more, file)
    return "".join((SOURCES / part).read_text(encoding="utf-8") for part in parts)


def cache_folder() -> Path:
    return Path(os.environ.get("MEDMAMBA_CACHE") or Path.home() / ".cache" / "medmamba") / "kernels"


def _kept(path: Path) -> bytes:
    """Reads machine code that `_keep` wrote. Raises OSError if it is missing or damaged."""
    digest, code = (content := path.read_bytes())[:DIGEST], content[DIGEST:]
    if hashlib.sha256(code).digest() != digest:
        raise OSError(f"{path} is damaged")
    return code


def _keep(path: Path, code: bytes) -> None:
    """Writes machine code atomically; does nothing if the cache is not writable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
        try:
            partial.write_bytes(hashlib.sha256(code).digest() + code)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError:
        return


def _compiled(status: int, log: str) -> None:
    if status:
        text = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int)(("nvrtcGetErrorString", compiler()))
        raise CudaError(f"NVRTC: {text(status).decode()}\n{log}")


def _text(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _compiled(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), "")
    buffer = ctypes.create_string_buffer(size.value)
    _compiled(getattr(nvrtc, f"nvrtcGet{what}")(program, buffer), "")
    return buffer.raw


def use_context(device: int) -> None:
    """Makes PyTorch's context of a device current; a thread of autograd may have none, or that of another device."""
    context = ctypes.c_void_p()
    call_driver("cuCtxGetCurrent", ctypes.byref(context))
    if context.value != (wanted := _primary_context(device)):
        call_driver("cuCtxSetCurrent", ctypes.c_void_p(wanted))


@once
def _primary_context(device: int) -> int | None:
    """Retains the primary context for the lifetime of the process, as PyTorch does."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    call_driver("cuDeviceGet", ctypes.byref(handle), device)
    call_driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    return context.value


def call_driver(function: str, *arguments) -> None:
    if status := getattr(driver(), function)(*arguments):
        raise CudaError(f"{function}: {_message(status)}")


def _message(status: int) -> str:
    text = ctypes.c_char_p()
    driver().cuGetErrorString(status, ctypes.byref(text))
    return f"error {status}, {(text.value or b'unknown').decode()}"


@functools.cache
def takes_tensor(device: int) -> bool:
    """Returns whether a GPU (-1: none) runs the files of `TENSOR`."""
    return device >= 0 and torch.cuda.get_device_capability(device) >= TENSOR_CAPABILITY
