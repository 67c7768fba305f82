"""Build the documentation site, check its links, serve it.

    python docs/make.py              # into docs/_build, warnings are errors
    python docs/make.py --serve      # and serve it on http://localhost:8000
    python docs/make.py --examples   # first run every example, for its picture, output and time

Needs `pip install -c constraints.txt -e '.[docs]'`; the examples need `'.[dev]'` too.
"""

import argparse
import http.server
import json
import os
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

DOCS = Path(__file__).parent
OUT = DOCS / "_build"


def run_examples(names):
    """Run examples with their defaults, and keep what they print and draw, and how long it took."""
    import pages

    runs = pages.known()
    for name in names or pages.EXAMPLES:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name} ...", flush=True)
            start = resource.getrusage(resource.RUSAGE_CHILDREN)
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(DOCS.parent)}
            done = subprocess.run(
                [sys.executable, str(DOCS.parent / "examples" / f"{name}.py")],
                cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            end = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the CPU, whatever else it does
            seconds = end.ru_utime - start.ru_utime + end.ru_stime - start.ru_stime
            runs[name] = {"seconds": round(seconds, 1)}
            lines = [
                x for x in done.stdout.splitlines() if not x.startswith(("curves: ", "picture: "))
            ]
            (DOCS / "gallery" / f"{name}.txt").write_text("\n".join(lines) + "\n")
            pictures = sorted(Path(folder, "runs").glob("*.png"))
            for picture in pictures[:1]:
                (DOCS / "gallery" / f"{name}.png").write_bytes(picture.read_bytes())
        text = json.dumps(runs, indent=1, sort_keys=True) + "\n"
        (DOCS / "gallery" / "runs.json").write_text(text)
        (DOCS.parent / "examples" / "README.md").write_text(pages.listing())


def main():
    """Do what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--serve", action="store_true", help="serve the site when it is built")
    parser.add_argument("--port", type=int, default=8000, help="to serve on (default: 8000)")
    parser.add_argument(
        "--examples", nargs="*", metavar="NAME", help="run these examples first, by default all"
    )
    args = parser.parse_args()
    sys.path.insert(0, str(DOCS))
    if args.examples is not None:
        (DOCS / "gallery").mkdir(exist_ok=True)
        run_examples(args.examples)

    from sphinx.cmd.build import build_main

    failed = build_main(["-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(OUT)])
    if failed:
        raise SystemExit(failed)
    import links

    links.check(OUT)
    print(f"built: {OUT / 'index.html'}")
    if args.serve:
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=OUT)
        print(f"serving http://localhost:{args.port} (stop with Ctrl-C)")
        http.server.ThreadingHTTPServer(("localhost", args.port), handler).serve_forever()


if __name__ == "__main__":
    main()
