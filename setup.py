"""Packages of the distribution; everything else stands in pyproject.toml.

``kernels/`` lies beside the package and is imported as ``pytransformer.kernels`` (in a checkout through the committed link of that name).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
version = re.search(r'^__version__ = "([^"]+)"', (ROOT / "pytransformer/_version.py").read_text(), re.MULTILINE)
if version is None:
    raise RuntimeError("pytransformer/_version.py has no __version__")

setup(
    version=version.group(1),
    packages=[*find_packages(include=["pytransformer", "pytransformer.*"]), "pytransformer.kernels"],
    package_dir={"pytransformer.kernels": "kernels"},
    package_data={"pytransformer": ["py.typed"]},
)
