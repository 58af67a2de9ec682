"""Bridge from setuptools to CMake, which builds libdiffqkv.so and diffqkv._core into the package folder."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PYBIND = os.environ.get("DIFFQKV_PYBIND", "ON").upper()
# Environment variables that are CMake options of the same name.
OPTIONS = ("DIFFQKV_CUDA", "DIFFQKV_TORCH_ROOT", "DIFFQKV_SANITIZE", "CMAKE_CUDA_ARCHITECTURES", "CMAKE_BUILD_TYPE")


class CMakeBuild(build_ext):
    """Builds everything by one CMake run, into the wheel's package folder or, in place, that of the source tree."""

    def run(self):
        in_place = self.inplace or self.editable_mode
        package = ROOT / "python" / "diffqkv" if in_place else Path(self.build_lib).resolve() / "diffqkv"
        build = Path(os.environ.get("DIFFQKV_BUILD_DIR", ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"))
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DDIFFQKV_PYBIND={PYBIND}"]
        configure += [f"-D{name}={os.environ[name]}" for name in OPTIONS if name in os.environ]
        if not (build / "CMakeCache.txt").exists():
            configure += ["-G", "Ninja"]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        for command in (
            configure,
            ["cmake", "--build", str(build), "--parallel", jobs],
            ["cmake", "--install", str(build), "--prefix", str(package)],
        ):
            subprocess.run(command, check=True)

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    """Without _core no file in the wheel knows the Python version."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if PYBIND == "ON" else ("py3", "none", platform)


setup(
    ext_modules=[Extension("diffqkv._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
