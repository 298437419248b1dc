"""Write ``dp-lora`` into a folder: this repository's ``python -m privacy.commands``, from anywhere.

``make install`` runs it with the environment's Python and the environment's ``bin``. What is
installed from the wheel gets its ``dp-lora`` from ``[project.scripts]`` instead.
"""

import os
import pathlib
import secrets
import shlex
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Through sh, since a first line `#!/path/to/python` can hold neither blanks nor long paths.
TEXT = """#!/bin/sh
'''exec' {python} "$0" "$@"
' '''
# Made by tools/launcher.py; `make install` makes it again.
import runpy
import sys

sys.path[0] = {root!r}
runpy.run_module("privacy.commands", run_name="__main__", alter_sys=True)
"""


def write(folder: pathlib.Path, python: str = sys.executable) -> pathlib.Path:
    """Write the launcher, whole or not at all; return its path."""
    path = folder / "dp-lora"
    beside = folder / f".dp-lora.{secrets.token_hex(4)}"
    try:
        beside.write_text(TEXT.format(python=shlex.quote(python), root=str(ROOT)), "utf-8")
        beside.chmod(0o755)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2 or not pathlib.Path(sys.argv[1]).is_dir():
        sys.exit(f"tools/launcher.py takes a folder that exists, got {sys.argv[1:]}")
    write(pathlib.Path(sys.argv[1]).absolute())
