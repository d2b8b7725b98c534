"""The oldest versions that setup.cfg allows are those that the tests ran with."""

from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def bounds():
    """Every requirement of the package and its extras that has a lower bound, pinned to it."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    requirements = [Requirement(line) for lines in lists for line in lines.split()]
    return {f"{r.name}=={s.version}" for r in requirements for s in r.specifier if s.operator in (">=", "==")}


def test_the_bounds_are_the_versions_that_were_tested():
    lines = (ROOT / "tests" / "oldest-versions.txt").read_text(encoding="utf-8").splitlines()
    tested = {line for line in lines if "==" in line}
    assert bounds() == tested


def test_what_the_package_needs_has_a_bound():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    for line in config["options"]["install_requires"].split():
        assert Requirement(line).specifier, f"{line} has no lower bound"
