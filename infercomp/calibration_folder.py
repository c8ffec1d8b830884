"""A folder of what calibration has measured, layer by layer: a run that was cut off goes on where it stopped."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .passes.calibration import Tensors
from .runtime.errors import ConfigError

_FIELD = "calibration_folder"
_SUFFIX = ".safetensors"


class CalibrationFolder:
    """Safetensors files, one for a layer. Their names stand for the weights, the samples and the method, so that a
    folder may hold the results of many models and recipes, and none is taken for another's."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Make the folder where there is none. Raises ConfigError for a path that cannot be one."""
        self._path = Path(path)
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"{self._path} cannot be a folder: {error.strerror}"
            raise ConfigError(what, remedy="name another folder", field=_FIELD) from error

    def read(self, name: str) -> Tensors | None:
        """The tensors of this name, None where there are none. Raises ConfigError for a file that is broken."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._file(name)
        if not path.exists():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            what = f"{path} cannot be read: {error}"
            raise ConfigError(what, remedy="delete the file, and it is measured again", field=_FIELD) from error

    def write(self, name: str, tensors: Tensors) -> None:
        """Keep tensors under a name; the file is there whole or not at all."""
        from safetensors.torch import save_file

        partial = self._file(name).with_suffix(".partial")
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
            partial.replace(self._file(name))
        except OSError as error:
            what = f"{self._path} cannot be written: {error.strerror or error}"
            raise ConfigError(what, remedy="make room there, or name another folder", field=_FIELD) from error
        finally:
            partial.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._path / (re.sub(r"[^\w.-]", "_", name) + _SUFFIX)
