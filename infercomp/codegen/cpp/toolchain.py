"""The C++ compiler: found once, called in parallel, its results kept by the hash of all that went in."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from ...runtime.errors import BuildError, CompilerRefusedError
from ..config import CodegenConfig

SUPPORT = Path(__file__).parent / "support"
# Tuned for some processors, GCC adds products to a chain of sums in one instruction here and in two there, as the code
# around it has it: a row's bits would depend on how many rows are with it.
BITS_OF_SUMS = "--param=avoid-fma-max-bits=0"
_COMMON = ("-std=c++17", "-O3", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", BITS_OF_SUMS, "-w")
INSTRUCTION_SETS = {
    "native": ("-march=native", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}


@lru_cache(maxsize=1)
def compiler() -> str:
    """The C++ compiler's path: CXX if set, else c++, g++ or clang++; raises BuildError if there is none."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        found = shutil.which(candidate)
        if found:
            return found
    raise BuildError(
        f"no C++ compiler was found (looked for {', '.join(candidates)})",
        remedy='install g++ or clang (Debian: apt install g++), set CXX, or use codegen="reference" to run without one',
        field="codegen",
    )


def cache_folder(cache_dir: str | None) -> Path:
    """Where built libraries are kept: ``cache_dir``, else infercomp under the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infercomp"


_lock = threading.Lock()
_in_progress: dict[Path, Future[Path]] = {}


def build_library(sources: Sequence[str], config: CodegenConfig) -> Path:
    """A shared library of these C++ texts, built unless it is in the cache; each text is one translation unit.

    Raises BuildError without a compiler, if the cache cannot be written, or if a text does not compile.
    """
    return start_building(sources, config).result()


def start_building(sources: Sequence[str], config: CodegenConfig) -> Future[Path]:
    """The same beside what the caller goes on to do; whoever asks for a library that is being built waits for it."""
    flags = _flags(config)
    folder = cache_folder(config.cache_dir)
    library = folder / f"{_key(sources_digest(sources), flags)}.so"
    with _lock:
        future = _in_progress.get(library)
        if future is None:
            future = _in_progress[library] = Future()
            worker = threading.Thread(target=_fulfil, args=(future, sources, flags, library))
            worker.start()
    return future


def _fulfil(future: Future[Path], sources: Sequence[str], flags: Sequence[str], library: Path) -> None:
    try:
        result = _built(sources, flags, library)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
    finally:
        # Finished ones are found in the cache, or tried again.
        with _lock:
            del _in_progress[library]


def _flags(config: CodegenConfig) -> tuple[str, ...]:
    return (*_COMMON, *INSTRUCTION_SETS[config.instruction_set])


def _built(sources: Sequence[str], flags: Sequence[str], library: Path) -> Path:
    if library.exists():
        return library
    folder, key = library.parent, library.stem
    try:
        folder.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=folder))
    except OSError as error:
        raise BuildError(
            f"the cache folder {folder} cannot be written: {error.strerror}",
            remedy="set cache_dir (INFERCOMP_CACHE_DIR) to a folder that can be written",
            field="cache_dir",
        ) from None
    try:
        _build(sources, flags, workplace, library)
    except _Stopped:
        shutil.rmtree(workplace)
        raise
    shutil.rmtree(workplace)
    return library


class _Stopped(BuildError):
    """Somebody has ended the compiler, so that there is nothing to look into."""


def fingerprint(parts: Sequence[str], config: CodegenConfig) -> str:
    """A hash of ``parts`` and of all that a build depends on besides its sources."""
    return _key(sources_digest(parts), _flags(config))


def _build(sources: Sequence[str], flags: Sequence[str], workplace: Path, library: Path) -> None:
    paths = [workplace / f"unit_{i}.cpp" for i in range(len(sources))]
    for path, text in zip(paths, sources, strict=True):
        path.write_text(text)

    def compile_unit(path: Path) -> None:
        # Quoted includes only: the system's headers of the same names must stay where the system looks for them.
        _run([compiler(), *flags, "-iquote", str(SUPPORT), "-c", str(path), "-o", f"{path}.o"], path)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_unit, paths))
    linked = workplace / "linked.so"
    _run([compiler(), "-shared", "-pthread", *(f"{path}.o" for path in paths), "-o", str(linked)], workplace)
    # Renaming is atomic: nobody loads half a library, whoever else builds the same.
    linked.replace(library)


def _run(command: Sequence[str], place: Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode < 0:
        raise _Stopped(f"the C++ compiler was ended by signal {-result.returncode}", remedy="start again")
    if result.returncode:
        first = "\n    ".join(result.stderr.strip().splitlines()[:12])
        raise CompilerRefusedError(
            f"the C++ compiler refused a generated file:\n    {first}",
            where=str(place),
            remedy='the file is kept; please report it, and use codegen="reference" meanwhile',
        )


def cached_library(digest: str, config: CodegenConfig) -> Path | None:
    """The library of the texts with this ``sources_digest``, if it has been built."""
    library = cache_folder(config.cache_dir) / f"{_key(digest, _flags(config))}.so"
    return library if library.exists() else None


def sources_digest(sources: Sequence[str]) -> str:
    """What tells texts apart from all that compile otherwise."""
    return _digest(map(_without_comments, sources))


def _key(sources: str, flags: Sequence[str]) -> str:
    """The name of what is built of the texts with this digest, on this machine."""
    return _digest((sources, *flags, _told(("--version",)), _target(tuple(flags)), _support_text()))[:24]


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _without_comments(source: str) -> str:
    """Where a kernel came from is told in comments, and does not change it."""
    return "\n".join(line for line in source.splitlines() if not line.startswith("//"))


def _target(flags: tuple[str, ...]) -> str:
    """The processor and instructions that these flags stand for, -march=native among them: what is predefined."""
    return _told((*flags, "-dM", "-E", "-x", "c++", os.devnull))


@lru_cache(maxsize=8)
def _told(arguments: tuple[str, ...]) -> str:
    command = [compiler(), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(
            f"{shlex.join(command)} failed:\n    {result.stderr.strip()}",
            remedy='set CXX to a compiler that works, or use codegen="reference" to run without one',
            field="codegen",
        )
    return result.stdout


@lru_cache(maxsize=1)
def _support_text() -> str:
    return "\0".join(path.read_text() for path in sorted(SUPPORT.iterdir()) if path.is_file())
