"""Builds the compiled extension with ninja, on Linux; setup.py imports it.

Two modules come from the sources beside this file:

- `gpt1_kernels._cuda`, in build/cuda: *.cu by nvcc and *.cpp by the C++ compiler, without the files
  named host*;
- `gpt1_kernels._cuda_host`, in build/host: all by the C++ compiler, without the files named
  device*. It runs the same kernels on a CPU, also those for Hopper, slowly: a tool for tests.

Neither needs torch, a GPU or a driver. ENVIRONMENT.md has the variables that are read here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = "8.0;9.0;10.0+PTX"
LOWEST_ARCHITECTURE = 80
FOLDERS = {"_cuda": ROOT / "build/cuda", "_cuda_host": ROOT / "build/host"}
BYTES_PER_JOB = 3 * 2**30

CXX_FLAGS = "-std=c++20 -O2 -fPIC -fvisibility=hidden -Wall -Wextra -I../../csrc"
NVCC_FLAGS = (
    "-std=c++20 -O3 -lineinfo -Werror=all-warnings -Xptxas=-v "
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra -I../../csrc"
)

# What ptxas says of registers and spills is kept beside each object.
RULES = """\
rule cpp
  command = $cxx $cxx_flags $python_flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule cu
  command = $nvcc $nvcc_flags $architectures -MD -MF $out.d -c $in -o $out 2> $out.ptxas $
      || (cat $out.ptxas; exit 1)
  depfile = $out.d
  deps = gcc
rule link
  command = $nvcc -shared -nodlink -cudart=static $in -o $out
rule cu_on_host
  command = $cxx $cxx_flags -Wno-unknown-pragmas -MD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link_on_host
  command = $cxx -shared $in -o $out
"""


def extension_modules() -> list[Extension]:
    """The modules to build, as the environment and the machine have it."""
    if sys.platform != "linux":
        return []
    names = []
    if os.environ.get("GPT1_KERNELS_BUILD_CUDA") != "0" and find_nvcc() is not None:
        names.append("_cuda")
    if os.environ.get("GPT1_KERNELS_BUILD_HOST") == "1":
        names.append("_cuda_host")
    return [Extension(f"gpt1_kernels.{name}", sources=[]) for name in names]


class BuildAfresh(build):
    """Starts without the files of an earlier wheel, which setuptools would pack again."""

    def run(self) -> None:
        for folder in (ROOT / "build").glob("lib*"):
            shutil.rmtree(folder)
        super().run()


class BuildWithNinja(build_ext):
    """Builds a module in its folder, which is kept: the next build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        folder = FOLDERS[name]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(name))
        ninja = [sys.executable, "-m", "ninja", "-C", str(folder), f"-j{parallel_jobs()}"]
        if subprocess.run(ninja, check=False).returncode != 0:
            raise CompileError(
                f"{ext.name} was not built: the compiler says why above; ENVIRONMENT.md has "
                "the variables that leave it out"
            )
        module = Path(self.get_ext_fullpath(ext.name))
        module.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / f"{name}.so", module)


def ninja_file(name: str) -> str:
    """The steps from the sources to `name`.so; paths are relative to the folder of the build."""
    import pybind11

    on_host = name == "_cuda_host"
    cxx = os.environ.get("CXX")
    python = [pybind11.get_include(), *map(sysconfig.get_path, ("include", "platinclude"))]
    python_flags = [
        f"-DGPT1_KERNELS_MODULE={name}", *(f"-isystem{p}" for p in dict.fromkeys(python))
    ]  # fmt: skip
    variables = {"cxx": cxx or "g++", "cxx_flags": CXX_FLAGS}
    if not on_host:
        capabilities = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
        python_flags.append(f'-DGPT1_KERNELS_CAPABILITIES="{capabilities}"')
        host_compiler = [] if cxx is None else [f"-ccbin={cxx}"]
        variables |= {
            "nvcc": shlex.join([find_nvcc(), *host_compiler]),
            "nvcc_flags": NVCC_FLAGS,
            "architectures": architecture_flags(capabilities),
        }
    variables["python_flags"] = shlex.join(python_flags)
    lines = [f"{key} = {value.replace('$', '$$')}" for key, value in variables.items()]
    lines.append(RULES)

    objects = []
    suffix = "_on_host" if on_host else ""
    for source in sources(on_host):
        rule = "cpp" if source.suffix == ".cpp" else f"cu{suffix}"
        objects.append(f"{source}.o")
        lines.append(f"build {source}.o: {rule} ../../csrc/{source}")
        if source.stem.endswith("_sm90a") and not on_host:
            lines.append(f"  architectures = {architecture_flags('9.0a')}")
    lines.append(f"build {name}.so: link{suffix} {' '.join(objects)}\n")
    return "\n".join(lines)


def sources(on_host: bool) -> list[Path]:
    """The files of a module, relative to csrc/."""
    csrc = ROOT / "csrc"
    files = sorted(p.relative_to(csrc) for kind in ("cu", "cpp") for p in csrc.rglob(f"*.{kind}"))
    if on_host:
        return [p for p in files if not p.name.startswith("device")]
    return [p for p in files if not p.name.startswith("host")]


def is_outdated(name: str) -> bool:
    """Whether a module is there, but a source was changed since it was built; does not load it."""
    module = importlib.util.find_spec(f"gpt1_kernels.{name}")
    files = (p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h"))
    newest = max(p.stat().st_mtime for p in files)
    return module is not None and Path(module.origin).stat().st_mtime < newest


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of the PATH, or of the Python package nvidia-cuda-nvcc, in this order."""
    home = os.environ.get("CUDA_HOME")
    in_packages = [str(path) for folder in _site_folders() for path in folder.glob("nvidia/*/bin")]
    nvcc = (
        (home and shutil.which("nvcc", path=os.path.join(home, "bin")))
        or shutil.which("nvcc")
        or (in_packages and shutil.which("nvcc", path=os.pathsep.join(in_packages)))
    )
    return os.path.abspath(nvcc) if nvcc else None  # ninja runs in another folder


def _site_folders() -> list[Path]:
    """Where packages lie; under pip's build isolation, sys.path lacks the environment's own."""
    installed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return [Path(folder) for folder in [*sys.path, *installed, site.getusersitepackages()]]


def architecture_flags(capabilities: str) -> str:
    """nvcc's flags for compute capabilities such as "8.0;9.0+PTX", separated by ";" or spaces.

    Those below 8.0, which the kernels need, are left out.

    Raises:
        ValueError: a capability is not of this form, or none is left.
    """
    flags = []
    for capability in capabilities.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", capability)
        if match is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: {capability!r}, expected compute capabilities such as "
                f"{ARCHITECTURES!r}"
            )
        major, minor, variant, ptx = match.groups()
        if int(major + minor) < LOWEST_ARCHITECTURE:
            continue
        number = major + minor + variant
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        raise ValueError(
            f"TORCH_CUDA_ARCH_LIST: {capabilities!r}, expected at least one capability from 8.0 on"
        )
    return " ".join(flags)


def parallel_jobs() -> int:
    """MAX_JOBS, or one per core, but at most one per 3 GiB of free memory."""
    if jobs := os.environ.get("MAX_JOBS"):
        return int(jobs)
    memory = int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    container_limit = Path("/sys/fs/cgroup/memory.max")
    if container_limit.exists() and (limit := container_limit.read_text().strip()) != "max":
        memory = min(memory, int(limit))
    return max(1, min(len(os.sched_getaffinity(0)), memory // BYTES_PER_JOB))
