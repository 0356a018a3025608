"""Replaces this process by the dylora binary, with the libtorch of the installed PyTorch.

PyTorch is found by its metadata and not imported, which would take seconds. Its build decides what
dylora can use: a build with CUDA serves the CPU too.
"""

import os
import sys
from importlib import metadata
from pathlib import Path

NEEDED = "2.11"
HINT = f"pip install 'torch=={NEEDED}.*'"


def fail(message):
    sys.exit(f"error: {message}\nhint: {HINT}")


def libtorch():
    """The folder of the libraries of the installed PyTorch."""
    try:
        torch = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        fail(f"dylora needs PyTorch {NEEDED}, and `{sys.executable}` has none")
    folder = Path(torch.locate_file("torch/lib"))
    if not torch.version.startswith(f"{NEEDED}."):
        fail(f"dylora needs PyTorch {NEEDED}, but `{folder.parent}` is PyTorch {torch.version}")
    if not (folder / "libtorch_cpu.so").exists():
        fail(f"PyTorch {torch.version} has no `{folder / 'libtorch_cpu.so'}`")
    return folder


def main():
    binary = Path(__file__).with_name("bin") / "dylora"
    path = os.environ.get("LD_LIBRARY_PATH")
    # the installed PyTorch comes before any libtorch that is already on the path
    os.environ["LD_LIBRARY_PATH"] = f"{libtorch()}:{path}" if path else f"{libtorch()}"
    os.execv(binary, [str(binary), *sys.argv[1:]])


if __name__ == "__main__":
    main()
