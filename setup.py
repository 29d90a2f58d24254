"""Build script: everything that describes the package stands in `settings.ini`."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    classifiers=["Intended Audience :: " + cfg["audience"], "Programming Language :: Python :: 3"],
    packages=find_packages(include=["seqtransfer", "seqtransfer.*"]),
    package_data={"seqtransfer": ["experiments/*.ipynb", "static/*.js"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={
        "console_scripts": cfg["console_scripts"].split("\n"),
        "nbdev": ["seqtransfer=seqtransfer._modidx:d"],
    },
    zip_safe=False,
)
