"""Compiles the native kernels into the wheel, or into the tree for an editable install.

Without a C compiler the package is installed all the same, and experts on the CPU run in torch.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_KERNELS = Path("moespac/experts/kernels")


class KernelsHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        directory = Path(self.root) / _KERNELS
        spec = importlib.util.spec_from_file_location("compile_kernels", directory / "compile.py")
        assert spec is not None and spec.loader is not None
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        try:
            library = kernels.compile_library(directory)
        except (kernels.CompileError, OSError) as error:
            self.app.display_warning(f"native kernels left out: {error}")
            return
        build_data["force_include"][str(library)] = str(_KERNELS / library.name)  # git ignores it, we do not
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"  # ctypes: any Python will do
