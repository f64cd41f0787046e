"""Own the compilation of the C sources beside: once a run, into the folder of the run.

Never keeps a binary.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-pthread")


def compile_program(name: str, folder: Path, *, is_shared: bool = False) -> Path:
    """Return the program, or the shared object, of `name`.c in a folder, compiled if need be.

    Raises:
        FileNotFoundError: No gcc here.
        RuntimeError: It does not compile; the message ends with what the compiler said.
    """
    program = folder / (f"{name}.so" if is_shared else name)
    if not program.exists():
        source = Path(__file__).with_name(f"{name}.c")
        command = ["gcc", *FLAGS, *(("-shared", "-fPIC") if is_shared else ()), "-o", str(program), str(source)]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            raise RuntimeError(f"{source.name} does not compile:\n{answer.stderr}")
    return program
