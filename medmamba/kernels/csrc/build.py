"""Builds the libraries of ../lib, for every platform from any one: `pip install ziglang==0.17.1`, then run this file.

The compiler is a Python package that carries the C libraries of all targets, so the build is the same everywhere and
users need no compiler. Run it after any change to the C sources; a test compares the hash that each library carries.
"""

import argparse
import hashlib
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ZIG_VERSION = "0.17.1"
SOURCES = Path(__file__).resolve().parent
LIBRARIES = SOURCES.parent / "lib"

# Variant name to the compiler's -mcpu, the psABI's levels: SSE2, AVX2 + FMA, AVX-512.
X86 = {"x86_64_base": "x86_64", "x86_64_v3": "x86_64_v3", "x86_64_v4": "x86_64_v4"}
ARM = {"neon": "generic"}
# File name (see ../backends/cpu.py), zig's target, variants. The oldest systems that Python 3.10 and PyTorch support.
TARGETS = {
    "linux-x86_64.so": ("x86_64-linux-gnu.2.17", X86),
    "linux-aarch64.so": ("aarch64-linux-gnu.2.17", ARM),
    "macos-x86_64.dylib": ("x86_64-macos.10.15", X86),
    "macos-arm64.dylib": ("aarch64-macos.11.0", ARM),
    "windows-x86_64.dll": ("x86_64-windows-gnu", X86),
}
# Explicit rounding tricks forbid -ffast-math; fused multiply-add is wanted everywhere else.
FLAGS = (
    *("-std=gnu11", "-O3", "-g0", "-Wall", "-Wextra", "-Werror", "-fno-sanitize=all", "-fno-stack-protector"),
    *("-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)


def source_hash() -> str:
    """Returns a SHA-256 over the C sources, the flags and the compiler version; independent of line ends."""
    digest = hashlib.sha256(" ".join((ZIG_VERSION, *FLAGS)).encode())
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def zig(folder: str, *arguments: str) -> None:
    subprocess.run((sys.executable, "-m", "ziglang", "cc", *arguments), check=True, cwd=folder)


def build(name: str, target: str, variants: dict[str, str], output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        objects: list[str] = []

        def add(source: str, *flags: str) -> None:
            objects.append(f"{len(objects)}.o")
            pic = () if "windows" in target else ("-fPIC",)
            zig(folder, "-target", target, *FLAGS, *pic, *flags, "-c", str(SOURCES / source), "-o", objects[-1])

        for variant, cpu in variants.items():
            add("scan.c", f"-mcpu={cpu}", f"-DVARIANT={variant}")
        add("api.c", f'-DSOURCE_HASH="{source_hash()}"')
        add("pool.c")
        add("onnxruntime.c")
        zig(folder, "-target", target, "-shared", "-s", *objects, "-o", name)
        library = bytearray((Path(folder) / name).read_bytes())
        if "windows" in target:  # the same sources shall give the same bytes: no time of the build in the header
            (header,) = struct.unpack_from("<I", library, 0x3C)
            struct.pack_into("<I", library, header + 8, 0)
        output.mkdir(exist_ok=True)
        # Processes that have the old file in memory keep it; writing into it would crash them.
        new = output / f"{name}.new"
        new.write_bytes(library)
        new.replace(output / name)


def check(names: list[str]) -> int:
    """Builds into a temporary folder and compares with the committed libraries, byte for byte; returns an exit code."""
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            build(name, *TARGETS[name], Path(folder))
            hashes = [hashlib.sha256((where / name).read_bytes()).hexdigest() for where in (Path(folder), LIBRARIES)]
            different += hashes[0] != hashes[1]
            print(f"{name}: {hashes[0]} {'as committed' if hashes[0] == hashes[1] else f'differs from {hashes[1]}'}")
    return int(different > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"libraries to build, of: {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--output", type=Path, default=LIBRARIES)
    parser.add_argument("--check", action="store_true", help="build elsewhere and compare with the committed libraries")
    options = parser.parse_args()
    version = subprocess.run(
        (sys.executable, "-m", "ziglang", "version"), capture_output=True, text=True, check=True
    ).stdout.strip()
    if version != ZIG_VERSION:
        raise SystemExit(
            f"zig {version} is installed, the libraries are built with: pip install ziglang=={ZIG_VERSION}"
        )
    if options.check:
        raise SystemExit(check(options.names or list(TARGETS)))
    for name in options.names or TARGETS:
        build(name, *TARGETS[name], options.output)
        print(f"{options.output / name}: {(options.output / name).stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
