"""`python -m tests.map [--write]`: the map of the repository in CONTRIBUTING.md, drawn from the tree.

A folder's line is the first sentence of its package's docstring; its files are
listed by name, `test_` left out. Exit status: 1 the map is not the tree.
"""

import argparse
import ast
import sys
from collections.abc import Iterator

from tests.pages import ROOT

PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- the map: python -m tests.map --write -->\n\n", "\n<!-- the end of the map -->\n"


def rows() -> Iterator[str]:
    """A row for each package, from the top of each tree down."""
    for top in ("tiedquiet", "tests", "benchmarks"):
        for package in sorted((ROOT / top).rglob("__init__.py")):
            folder = package.parent
            names = {path.stem.removeprefix("test_") for path in folder.glob("*.py")} - {
                "__init__",
                "__main__",
                "conftest",
            }
            name = folder.relative_to(ROOT).as_posix()
            yield f"| [`{name}/`]({name}) | {sentence(package.read_text(encoding='utf-8'))} | {', '.join(sorted(names))} |\n"


def sentence(source: str) -> str:
    """The first sentence of a module's docstring; empty if it has none."""
    first = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0]
    return " ".join(first.split()).split(". ")[0].rstrip(".")


def drawn() -> str:
    return "".join(["| folder | what is in it | files |\n", "| --- | --- | --- |\n", *rows()])


def shown() -> str:
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.map", description="Draw the map of CONTRIBUTING.md.")
    parser.add_argument("--write", action="store_true", help="put it there")
    if not parser.parse_args().write:
        print(drawn(), end="")
        return int(drawn() != shown())
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + begin + drawn() + END + rest.partition(END)[2], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
