"""A wheel of the packages has every file that their code opens."""

import shutil
import subprocess
import sys
import tomllib
import zipfile

from processes import ROOT


def test_a_wheel_has_the_code_of_all_packages_and_what_lies_beside_it(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    for package in packages:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)
    ours = {
        path.relative_to(tmp_path).as_posix()
        for package in packages
        for path in (tmp_path / package).rglob("*")
        if path.is_file()
    }
    build = "from setuptools.build_meta import build_wheel; build_wheel('wheel')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info/" not in name}
    assert packed == ours
    opened = {"evaluation/pages/report.html", "assets/model_card.md", "assets/checkpoint/ema.safetensors"}
    assert opened <= packed
