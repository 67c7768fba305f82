"""Every link of the built site leads somewhere, and every public name has its place on it."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import curvopt
import curvopt.privacy


class Page(HTMLParser):
    """What a page refers to, and what it can be referred to by."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        """Note links and anchors."""
        for key, value in attrs:
            if key == "id" or (tag == "a" and key == "name"):
                self.anchors.add(value)
            elif key in ("href", "src") and value and tag in ("a", "img", "script", "link"):
                self.links.add(value)


def dead(root):
    """``(page, link)`` for each link within the site that leads nowhere."""
    pages = {path.resolve(): Page(path) for path in sorted(Path(root).rglob("*.html"))}
    for path, page in pages.items():
        for link in sorted(page.links):
            if link.startswith(("http://", "https://", "mailto:", "data:", "javascript:", "//")):
                continue
            target, anchor = urldefrag(unquote(link))
            to = (path.parent / target.split("?")[0]).resolve() if target else path
            if not to.exists() or (anchor and to in pages and anchor not in pages[to].anchors):
                yield path, link


def unnamed(root):
    """Public names that have no place in the reference."""
    anchors = {a for path in Path(root, "api").glob("*.html") for a in Page(path).anchors}
    names = [f"curvopt.{name}" for name in curvopt.__all__]
    names += [f"curvopt.privacy.{name}" for name in curvopt.privacy.__all__]
    return [name for name in names if name not in anchors]


def check(root):
    """Raise SystemExit if something leads nowhere, or is missing."""
    wrong = [f"{path.relative_to(Path(root).resolve())}: {link}" for path, link in dead(root)]
    wrong += [f"{name} is not in the reference" for name in unnamed(root)]
    if wrong:
        raise SystemExit("\n".join(["dead links, missing names:", *wrong]))
