#!/usr/bin/env python3
"""Runs the CUDA kernels of products of few texts on the CPU, and compares them with float64.

    scripts/check_thin_products.py

Each thread of the GPU becomes a thread of the CPU (tests/kernels/thin_products.cpp). So clusters of
blocks, and blocks that wait for each other, are checked without a GPU. The script needs a C++
compiler, $CXX or c++, and takes about a minute.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ["pack", "step/finish", "step/thin"]
# what the CPU has no word for, and what stands for it
REPLACED = [
    (r'asm volatile\("prefetch[^\n]*', "(void)p;"),
    (r"__shared__ float of_warps\[16\];", "float *const of_warps = block->of_warps;"),
    (r"extern __shared__ uint4 of_product\[\];", "uint4 *const of_product = (uint4 *)block->dynamic;"),
    (r"const u32 place = [^\n]*", ""),
    (r"of_block\(place, k\)", "in_block(own, k)"),
    # functions that the program defines itself, and kernels of other files
    (r"static __device__ __forceinline__ float of_block\(.*?\n}\n", ""),
    (r"static __device__ __forceinline__ void cluster_wait\(.*?\n}\n", ""),
    (r"template <class T>\nstatic __device__ void step_norm\(.*?\n}\n", ""),
    (r"template <class T>\nstatic __device__ void step_finish\(.*?\n}\n", ""),
    (r"tanh_of\(ROOT_2_OVER_PI \*", "tanhf(0.7978845608f *"),
]


def main():
    source = "\n".join((ROOT / "csrc/kernels" / f"{name}.cuh").read_text() for name in FILES)
    for pattern, instead in REPLACED:
        source, count = re.subn(pattern, lambda _: instead, source, flags=re.DOTALL)
        if count == 0:
            sys.exit(f"csrc/kernels no longer has `{pattern}`")
    with tempfile.TemporaryDirectory() as folder:
        kernels, program = Path(folder, "kernels.h"), Path(folder, "program")
        kernels.write_text(f"#define WIDTH 2048\n{source}")
        compiler = os.environ.get("CXX", "c++")
        options = ["-O1", "-std=c++17", "-w", f'-DKERNELS="{kernels}"', "-pthread"]
        test = ROOT / "tests/kernels/thin_products.cpp"
        subprocess.run([compiler, *options, test, "-o", program], check=True)
        sys.exit(subprocess.run([program]).returncode)


main()
