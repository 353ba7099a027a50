"""Which pictures are meant, where their results go, and writing these whole or not at all (no torch)."""

from __future__ import annotations

import glob
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pseudoseg_fast.data.lists import IMAGE_SUFFIXES, shorten
from pseudoseg_fast.data.walk import walk

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"})


class Job(NamedTuple):
    """One picture or video.

    Attributes:
        source: its file.
        name: path of its results below the output folder, without a suffix.
    """

    source: Path
    name: PurePosixPath

    @property
    def is_video(self) -> bool:
        """Whether the file is called a video."""
        return self.source.suffix.lower() in VIDEO_SUFFIXES


class Found(NamedTuple):
    """What was found to segment, and what was not taken.

    Attributes:
        jobs: pictures and videos.
        masks: folders that hold the masks of a data set whose root was given.
        others: number of other files in the folders that were given, by suffix.
    """

    jobs: list[Job]
    masks: list[Path]
    others: Counter[str]


def find_jobs(inputs: Sequence[str], out: Path, suffixes: Sequence[str]) -> Found:
    """Find the pictures and videos that files, folders and globs name.

    A folder is searched through, and its results keep their places below it, and those of a glob theirs below the part
    before its first wildcard. A file's result is named after the file. Where a folder has ``images`` and ``masks``, as
    a data set's root does, the latter are left out.

    Args:
        inputs: as given on the command line.
        out: folder of the results, which is left out of a search.
        suffixes: what is appended to a job's name, for each result of a picture.

    Raises:
        ValueError: an input names nothing, or two results would have one name, or one would replace an input.
    """
    jobs: dict[Path, Job] = {}
    masks, others = [], Counter[str]()
    for given in inputs:
        if all((Path(given) / name).is_dir() for name in ("images", "masks")):
            masks.append(Path(given) / "masks")
        found = list(_find(given, [out, *masks], others))
        if not found:
            raise ValueError(
                f"expected pictures ({', '.join(sorted(IMAGE_SUFFIXES))}) or videos in every INPUT; {given} holds none"
            )
        for source, relative in found:
            jobs.setdefault(
                Path(os.path.abspath(source)), Job(source, PurePosixPath(relative).with_suffix(""))
            )
    _check_names(list(jobs.values()), out, suffixes)
    return Found(list(jobs.values()), masks, others)


def _find(given: str, left_out: Sequence[Path], others: Counter[str]) -> Iterator[tuple[Path, str]]:
    """Yield files and their paths relative to what was given.

    Args:
        given: a file, folder or glob.
        left_out: folders that are not searched.
        others: gets the files of a folder that are neither pictures nor videos, by suffix.
    """
    path = Path(given)
    inside = [Path(os.path.abspath(folder)) for folder in left_out]
    if path.is_dir():
        below = [folder for folder in inside if Path(os.path.abspath(path)) in folder.parents]
        for name in sorted(walk(path)):
            if any(Path(os.path.abspath(name)).is_relative_to(folder) for folder in below):
                continue
            if _is_known(name):
                yield Path(name), Path(name).relative_to(path).as_posix()
            else:
                others[Path(name).suffix] += 1
    elif path.is_file():
        yield path, path.name
    elif glob.has_magic(given):
        parts = path.parts
        fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        base = Path(*parts[:fixed])
        below = [folder for folder in inside if Path(os.path.abspath(base)) in folder.parents]
        for match in sorted(glob.glob(given, recursive=True)):
            if any(Path(os.path.abspath(match)).is_relative_to(folder) for folder in below):
                continue
            if Path(match).is_file() and _is_known(match):
                yield Path(match), Path(os.path.relpath(match, base)).as_posix()
    else:
        raise ValueError(f"expected a file, a folder or a glob, found nothing at {given}")


def _is_known(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES


def _check_names(jobs: Sequence[Job], out: Path, suffixes: Sequence[str]) -> None:
    """Raise ValueError if results would replace each other or an input."""
    sources = {os.path.realpath(job.source) for job in jobs}
    targets: dict[str, Path] = {}
    videos = {job.name: job.source for job in jobs if job.is_video}
    problems = []
    for job in jobs:
        if video := next((videos[parent] for parent in job.name.parents if parent in videos), None):
            problems.append(f"{job.source} would be written among the frames of {video}")
        # A video's folder of frames is named like a picture's result without its suffix.
        for suffix in ("",) if job.is_video else suffixes:
            target = f"{job.name}{suffix}"
            if target in targets:
                problems.append(f"{targets[target]} and {job.source} would both be written to {out / target}")
                break
            if os.path.realpath(out / target) in sources:
                problems.append(f"the result of {job.source} would replace the input {out / target}")
            targets[target] = job.source
    if problems:
        raise ValueError(
            "expected a place of its own for every result; rename one of two pictures that differ in their suffix "
            f"alone, give a common folder as INPUT, another --out, or several commands:\n{shorten(problems)}"
        )


def prepare_folder(out: Path) -> None:
    """Make the output folder and try to write to it.

    Raises:
        OSError: that cannot be done.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(
            f"--out expects a folder that can be written, {out} cannot: {error.strerror or error}"
        ) from error


def write_whole(out: Path, name: PurePosixPath | str, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary file, then give it its name below ``out``; a link there is replaced, not followed.

    Raises:
        OSError: the file cannot be written, or a link would lead it out of ``out``.
    """
    target = out / name
    folder = target.parent
    if not folder.resolve().is_relative_to(out.resolve()):
        raise OSError(f"{target} lies outside {out}, a link leads there; expected results inside --out alone")
    folder.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=folder, prefix=".partial-", suffix=target.suffix)
    os.close(handle)
    try:
        write(Path(partial))
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return target


def _umask() -> int:
    """Return the process's mask for new files, which temporary files ignore."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
