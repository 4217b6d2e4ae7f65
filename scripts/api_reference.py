"""Build the reference of the public names, from their docstrings, with pdoc."""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc
import pdoc.render

PACKAGE = Path(__file__).parent.parent / "rayserve_hooks"
# What the author of a callback imports, or gets handed, and what ships. The rest is the package's
# own.
MODULES = (
    "rayserve_hooks",
    *(f"rayserve_hooks.{path.stem}" for path in sorted(PACKAGE.glob("[a-z]*.py"))),
    *(f"rayserve_hooks.impls.{path.stem}" for path in sorted(PACKAGE.glob("impls/[a-z]*.py"))),
    *(["rayserve_hooks.testing"] if (PACKAGE / "testing").is_dir() else []),
)
FOLDER = Path(__file__).parent.parent / ".cache" / "reference"


def main(folder: Path = FOLDER) -> int:
    """Write a page for each module below ``folder``; ``index.html`` leads to them."""
    # The names of a page are those of its __all__; submodules have pages of their own.
    others = ("!rayserve_hooks.*", *MODULES)
    pdoc.render.configure(docformat="google", include_undocumented=False, show_source=False)
    pdoc.pdoc(*others, output_directory=folder)
    print(folder / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
