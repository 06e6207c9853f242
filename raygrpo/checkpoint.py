"""What a run needs to go on: whole checkpoints or none.

    checkpoints/
      step-000050/          the policy after step 50: what the engine wrote, and
        manifest.json       the size and digest of every file, and where the run stood
      step-000100.partial/  one that is being written, or was when the run died
      best                  a link to the best of them (`checkpoint.best_by`)

A checkpoint is written beside the others, digested, flushed, and renamed into place: the rename is the moment at which
it exists. `newest` verifies before it believes, so a file that was cut short or changed makes it fall back to the
checkpoint before, loudly.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import xxhash

logger = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "manifest.json"
BEST = "best"
READ_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where the run stood, beside weights and optimizer."""

    step: int  # steps trained: the version of the policy, and groups_per_step times that the data cursor
    attempt: int  # of the gang that wrote it; a later attempt fences what is left of earlier ones
    num_learners: int  # ranks among which the optimizer's state is divided
    zero_stage: int
    kl_coef: float
    prompts_digest: str  # a ticket stands for the same prompt only while this holds
    groups_per_step: int
    seed: int
    mean_reward: float  # over the steps since the checkpoint before; NaN without one


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    directory: Path
    state: RunState

    @property
    def digest(self) -> str:
        """Of what its manifest says: of every file, and of where the run stood."""
        return xxhash.xxh3_128((self.directory / MANIFEST).read_bytes()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Manifest:
    state: dict
    files: dict[str, list] = field(default_factory=dict)  # relative path -> [bytes, xxh3_128]
    format: int = FORMAT


class CheckpointStore:
    """The checkpoints of one run, in one directory that all learners see."""

    def __init__(self, root: str | Path, *, keep: int, keep_best: int = 0):
        """keep: how many of the newest stay; keep_best: and how many of the others, the best. The rest is deleted when
        a new one is whole."""
        self.root = Path(root)
        self._keep = keep
        self._keep_best = keep_best

    def begin(self, step: int) -> Path:
        """An empty directory to write the checkpoint of `step` into. One process calls this, before all write."""
        partial = self._partial(step)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def commit(self, state: RunState, scores: Mapping[int, float] | None = None) -> Checkpoint:
        """Make what was written since `begin` a checkpoint. One process calls this, after all have written. Raises
        OSError.

        scores: by step, how good the policies are: the higher the better, the worst where it is not known. None: their
        mean_reward."""
        partial, final = self._partial(state.step), self._final(state.step)
        files = {str(path.relative_to(partial)): _size_and_digest(path) for path in _files(partial)}
        manifest = _Manifest(state=asdict(state), files=files)
        with open(partial / MANIFEST, "w") as stream:
            json.dump(asdict(manifest), stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        shutil.rmtree(final, ignore_errors=True)  # of an earlier attempt at the same step
        os.rename(partial, final)
        _flush_directory(self.root)
        others = sorted(self._directories()[self._keep :], key=lambda path: _score(path, scores), reverse=True)
        for old in others[self._keep_best :]:
            shutil.rmtree(old, ignore_errors=True)
        self.rank(scores)
        return Checkpoint(directory=final, state=state)

    def rank(self, scores: Mapping[int, float] | None = None) -> None:
        """Have `best` point to the best checkpoint, the newest of equals. See `commit` for scores."""
        best = max(self._directories(), key=lambda path: _score(path, scores), default=None)
        if best is None:
            return
        partial = self.root / f"{BEST}.partial"
        try:
            partial.unlink(missing_ok=True)
            partial.symlink_to(best.name)
            os.replace(partial, self.root / BEST)
        except OSError as error:  # the checkpoints are whole all the same
            logger.error("%s cannot point to %s: %s", self.root / BEST, best.name, error)

    @property
    def best(self) -> Path | None:
        """What `best` points to."""
        link = self.root / BEST
        return link.resolve() if link.exists() else None

    def abandon(self, step: int) -> None:
        """Remove what `begin` began."""
        shutil.rmtree(self._partial(step), ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, every byte verified; None without one. Says what is wrong with those it passes
        over."""
        for directory in self._directories():
            try:
                return _verified(directory)
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.error("the checkpoint %s is damaged and is passed over: %s", directory, error)
        return None

    def steps(self) -> list[int]:
        """Of the checkpoints on disk, ascending; not verified."""
        return sorted(int(directory.name.removeprefix("step-")) for directory in self._directories())

    def _directories(self) -> list[Path]:
        """Newest first."""
        return sorted(self.root.glob("step-" + "[0-9]" * 6), reverse=True)

    def _final(self, step: int) -> Path:
        return self.root / f"step-{step:06d}"

    def _partial(self, step: int) -> Path:
        return self.root / f"step-{step:06d}.partial"


def _verified(directory: Path) -> Checkpoint:
    manifest = _Manifest(**json.loads((directory / MANIFEST).read_text()))
    if manifest.format != FORMAT:
        raise ValueError(f"it has format {manifest.format}, and this version of raygrpo reads format {FORMAT}")
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.exists():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != expected[0]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes instead of {expected[0]}")
        if _size_and_digest(path)[1] != expected[1]:
            raise ValueError(f"the digest of {name} does not match its bytes")
    return Checkpoint(directory=directory, state=RunState(**manifest.state))


def _score(directory: Path, scores: Mapping[int, float] | None) -> float:
    if scores is not None:
        return scores.get(int(directory.name.removeprefix("step-")), -math.inf)
    try:
        value = json.loads((directory / MANIFEST).read_text())["state"]["mean_reward"]
    except (OSError, ValueError, KeyError):
        return -math.inf
    return -math.inf if math.isnan(value) else value


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _size_and_digest(path: Path) -> list:
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as stream:
        while chunk := stream.read(READ_BYTES):
            digest.update(chunk)
            size += len(chunk)
        os.fsync(stream.fileno())
    return [size, digest.hexdigest()]


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
