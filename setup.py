"""Reads the live package metadata from settings.ini."""
from configparser import ConfigParser

from setuptools import setup

cfg = ConfigParser(interpolation=None)
cfg.read("settings.ini", encoding="utf-8")
ini = cfg["DEFAULT"]


def lines(key: str) -> list[str]:
    return [o.strip() for o in ini.get(key, "").splitlines() if o.strip()]


extras = {k.removesuffix("_requirements"): lines(k) for k in ini if k.endswith("_requirements")}
setup(
    name=ini["lib_name"],
    version=ini["version"],
    description=ini["description"],
    author=ini["author"],
    license=ini["license"],
    keywords=ini["keywords"].split(),
    packages=[ini["lib_name"]],
    package_data={ini["lib_name"]: ["py.typed", "tiny_llm/*", "universal/*"]},
    python_requires=f">={ini['min_python']}",
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": ["pars_nb=pars_nb._modidx:d"],
    },
)
