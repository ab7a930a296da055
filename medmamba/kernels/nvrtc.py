"""CUDA kernels compiled when they first run, by NVRTC, the compiler library that PyTorch's CUDA builds bring.

Nobody needs nvcc. Machine code is kept in `$MEDMAMBA_CACHE` (default ~/.cache/medmamba), so that it is made once.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "cuda"
HEADERS = ("common.cuh", "pairs.cuh", "fours.cuh")
OPTIONS = ("--std=c++17", "--use_fast_math", "--extra-device-vectorization")
INVALID_CONTEXT = 201
FORMATS = {"p": "P", "i": "i", "l": "q", "f": "f"}  # pointer, int, long long, float


class CudaError(RuntimeError):
    """A kernel that cannot be compiled, loaded or launched."""


@functools.cache
def compiler() -> ctypes.CDLL:
    """NVRTC. Raises OSError where it is not found."""
    major = (torch.version.cuda or "12").partition(".")[0]
    if sys.platform == "win32":
        names, folder = [f"nvrtc64_{major}0_0.dll"], "bin"
    else:
        names, folder = [f"libnvrtc.so.{major}", "libnvrtc.so"], "lib"
    for name in names:  # PyTorch has loaded it, or the system knows it
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
    """The CUDA driver. A PyDLL keeps Python's lock: launches are short, and their arguments lie in one buffer."""
    return ctypes.PyDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def compile_kernel(source: str, defines: Sequence[str], capability: tuple[int, int]) -> bytes:
    """Machine code of a source for GPUs of this compute capability, or PTX where the compiler does not know them.

    Raises:
        CudaError: with the compiler's words.
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
    """One compiled kernel on one device.

    Args:
        signature: a letter per argument: p pointer, i int, l long long, f float.
        shared: bytes of dynamic shared memory.
    """

    def __init__(self, code: bytes, name: str, signature: str, shared: int, device: int):
        self.name, self.shared, self.device = name, shared, device
        _use_context(device)
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _loaded("cuModuleLoadData", ctypes.byref(self._module), code)
        _loaded("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())
        if shared > 48 * 1024:
            limit = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _loaded("cuFuncSetAttribute", self._function, limit, shared)
        self._format = struct.Struct("@" + "".join(FORMATS[letter] for letter in signature))
        self._buffer = ctypes.create_string_buffer(self._format.size)
        offsets, layout = [], "@"
        for letter in signature:
            layout += FORMATS[letter]
            offsets.append(struct.calcsize(layout) - struct.calcsize(FORMATS[letter]))
        start = ctypes.addressof(self._buffer)
        self._arguments = (ctypes.c_void_p * len(offsets))(*(start + offset for offset in offsets))
        self._launch = driver().cuLaunchKernel

    def __call__(self, grid: int, threads: int, stream: int, *arguments) -> None:
        self._format.pack_into(self._buffer, 0, *arguments)
        size = (grid, 1, 1, threads, 1, 1, self.shared, ctypes.c_void_p(stream))
        status = self._launch(self._function, *size, self._arguments, None)
        if status == INVALID_CONTEXT:
            _use_context(self.device)
            status = self._launch(self._function, *size, self._arguments, None)
        if status:
            raise CudaError(f"{self.name} does not launch on {grid} blocks of {threads} threads: {_message(status)}")


@functools.cache
def load_kernel(
    file: str, name: str, signature: str, defines: tuple[tuple[str, int], ...], shared: int, device: int
) -> Kernel:
    """The kernel `name` of a file in `cuda/`, compiled for this device with these constants.

    Raises:
        CudaError: it does not compile or does not fit.
    """
    source = kernel_source(file)
    capability = torch.cuda.get_device_capability(device)
    flags = [f"-D{key}={value}" for key, value in defines]
    version = ctypes.c_int(), ctypes.c_int()
    compiler().nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1]))
    key = repr((source, flags, capability, OPTIONS, [number.value for number in version]))
    path = cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"
    with torch.cuda.device(device):
        with contextlib.suppress(OSError, CudaError):  # not there yet, or damaged
            return Kernel(path.read_bytes(), name, signature, shared, device)
        code = compile_kernel(source, flags, capability)
        _keep(path, code)
        return Kernel(code, name, signature, shared, device)


def kernel_source(file: str) -> str:
    """A file of `cuda/` with the headers it needs in front: NVRTC reads no folders."""
    return "".join((SOURCES / part).read_text(encoding="utf-8") for part in (*HEADERS, file))


def cache_folder() -> Path:
    return Path(os.environ.get("MEDMAMBA_CACHE") or Path.home() / ".cache" / "medmamba") / "kernels"


def _keep(path: Path, code: bytes) -> None:
    """Written beside and renamed, so that another process never reads half of it. Without a place, it is not kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            partial.write_bytes(code)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError:
        return


def _compiled(status: int, log: str) -> None:
    if status:
        nvrtc = compiler()
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CudaError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}\n{log}")


def _text(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _compiled(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), "")
    buffer = ctypes.create_string_buffer(size.value)
    _compiled(getattr(nvrtc, f"nvrtcGet{what}")(program, buffer), "")
    return buffer.raw


def _use_context(device: int) -> None:
    """PyTorch's context, for a thread that has not used the GPU yet, such as one of autograd's."""
    context = ctypes.c_void_p()
    _loaded("cuCtxGetCurrent", ctypes.byref(context))
    if not context:
        _loaded("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        _loaded("cuCtxSetCurrent", context)


def _loaded(function: str, *arguments) -> None:
    if status := getattr(driver(), function)(*arguments):
        raise CudaError(f"{function}: {_message(status)}")


def _message(status: int) -> str:
    text = ctypes.c_char_p()
    driver().cuGetErrorString(status, ctypes.byref(text))
    return f"error {status}, {(text.value or b'unknown').decode()}"
