"""What is installed works by itself: run in an empty environment, with the README's address."""

import re
import sys
import warnings
from importlib.metadata import metadata, version
from pathlib import Path

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's own, where there is none
import curvopt  # noqa: E402

readme = Path(sys.argv[1]).read_text()
home = Path(curvopt.__file__).parent
assert sys.prefix in str(home), f"not the installed package: {home}"
assert version("curvopt-for-pytorch") == curvopt.__version__
assert (home / "py.typed").exists()
missing = [name for name in curvopt.__all__ if not hasattr(curvopt, name)]
assert not missing, missing
more = {"matplotlib", "sklearn", "scipy", "dp_accounting", "tqdm"} & set(sys.modules)
assert not more, f"imported without need: {more}"
description = metadata("curvopt-for-pytorch")["Description"]
relative = re.findall(r"\]\((?!https?:|#)[^)]*\)", description)
assert description, "no long description"
assert not relative, f"links that lead nowhere on PyPI: {relative}"

program = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
names = {}
exec(program, names)
assert names["right"] > 0.97, names["right"]
print(f"{home}: the README's program ends at {names['right']:.1%}")
