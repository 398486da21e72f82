"""A hook of mkdocs: the site has what the pages link to outside of docs/, at the same relative place.

On a forge `docs/cost.md` shows `../benchmarks/results/plot.png`. In the site, where docs/ is the root, that is
`benchmarks/results/plot.png`; README.md is its first page.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)((?:#[^)\s]*)?)(?=\))")
# The changelog compares releases where the repository lies; a site lies elsewhere.
_OF_THE_FORGE = re.compile(r"^\[[^\]]+\]: \.\./\.\./.*\n", re.MULTILINE)
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the first page, the changelog, and whatever is linked to, pages with their own links included."""
    waiting = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(Path(config.docs_dir).glob("*.md"))]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        for target, _ in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
            linked = _file(page.parent / target)
            if linked not in seen and linked.is_relative_to(ROOT) and linked.is_file():
                seen.add(linked)
                if linked.suffix == ".md":
                    waiting.append(linked)
    for path in sorted(seen):
        uri = _place(path)
        if files.get_file_from_path(uri) is None:
            file = File.generated(config, uri, abs_src_path=str(path))
            if uri.startswith("benchmarks/results/"):
                file.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of a page lead to where its targets are in the site."""
    source = Path(str(page.file.abs_src_path))

    def moved(link: re.Match[str]) -> str:
        target = _file(source.parent / link[1])
        if re.match(r"\w+:", link[1]) or not target.is_relative_to(ROOT):
            return link[0]
        return posixpath.relpath(_place(target), posixpath.dirname(page.file.src_uri) or ".") + link[2]

    if source.name == "CHANGELOG.md":
        markdown = re.sub(r"^## \[(.+?)\]", r"## \1", _OF_THE_FORGE.sub("", markdown), flags=re.MULTILINE)
    # Not in code: what stands between the fences is left alone.
    pieces = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(piece if piece.startswith("```") else _LINK.sub(moved, piece) for piece in pieces)


def _file(path: Path) -> Path:
    """What a link leads to; of a package, which a forge lists, the first file."""
    path = path.resolve()
    return path / "__init__.py" if path.is_dir() else path


def _place(path: Path) -> str:
    """Where a file of the repository is in the site."""
    uri = path.relative_to(ROOT).as_posix()
    return "index.md" if uri == "README.md" else uri.removeprefix("docs/")
