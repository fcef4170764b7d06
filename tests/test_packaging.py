"""What a stranger's machine relies on: the requirements, the conda file, the wheel, and the commands that are named."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import rattler
import rattler.exceptions
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]


def requirement_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def test_the_conda_environment_has_the_same_packages_and_parses_strictly():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": requirement_lines((REPOSITORY / "requirements.txt").read_text())}
    names = [str(rattler.MatchSpec(spec, strict=True).name.normalized) for spec in conda]
    assert names == ["python", "pip"]
    with pytest.raises(rattler.exceptions.InvalidMatchSpecError):
        rattler.MatchSpec("python >=3.10,,<3", strict=True)


def test_requirements_cover_what_the_package_declares():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    listed = {line.split(" --")[0] for line in requirement_lines((REPOSITORY / "requirements.txt").read_text())}
    declared = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    assert set(declared) == listed


def test_the_wheel_carries_the_configuration_and_no_tests(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    # A copy: building leaves files beside the sources.
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(copy)], check=True)
    subprocess.run([*build, str(tmp_path), str(copy)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files"], cwd=copy, check=True, capture_output=True, text=True).stdout.split()
    for file in tracked:
        if file.startswith("conf/"):
            assert f"lightning_ntk/{file}" in names
        if file.startswith(("lightning_ntk/", "datamodules/", "callbacks/")):
            assert file in names, f"{file} does not travel: its folder is missing under packages in pyproject.toml"
    assert not any(name.startswith(("tests/", "conf/")) for name in names)


def test_the_commands_that_the_readme_names_exist_and_ci_runs_the_tests():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"`make ([a-z]+)`", (REPOSITORY / "README.md").read_text()))
    assert {"demo", "test"} <= named <= targets
    assert "exec make test" in (REPOSITORY / ".ci" / "run").read_text()
