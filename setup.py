"""The one thing that pyproject.toml cannot say: kernels are compiled where there is a compiler.

The library is plain C behind ctypes, no module of Python: it is compiled by
runtime/kernels/build.py, which also works after installing.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("dfc/runtime/kernels")  # a link in a checkout, a folder in an sdist


def _recipe():
    spec = importlib.util.spec_from_file_location("dfc_kernels_build", KERNELS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPE = _recipe()


class BuildKernels(build_ext):
    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split(".")[:-1]) / RECIPE.NAME)

    def build_extension(self, extension: Extension) -> None:
        """Without a compiler, or where it fails, dfc is installed without kernels."""
        try:
            RECIPE.build(Path(self.get_ext_fullpath(extension.name)).absolute())
        except RECIPE.BuildError as e:
            print(f"warning: kernels are left out: {e}", file=sys.stderr)


kernels = Extension(
    "dfc.runtime.kernels.library_of_kernels",
    sources=[str(KERNELS / s) for s in RECIPE.SOURCES],
    depends=[str(KERNELS / h) for h in RECIPE.HEADERS],
    optional=True,  # an editable install then looks whether the library is there
)
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels})
