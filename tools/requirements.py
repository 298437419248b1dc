"""Print what the app and its tests need, from pyproject.toml, for one pip call.

Installing the project itself would put a second copy of its rooms into site-packages; the app runs
from this folder.
"""

import pathlib
import tomllib

project = tomllib.loads(
    (pathlib.Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
)["project"]
needs = [*project["dependencies"]]
for extra in project["optional-dependencies"].values():
    needs += extra
print(" ".join(needs))
