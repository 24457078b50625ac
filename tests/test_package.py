"""The wheel works without the repository: it contains every package, its data and its configs."""

import os
import subprocess
import sys
import zipfile

import pytest
from helpers.paths import ROOT


def command(*args, cwd, path):
    """Run a command in `cwd` with the wheel's folder as its only addition to Python's path."""
    env = {**os.environ, "PYTHONPATH": str(path), "PYTHONSAFEPATH": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def pip(*args):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *args],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the files that git does not ignore."""
    folder = tmp_path_factory.mktemp("wheel")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, found.stdout.split("\0")):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "src" / name).write_bytes((ROOT / name).read_bytes())
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(folder / "src"))
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    return folder


@pytest.mark.slow
def test_wheel_contains_every_module_and_asset(wheel):
    with zipfile.ZipFile(wheel) as archive:
        contained = set(archive.namelist())
    expected = {
        str(path.relative_to(ROOT))
        for top in ("minigpt4_jax", "convert", "configs")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected - contained == set()
    assert not [name for name in contained if name.startswith(("tests/", "benchmarks/"))]
    assert any(name.endswith("LICENSE") for name in contained)


@pytest.mark.slow
def test_training_finds_its_config_in_the_wheel(installed, tmp_path):
    done = command(
        "-m", "minigpt4_jax.train", "--config=stage2", f"--workdir={tmp_path / 'run'}",
        "--config.model=absent", "--config.data.path=absent", cwd=tmp_path, path=installed,
    )  # fmt: skip
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") and "absent" in lines[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_commands_of_the_wheel_have_a_help(installed, tmp_path):
    for module in ("convert", "minigpt4_jax.train", "minigpt4_jax.chat"):
        done = command("-m", module, "--help", cwd=tmp_path, path=installed)
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout.lower()


@pytest.mark.slow
def test_library_is_imported_from_the_wheel(installed, tmp_path):
    code = "import minigpt4_jax, configs, convert; print(minigpt4_jax.__file__); minigpt4_jax.load"
    done = command("-c", code, cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))


@pytest.mark.smoke
def test_importing_the_package_does_not_import_jax():
    code = "import sys, minigpt4_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
