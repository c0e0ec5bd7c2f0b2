"""The build of the compiled extension, on sources and with an nvcc that take no time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from csrc import build

ROOT = Path(build.__file__).parent.parent
FAILING_NVCC = """\
#!/bin/sh
echo "nvcc fatal   : a reason of this test" >&2
exit 1
"""
# Hands the arguments that g++ knows to it, and counts the compilations.
WORKING_NVCC = """\
#!/bin/sh
language=
for argument; do
  shift
  case $argument in
    -gencode=* | -lineinfo | -Werror=all-warnings | -Xptxas=* | -Xcompiler=* | -cudart=*) ;;
    -nodlink) ;;
    *.cu) echo "$argument" >> "$CALLS"; echo "ptxas info" >&2; set -- "$@" -x c++ "$argument" ;;
    *) set -- "$@" "$argument" ;;
  esac
done
exec g++ -fPIC "$@"
"""
SOURCES = {
    "bindings.cpp": """\
        #include <Python.h>
        #define JOINED(a, b) a##b
        #define INIT(name) JOINED(PyInit_, name)
        int one(); int two(); int where();
        static PyModuleDef module = {PyModuleDef_HEAD_INIT, "module", nullptr, -1, nullptr,
                                     nullptr, nullptr, nullptr, nullptr};
        PyMODINIT_FUNC INIT(GPT1_KERNELS_MODULE)() {
          PyObject* object = PyModule_Create(&module);
          PyModule_AddIntConstant(object, "sum", one() + two() + where());
          return object;
        }
        """,
    "one/one.h": "const int kOne = 1;\n",
    "one/one.cu": '#include "one/one.h"\nint one() { return kOne; }\n',
    "two/two.cu": "int two() { return 2; }\n",
    "platform/device.cu": "int where() { return 100; }\n",
    "platform/host.cpp": "int where() { return 200; }\n",
}


def executable(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def project(tmp_path):
    """A copy of the build with small sources: a function that builds in place, with some nvcc.

    It returns the exit status, what was printed, and the names of the files that nvcc compiled.
    """
    root = tmp_path / "a project"
    for name, text in SOURCES.items():
        file = root / "csrc" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    executable(root / "gpt1_kernels/__init__.py")
    shutil.copy(ROOT / "setup.py", root)
    shutil.copy(build.__file__, root / "csrc")

    calls = tmp_path / "calls"

    def run(nvcc=None, command=("build_ext", "--inplace"), **variables):
        if nvcc is not None:
            executable(tmp_path / "toolkit/bin/nvcc", nvcc)
            variables |= {"CUDA_HOME": str(tmp_path / "toolkit"), "CALLS": str(calls)}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("GPT1", "TORCH", "CUDA"))}
        calls.write_text("")
        process = subprocess.run(
            [sys.executable, "setup.py", *command],
            cwd=root, env={**kept, **variables}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        compiled = [Path(line).name for line in calls.read_text().splitlines()]
        return process.returncode, process.stdout + process.stderr, sorted(compiled)

    run.root = root
    return run


def modules(root):
    return sorted(path.name.partition(".")[0] for path in root.glob("gpt1_kernels/*.so"))


def value_of(root, name):
    code = f"import sys; sys.path.insert(0, 'gpt1_kernels'); import {name}; print({name}.sum)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    return int(run.stdout)


def test_each_module_has_its_platform_and_a_change_rebuilds_one_object(project):
    code, output, compiled = project(WORKING_NVCC, GPT1_KERNELS_BUILD_HOST="1")
    assert code == 0, output
    assert compiled == ["device.cu", "one.cu", "two.cu"]
    assert value_of(project.root, "_cuda") == 103
    assert value_of(project.root, "_cuda_host") == 203
    assert "ptxas info" in (project.root / "build/cuda/one/one.cu.o.ptxas").read_text()

    assert project(WORKING_NVCC)[2] == []
    (project.root / "csrc/two/two.cu").write_text("int two() { return 4; }\n")
    assert project(WORKING_NVCC)[2] == ["two.cu"]
    (project.root / "csrc/one/one.h").write_text("const int kOne = 8;\n")
    assert project(WORKING_NVCC)[2] == ["one.cu"]
    assert value_of(project.root, "_cuda") == 112


def test_a_wheel_has_nothing_of_an_earlier_one(project):
    old = project.root / "gpt1_kernels/removed.py"
    old.touch()
    code, output, _ = project(WORKING_NVCC, command=["build"])
    assert code == 0, output
    old.unlink()
    code, output, _ = project(
        command=["build"], GPT1_KERNELS_BUILD_CUDA="0", GPT1_KERNELS_BUILD_HOST="1"
    )
    assert code == 0, output
    (packed,) = project.root.glob("build/lib*/gpt1_kernels")
    assert sorted(path.name.partition(".")[0] for path in packed.iterdir()) == [
        "__init__", "_cuda_host"
    ]  # fmt: skip


def test_a_failing_nvcc_fails_the_build_with_its_message(project):
    code, output, _ = project(FAILING_NVCC)
    assert code != 0
    assert "nvcc fatal   : a reason of this test" in output
    assert "gpt1_kernels._cuda was not built" in output
    assert modules(project.root) == []


def test_the_device_build_can_be_switched_off(project):
    code, output, _ = project(FAILING_NVCC, GPT1_KERNELS_BUILD_CUDA="0")
    assert code == 0, output
    assert modules(project.root) == []


@pytest.mark.parametrize("host", [{}, {"GPT1_KERNELS_BUILD_HOST": "1"}])
def test_without_nvcc_it_installs_without_the_device_module(project, host, monkeypatch):
    gxx = shutil.which("g++")
    folder = project.root.parent / "bin"
    folder.mkdir()
    for tool in ("as", "ld", "sh"):
        (folder / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    if (nvcc := build.find_nvcc()) is not None:
        pytest.skip(f"nvcc is a Python package here: {nvcc}")
    code, output, _ = project(PATH=str(folder), CXX=gxx, **host)
    assert code == 0, output
    assert modules(project.root) == (["_cuda_host"] if host else [])


def test_nvcc_is_searched_in_cuda_home_then_the_path_then_the_packages(tmp_path, monkeypatch):
    home = executable(tmp_path / "toolkit/bin/nvcc")
    path = executable(tmp_path / "bin/nvcc")
    package = executable(tmp_path / "site-packages/nvidia/cu13/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(build, "_site_folders", lambda: [tmp_path / "site-packages"])
    for found in (home, path, package):
        assert build.find_nvcc() == str(found)
        found.unlink()
    assert build.find_nvcc() is None


def test_a_relative_cuda_home_is_found_from_the_folder_of_the_build(tmp_path, monkeypatch):
    nvcc = executable(tmp_path / "toolkit/bin/nvcc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_HOME", "toolkit")
    assert build.find_nvcc() == str(nvcc)


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_nothing_is_compiled_but_on_linux(system, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setenv("GPT1_KERNELS_BUILD_HOST", "1")
    monkeypatch.delenv("GPT1_KERNELS_BUILD_CUDA", raising=False)
    assert len(build.extension_modules()) == 2
    monkeypatch.setattr(sys, "platform", system)
    assert build.extension_modules() == []


def test_packages_are_found_under_build_isolation(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    installed = Path(pytest.__file__).parent.parent
    assert {tmp_path, installed} <= set(build._site_folders())


@pytest.mark.parametrize(
    ("capabilities", "flags"),
    [
        ("8.0", ["compute_80,code=sm_80"]),
        ("8.0;9.0", ["compute_80,code=sm_80", "compute_90,code=sm_90"]),
        ("9.0+PTX", ["compute_90,code=sm_90", "compute_90,code=compute_90"]),
        ("7.0 8.6  12.0", ["compute_86,code=sm_86", "compute_120,code=sm_120"]),
        ("9.0a;", ["compute_90a,code=sm_90a"]),
    ],
)
def test_architectures(capabilities, flags):
    assert build.architecture_flags(capabilities).split() == [f"-gencode=arch={f}" for f in flags]


@pytest.mark.parametrize(
    ("capabilities", "message"),
    [
        ("8.0;Hopper", "TORCH_CUDA_ARCH_LIST: 'Hopper', expected .* such as '8.0;9.0;10.0\\+PTX'"),
        ("90", "TORCH_CUDA_ARCH_LIST: '90', expected"),
        ("7.0 7.5", "'7.0 7.5', expected at least one capability from 8.0 on"),
        ("", "expected at least one"),
    ],
)
def test_what_is_no_architecture_is_refused(capabilities, message):
    with pytest.raises(ValueError, match=message):
        build.architecture_flags(capabilities)


def test_a_file_for_hopper_alone_is_compiled_for_it_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    executable(tmp_path / "csrc/attention_sm90a.cu")
    assert build.ninja_file("_cuda").splitlines()[-3:] == [
        "build attention_sm90a.cu.o: cu ../../csrc/attention_sm90a.cu",
        "  architectures = -gencode=arch=compute_90a,code=sm_90a",
        "build _cuda.so: link attention_sm90a.cu.o",
    ]
    on_host = build.ninja_file("_cuda_host")
    assert "build attention_sm90a.cu.o: cu_on_host" in on_host
    assert "  architectures =" not in on_host


@pytest.mark.parametrize(
    ("max_jobs", "bytes_per_job", "jobs"),
    [
        ("5", 2**60, 5),
        (None, 1, len(os.sched_getaffinity(0))),
        (None, 2**60, 1),
    ],
)
def test_jobs_are_limited_by_cores_and_memory(max_jobs, bytes_per_job, jobs, monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    if max_jobs is not None:
        monkeypatch.setenv("MAX_JOBS", max_jobs)
    monkeypatch.setattr(build, "BYTES_PER_JOB", bytes_per_job)
    assert build.parallel_jobs() == jobs


@pytest.mark.parametrize("source", ["norms/kernel.cu", "rows.cuh"])
def test_a_module_is_outdated_once_a_source_is_newer(tmp_path, monkeypatch, source):
    module, source = tmp_path / "_cuda.so", tmp_path / "csrc" / source
    source.parent.mkdir(parents=True)
    for path in (module, source, tmp_path / "csrc/build.pyc"):
        path.touch()
    spec = SimpleNamespace(origin=str(module))
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
    for age, outdated in ((10, False), (30, True)):
        os.utime(module, (20, 20))
        os.utime(source, (age, age))
        assert build.is_outdated("_cuda") is outdated
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert not build.is_outdated("_cuda")
