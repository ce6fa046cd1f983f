"""Puts the host library into wheels that are built where a C++ compiler is; such a wheel is for this platform alone.
Everything else is in pyproject.toml. A wheel without the library compiles it on first use (kernels/host/library.py)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


def _load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("baton_host_build", Path(__file__).parent / "kernels/host/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD = _load_build()
COMPILER = BUILD.find_compiler(os.environ.get("CXX"))


class BuildWithLibrary(build_py):
    def run(self) -> None:
        super().run()
        if COMPILER is not None and not self.editable_mode:
            BUILD.compile_library(COMPILER, Path(self.build_lib) / "baton/kernels/host" / BUILD.packaged_name())


class PlatformWheel(bdist_wheel):
    """For every Python 3: the library is called by ctypes and knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if COMPILER is None else ("py3", "none", platform)


class WithLibrary(Distribution):
    def has_ext_modules(self) -> bool:
        return COMPILER is not None


setup(distclass=WithLibrary, cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel})
