"""What a stranger's machine relies on: the requirements, the conda file, the wheel, and the commands that are named."""

import ast
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import rattler
import rattler.exceptions
from omegaconf import OmegaConf

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = ("lightning_ntk", "datamodules", "callbacks")
# Where a package is imported under another name than it is installed by.
INSTALLED_AS = {
    "PIL": "pillow",
    "art": "adversarial-robustness-toolbox",
    "hydra": "hydra-core",
    "pytorch_lightning": "pytorch-lightning",
    "neural_tangents": "neural-tangents",
    "wandb_workspaces": "wandb-workspaces",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
PEERS = REPOSITORY / "requirements-peers.txt"


def requirement_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def project_table() -> dict:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_the_conda_environment_has_the_same_packages_and_parses_strictly():
    environment = OmegaConf.to_container(OmegaConf.load(REPOSITORY / "environment.yml"))
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": requirement_lines((REPOSITORY / "requirements.txt").read_text())}
    names = [str(rattler.MatchSpec(spec, strict=True).name.normalized) for spec in conda]
    assert names == ["python", "pip"]
    with pytest.raises(rattler.exceptions.InvalidMatchSpecError):
        rattler.MatchSpec("python >=3.10,,<3", strict=True)


@pytest.mark.parametrize("script", sorted(REPOSITORY.glob("docs/**/*.py")), ids=lambda path: path.name)
def test_a_script_of_the_documents_imports_what_there_is(script):
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), {})


def test_requirements_cover_what_the_package_declares():
    project = project_table()
    listed = {line.split(" --")[0] for line in requirement_lines((REPOSITORY / "requirements.txt").read_text())}
    declared = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    assert set(declared) == listed


def test_what_is_imported_is_declared_and_the_other_way_round():
    imported = set()
    for file in (file for folder in SOURCES for file in (REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    needed = {INSTALLED_AS.get(name, name) for name in imported - set(sys.stdlib_module_names) - set(SOURCES)}
    declared = {re.split(r"[<>=]", requirement)[0] for requirement in project_table()["dependencies"]}
    # Most are extras; jax and neural-tangents are imported by one script, with the Python of `make peers`.
    extras = {"learn2learn", "wandb-workspaces", "adversarial-robustness-toolbox", "ray", "submitit", "optuna"}
    assert needed == declared | extras | {"jax", "neural-tangents"}
    assert {"jax==0.4.23", "neural-tangents==0.6.5"} <= set(requirement_lines(PEERS.read_text()))


@pytest.fixture
def copy(tmp_path):
    """A copy of the checkout as it lies there: building leaves files beside the sources."""
    folder = tmp_path / "copy"
    files = ("pyproject.toml", "README.md", "LICENSE", "Makefile", "requirements.txt")
    folder.mkdir()
    for name in files:
        shutil.copy(REPOSITORY / name, folder / name)
    for name in (*SOURCES, "conf", "tests"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_wheel_carries_the_configuration_and_no_tests(copy, tmp_path):
    # Listed before the build, which leaves files there.
    expected = {
        ("lightning_ntk/" if folder == "conf" else "") + str(file.relative_to(copy))
        for folder in (*SOURCES, "conf")
        for file in (copy / folder).rglob("*")
        if file.is_file()
    }
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(tmp_path), str(copy)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected, "a folder is missing under packages in pyproject.toml, or too much travels"

    # It works away from the checkout: its own conf/, and no other.
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    command = [sys.executable, "-m", "lightning_ntk.cli", "train", "--cfg", "experiment=demo", "method=anil"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert "_target_: lightning_ntk.methods.anil" in run.stdout


def make(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """Run make as from a shell of its own: not as a part of the `make test` that may have started us."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "DEMO")}
    return subprocess.run(
        ["make", *words], cwd=folder, env={**environment, **variables}, capture_output=True, text=True, check=False
    )


def script(file: Path, text: str) -> Path:
    file.write_text("#!/bin/sh\n" + text)
    file.chmod(0o755)
    return file


# A Python that installs nothing: it makes the folder that `-m venv` would, and notes each call.
FAKE_PYTHON = """
case "$*" in
  *"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
  *requirements.txt*) if [ -e broken ]; then exit 1; fi;;
esac
echo "$@" >> calls
"""


def test_an_install_is_done_once_and_a_half_finished_one_is_done_again(copy):
    python = script(copy / "fake_python", FAKE_PYTHON)
    calls = copy / "calls"

    def installs() -> bool:
        calls.unlink(missing_ok=True)
        make(copy, "install", f"PYTHON={python}")
        return calls.exists()

    (copy / "broken").touch()
    assert make(copy, "install", f"PYTHON={python}").returncode != 0
    assert installs(), "a half-finished install was taken as done"
    (copy / "broken").unlink()
    assert installs()
    assert "--editable" in calls.read_text()
    assert not installs(), "a second install did something"
    for name in ("requirements.txt", "pyproject.toml"):
        later = (copy / ".venv" / "installed").stat().st_mtime + 10
        os.utime(copy / name, (later, later))
        assert installs(), f"{name} changed, and nothing was installed"
        os.utime(copy / name, (0, 0))


def test_the_peers_have_an_environment_of_their_own_and_one_python_that_fits(copy):
    shutil.copy(PEERS, copy / PEERS.name)
    old = script(copy / "fake_python", FAKE_PYTHON.replace(".venv/bin", ".venv-peers/bin"))
    assert make(copy, "peers", f"PEERS_PYTHON={old}").returncode == 0
    assert "requirements-peers.txt" in (copy / "calls").read_text()
    assert (copy / ".venv-peers" / "installed").exists()
    assert not (copy / ".venv").exists()
    calls = (copy / "calls").read_text()
    assert make(copy, "peers", f"PEERS_PYTHON={old}").returncode == 0
    assert (copy / "calls").read_text() == calls, "a second `make peers` did something"
    make(copy, "clean")
    assert not (copy / ".venv-peers").exists()
    too_new = script(copy / "new_python", OLD_PYTHON.replace("3, 9, 18", "3, 12, 1"))
    run = make(copy, "peers", f"PEERS_PYTHON={too_new}")
    assert run.returncode != 0
    assert "make peers PEERS_PYTHON=python3.10" in run.stderr
    assert not (copy / ".venv-peers").exists()


# Evaluates what it is asked, as Python 3.9 would.
OLD_PYTHON = f"""
case "$1" in
  -c) exec {sys.executable} -c "import sys; sys.version_info = (3, 9, 18); $2";;
  --version) echo Python 3.9.18;;
esac
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OLD_PYTHON, r"Python 3\.10 to 3\.12 is needed, but .* is Python 3\.9\.18"),
        ('case "$*" in *ensurepip*) exit 1;; esac', "lacks its venv module"),
        (None, "there is no .*fake_python"),
    ],
)
def test_an_unfit_python_is_named(copy, text, message):
    if text is not None:
        script(copy / "fake_python", text)
    run = make(copy, "install", f"PYTHON={copy / 'fake_python'}")
    assert run.returncode != 0
    assert re.search(message, run.stderr)
    assert not (copy / ".venv").exists()


def test_the_demo_compares_the_folder_that_it_trained_in(copy):
    # Two looks at this clock never show the same time.
    (copy / "bin").mkdir()
    script(copy / "bin" / "date", f"echo x >> {copy}/ticks; wc -l < {copy}/ticks | tr -d ' '")
    path = f"{copy / 'bin'}{os.pathsep}{os.environ['PATH']}"
    run = make(copy, "-n", "demo", PATH=path)
    folders = set(re.findall(r"runs/demo-\d+", run.stdout))
    assert run.stdout.count("runs/demo-") == 2
    assert len(folders) == 1
    assert "compare mine baseline=maml" in make(copy, "-n", "demo", "DEMO=mine").stdout


def test_the_commands_that_the_readme_names_exist_and_ci_runs_the_tests():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)`", (REPOSITORY / "README.md").read_text()))
    assert {"demo", "test"} <= named <= targets
    assert set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()) == targets
    assert "exec make test" in (REPOSITORY / ".ci" / "run").read_text()
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)


def test_a_deprecation_is_an_error_in_our_code_and_not_in_that_of_others():
    with pytest.raises(DeprecationWarning, match="ours"):
        warnings.warn_explicit("ours", DeprecationWarning, "file.py", 1, module="lightning_ntk.compare")
    with pytest.raises(DeprecationWarning, match="here"):
        warnings.warn("here", DeprecationWarning, stacklevel=1)
    warnings.warn_explicit("theirs", DeprecationWarning, "file.py", 1, module="gym.spaces")
