"""pyproject.toml, constraints.txt and environment.yml describe one environment."""

import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from chassis_utils.files import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]
DIRECT = [Requirement(line) for line in PROJECT["dependencies"] + OPTIONAL["dev"] + OPTIONAL["site"]]


def pins(lines: list[str]) -> dict[str, str]:
    """Name -> version of the lines that pin one."""
    split = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in split}


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text().splitlines())
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_direct_dependency_is_pinned_inside_its_range(requirement: Requirement) -> None:
    assert CONSTRAINTS[canonicalize_name(requirement.name)] in requirement.specifier


def test_conda_environment_pins_the_direct_dependencies_the_same() -> None:
    names = [canonicalize_name(requirement.name) for requirement in DIRECT]
    assert pins(CONDA[-1]["pip"]) == {name: CONSTRAINTS[name] for name in names}


def test_conda_environment_has_a_python_that_the_package_accepts() -> None:
    assert CONDA[0] == "python=" + PROJECT["requires-python"].removeprefix(">=")
