"""What a wheel holds, which an installation that is not editable has in place of the repository."""

import shutil
import subprocess
import sys
import zipfile

from commands import REPOSITORY

PACKAGES = ("ds_roberta", "preprocessing", "ds_configs")


def test_a_wheel_has_every_module_and_the_recipes_configurations(tmp_path):
    source = tmp_path / "source"
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, source)
    files = {str(path.relative_to(source)) for name in PACKAGES for path in (source / name).rglob("*.*")}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == files
