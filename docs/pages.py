"""Pages of the site that are made of other files: README, benchmarks, the gallery of examples.

Links in them, and in the pages of `docs/`, are those of a clone of the repository: a file there is
its page here, or its source at the repository's address.
"""

import ast
import json
import os
import re
import shutil
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MADE = DOCS / "_made"
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]

# Guides in their order, as far as they are there: a new one is a file in docs/ and a word here.
GUIDES = """
    first_hour choosing coming_from from_backpack frameworks processes compiled_steps privacy
    custom_ops how_it_works
""".split()
# Sections of the gallery: what no section names stands in the last one.
SECTIONS = {
    "Training": (
        "mnist torchrun_mnist stats growing_batch private_mnist private_finetuning private_trainer"
    ),
    "Quantities": (
        "batched_jacobians physics_informed variance_gradient tangent_kernel custom_module"
    ),
    "What others build on them": "laplace_backend elastic_weights noise_scale influence",
}
HELPERS = {"compare"}
EXAMPLES = sorted(p.stem for p in (ROOT / "examples").glob("*.py") if p.stem not in HELPERS)

# Where a file of the repository is a page here: its name without the suffix.
PAGES = {
    "README.md": "index",
    "CONTRIBUTING.md": "_made/contributing",
    "CHANGELOG.md": "_made/changelog",
    "benchmarks": "_made/benchmarks/index",
    "benchmarks/README.md": "_made/benchmarks/index",
    "examples": "_made/gallery/index",
    "examples/README.md": "_made/gallery/index",
    **{f"examples/{name}.py": f"_made/gallery/{name}" for name in EXAMPLES},
    **{f"docs/{p.relative_to(DOCS).as_posix()}": p.relative_to(DOCS).with_suffix("").as_posix()
       for p in DOCS.rglob("*.md") if MADE not in p.parents and p != DOCS / "index.md"},
    **{f"benchmarks/results/{p.name}": f"_made/benchmarks/{p.stem}"
       for p in (ROOT / "benchmarks/results").glob("*.md")},
}  # fmt: skip
ORIGINS = {page: path for path, page in PAGES.items() if (ROOT / path).is_file()}
ORIGINS.pop("_made/gallery/index", None)  # which is made of more

LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?!https?:|mailto:|#)([^)\s]+)\)")
FENCE = re.compile(r"(^ *```.*?^ *```)", re.DOTALL | re.MULTILINE)


def mend(app, docname, source):
    """Lead the links of a page, as they are in the repository, to where things are on the site."""
    origin = ORIGINS.get(docname)
    if origin and not origin.startswith("examples/"):
        parts = FENCE.split(source[0])
        parts[::2] = [LINK.sub(lambda m: _link(m, origin, docname), part) for part in parts[::2]]
        source[0] = "".join(parts)


def _link(match, origin, docname):
    label, target = match.groups()
    path, _, anchor = target.partition("#")
    path = os.path.normpath(Path(origin).parent / path)
    anchor = anchor and f"#{anchor}"
    here = Path("/" + docname).parent
    if label.startswith("!"):
        return f"{label}({os.path.relpath(ROOT / path, (DOCS / docname).parent)})"
    if path in PAGES:
        return f"{label}({os.path.relpath('/' + PAGES[path], here)}.md{anchor})"
    if not (ROOT / path).exists():
        return match[0]  # which the build reports
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{label}({REPOSITORY}/{kind}/main/{path}{anchor})"


def generate():
    """Write all pages that are made of other files."""
    shutil.rmtree(MADE, ignore_errors=True)
    for page, path in ORIGINS.items():
        if page.startswith("_made/") and not path.startswith("examples/"):
            _write(page, (ROOT / path).read_text() + _more(page))
    for name in EXAMPLES:
        _write(f"_made/gallery/{name}", example(name))
    _write("_made/gallery/index", gallery())
    _write("index", (ROOT / "README.md").read_text() + _contents())


def _write(page, text):
    path = DOCS / f"{page}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _toctree(entries, caption=None, hidden=True):
    lines = ["", "", ":::{toctree}", *[":hidden:"] * hidden, ":maxdepth: 2"]
    lines += [f":caption: {caption}"] * bool(caption)
    return "\n".join([*lines, "", *entries, ":::", ""])


def _contents():
    guides = [name for name in GUIDES if (DOCS / f"{name}.md").exists()]
    found = {p.stem for p in DOCS.glob("*.md")} - {"index"}
    guides += sorted(found - set(guides))  # a guide that nobody named is shown all the same
    return (
        _toctree(guides, "Guides")
        + _toctree(["_made/gallery/index", "api/index", "_made/benchmarks/index"], "Reference")
        + _toctree(["_made/contributing", "_made/changelog"], "Project")
    )


def _more(page):
    """What the site adds to a page of the benchmarks: its pictures, and the way to the others."""
    results = ROOT / "benchmarks/results"
    if page == "_made/benchmarks/index":
        return _toctree(sorted(p.stem for p in results.glob("*.md")))
    if page == "_made/benchmarks/optimizers":
        names = [p.name for p in sorted(results.glob("*.png"))]
        return "\n## Pictures\n\n" + "\n\n".join(f"![{name[:-4]}]({name})" for name in names) + "\n"
    return ""


# -- the gallery ----------------------------------------------------------------------------------


def known():
    """What running the examples left: command, seconds, picture of each."""
    path = DOCS / "gallery" / "runs.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _heading(name):
    source = (ROOT / "examples" / f"{name}.py").read_text()
    text = ast.get_docstring(ast.parse(source))
    first, _, rest = text.partition("\n")
    return source, first.rstrip("."), _plain(rest.strip("\n"))


def _plain(text):
    """A docstring as Markdown: its indented commands in fences."""
    parts = re.split(r"\n\n", text)
    fenced = []
    for part in parts:
        lines = part.split("\n")
        code = all(line.startswith("    ") for line in lines)
        fenced.append("```console\n" + "\n".join(x[4:] for x in lines) + "\n```" if code else part)
    return "\n\n".join(fenced)


def example(name):
    """The page of one example: what it shows, its picture, what it prints, its source."""
    source, title, text = _heading(name)
    run = known().get(name, {})
    parts = [f"# {title}", text]
    if "seconds" in run:
        parts.append(f"With its defaults it takes {run['seconds']:.0f} seconds of one CPU core.")
    if (DOCS / "gallery" / f"{name}.png").exists():
        parts.append(f"![{title}](../../gallery/{name}.png)")
    printed = DOCS / "gallery" / f"{name}.txt"
    if printed.exists():
        parts.append(f"It prints:\n\n```text\n{printed.read_text().rstrip()}\n```")
    code = source.split('"""', 2)[2].lstrip()
    parts.append(f"## Source\n\n[examples/{name}.py]({REPOSITORY}/blob/main/examples/{name}.py)")
    return "\n\n".join(parts) + f"\n\n```python\n{code}```\n"


def gallery():
    """All examples, with their pictures."""
    sections = {title: names.split() for title, names in SECTIONS.items()}
    named = {name for names in sections.values() for name in names}
    sections[[*sections][-1]] += [name for name in EXAMPLES if name not in named]
    text = "# Gallery\n\nComplete programs, each run by the tests. `--help` lists their options.\n"
    for title, names in sections.items():
        cards = [card(name) for name in names if name in EXAMPLES]
        if cards:
            text += f"\n## {title}\n\n::::{{grid}} 1 2 2 3\n:gutter: 3\n\n{''.join(cards)}::::\n"
    return text + _toctree(EXAMPLES)


def listing():
    """The examples as a table, for `examples/README.md`."""
    lines = [
        "# Examples",
        "",
        "Complete programs; `--help` lists the options of each. Times are seconds of one CPU core,",
        "with the defaults. `pip install -c constraints.txt -e '.[examples]'` brings what they",
        "need, but for `laplace_backend.py`, which says in its first lines what it wants. The list",
        "is written by `python docs/make.py --examples`, and so is the gallery of the site.",
        "",
        "| program | shows | seconds |",
        "| :-- | :-- | --: |",
    ]
    for name in EXAMPLES:
        seconds = known().get(name, {}).get("seconds")
        shown = "" if seconds is None else f"{seconds:.0f}"
        lines.append(f"| [{name}.py]({name}.py) | {_heading(name)[1]} | {shown} |")
    return "\n".join(lines) + "\n"


def card(name):
    """An example in the gallery."""
    _, title, _ = _heading(name)
    picture = DOCS / "gallery" / f"{name}.png"
    seconds = known().get(name, {}).get("seconds")
    foot = f"{seconds:.0f} s" if seconds is not None else ""
    lines = [f":::{{grid-item-card}} {title}", f":link: {name}", ":link-type: doc"]
    if picture.exists():
        lines.append(f":img-top: ../../gallery/{name}.png")
    return "\n".join([*lines, "", f"`{name}.py` {foot}", ":::", "", ""])
