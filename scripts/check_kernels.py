#!/usr/bin/env python3
"""Runs CUDA kernels on the CPU, and compares them with float64.

    scripts/check_kernels.py [thin_products|finish_many|dropout|quantise]

Each thread of the GPU becomes a thread of the CPU (tests/kernels/cuda.h). So clusters of blocks,
blocks that wait for each other, and products of matrices by a warp are checked without a GPU:

    thin_products  the products of few texts, by tests/kernels/thin_products.cpp
    finish_many    the outputs of layers for many texts, by tests/kernels/finish_many.cpp
    dropout        dropout of the experts' inputs, by tests/kernels/dropout.cpp
    quantise       rows in FP8, by tests/kernels/quantise.cpp

Without an argument, the script checks all of them, which takes about a minute. It needs a C++ compiler:
$CXX or c++.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    "thin_products": ["pack", "dropout", "step/finish", "step/multiply", "step/thin"],
    "finish_many": ["pack", "dropout", "step/finish", "step/many"],
    "dropout": ["pack", "dropout"],
    "quantise": ["pack", "quantise"],
}
# patterns of CUDA code that a C++ compiler rejects, with their replacements
REPLACED = {
    "pack": [],
    "step/finish": [
        (r'asm volatile\("prefetch[^\n]*', "(void)p;"),
        (r"tanh_of\(ROOT_2_OVER_PI \*", "tanhf(0.7978845608f *"),
        # kernels of other files
        (r"template <class T>\nstatic __device__ void step_norm\(.*?\n}\n", ""),
        (r"template <class T>\nstatic __device__ void step_finish\(.*?\n}\n", ""),
    ],
    "step/multiply": [],
    "step/thin": [
        (r"__shared__ float of_warps\[16\];", "float *const of_warps = block->of_warps;"),
        (r"extern __shared__ uint4 of_product\[\];", "uint4 *const of_product = (uint4 *)block->dynamic;"),
        (r"__shared__ u64 inbox;", "u64 inbox = 0;"),
    ],
    "step/many": [
        (r"extern __shared__ uint4 of_many\[\];", "uint4 *const of_many = (uint4 *)block->dynamic;"),
    ],
    "dropout": [
        (r"static __device__ __forceinline__ void mma\(.*?\n}\n", ""),
        (r"__shared__ float (\w+)((?:\[[^\n]*\])+);", r"auto &\1 = *(float (*)\2)block->dynamic;"),
    ],
    "quantise": [
        (r"static __device__ __forceinline__ u32 four_codes\(.*?\n}\n", ""),
        (r"__shared__ float of_warps\[32\];", "float *const of_warps = block->of_warps;"),
    ],
}


def kernels(name):
    """The source of a file of kernels, changed so that a C++ compiler accepts it."""
    source = (ROOT / "csrc/kernels" / f"{name}.cuh").read_text()
    for pattern, instead in REPLACED[name]:
        source, count = re.subn(pattern, instead, source, flags=re.DOTALL)
        if count == 0:
            sys.exit(f"csrc/kernels/{name}.cuh no longer has `{pattern}`")
    return source


def check(name):
    source = "\n".join(kernels(file) for file in FILES[name])
    with tempfile.TemporaryDirectory() as folder:
        header, program = Path(folder, "kernels.h"), Path(folder, "program")
        header.write_text(f"#define WIDTH 2048\n{source}")
        compiler = os.environ.get("CXX", "c++")
        options = ["-O1", "-std=c++17", "-w", f'-DKERNELS="{header}"', "-pthread"]
        test = ROOT / "tests/kernels" / f"{name}.cpp"
        subprocess.run([compiler, *options, test, "-o", program], check=True)
        return subprocess.run([program]).returncode == 0


def main():
    names = sys.argv[1:] or list(FILES)
    if unknown := set(names) - set(FILES):
        sys.exit(f"no kernels of this name: {', '.join(sorted(unknown))}; there are {', '.join(FILES)}")
    if not all([check(name) for name in names]):
        sys.exit(1)


main()
