"""A process of its own that answers lines of JSON: rivals share no threads or memory with us."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


class Companion:
    """A module of this directory, run as `python -m` until the block ends."""

    def __init__(self, module: str, name: str, environment: dict[str, str]):
        """Starts it.

        Args:
          module: of this directory; it reads standard input and answers on standard output.
          name: what messages call it.
          environment: variables beside our own.
        """
        tests = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [tests, os.getcwd(), *sys.path]))
        self.name = name
        self.messages = tempfile.TemporaryFile()  # noqa: SIM115, closed by __exit__
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"rivals.{module}"],
            env=os.environ | {"PYTHONPATH": path} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.messages,
        )

    def asked(self, question: Any) -> Any:
        """Its answer to a line of JSON, and to bytes as they are.

        Raises:
          RuntimeError: it ended; the message has its last words.
        """
        line = question if isinstance(question, bytes) else json.dumps(question).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # its last words say why
            self.process.stdin.write(line)
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            code = self.process.wait()
            self.messages.seek(0)
            said = self.messages.read().decode(errors="replace").strip()
            raise RuntimeError(f"The process of {self.name} exited with {code}: {said[-1000:]}")
        return json.loads(answer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):  # it has ended before it read all
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.messages.close()
