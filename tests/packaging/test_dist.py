"""The wheels: what is in them, and that the client's installs from a folder without an index and without torch."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORTS = {"proto": "luthier", "server": "luthier_server", "client": "luthier_client", "trainer": "luthier_trainer"}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def pip(*arguments: str | Path) -> None:
    done = subprocess.run([*PIP, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four wheels and what the client needs beside them, as `make dist` fills it."""
    folder = tmp_path_factory.mktemp("dist")
    pip("wheel", "--no-deps", "--wheel-dir", folder, *[f"./{each}" for each in IMPORTS])
    client = next(folder.glob("luthier_client-*.whl"))
    pip("download", "-c", "constraints.txt", "--find-links", folder, "--dest", folder, client)
    return folder


def contents(wheelhouse: Path, distribution: str) -> set[str]:
    (wheel,) = wheelhouse.glob(f"luthier_{distribution}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def tracked(folder: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout, so nothing says which files belong to it")
    return set(listed.stdout.splitlines())


def test_the_client_installs_without_an_index_and_brings_neither_torch_nor_numpy(
    wheelhouse: Path, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    programs = tmp_path / "venv" / "bin"
    nothing = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    install = ["install", "--no-index", "--find-links", str(wheelhouse), "luthier-client"]
    subprocess.run(
        [*PIP, "--isolated", "--python", str(programs / "python"), *install], check=True, env=nothing, cwd=tmp_path
    )
    run = {"check": True, "cwd": tmp_path, "capture_output": True, "text": True}
    shown = subprocess.run([programs / "luthier", "--help"], **run)  # type: ignore[call-overload]
    assert "Fine-tune language models" in shown.stdout
    program = (
        "import importlib.util as u, luthier_client; luthier_client.Client; luthier_client.load_spec\n"
        "found = [m for m in ('torch', 'numpy', 'luthier_server', 'luthier_trainer') if u.find_spec(m)]\n"
        "assert not found, found"
    )
    subprocess.run([programs / "python", "-c", program], **run)  # type: ignore[call-overload]


@pytest.mark.parametrize("distribution", IMPORTS)
def test_a_wheel_holds_every_tracked_file_of_its_package(wheelhouse: Path, distribution: str) -> None:
    root = "" if distribution == "proto" else f"{IMPORTS[distribution]}/"
    files = {name.removeprefix(f"{distribution}/") for name in tracked(f"{distribution}/{root}")}
    if distribution == "proto":
        files = {name.removeprefix("gen/") for name in files if name.startswith(("gen/", "luthier/"))}
        files = {name for name in files if not name.endswith(".proto")}
    assert files - contents(wheelhouse, distribution) == set()


@pytest.mark.parametrize(
    ("distribution", "name"),
    [
        ("trainer", "luthier_trainer/builtin/tiny/model.safetensors"),
        ("trainer", "luthier_trainer/builtin/tiny/chat_template.jinja"),
        ("server", "luthier_server/store/migrations/0001_initial.sql"),
        ("proto", "luthier/v1/fine_tuning_pb2_grpc.pyi"),
        ("proto", "luthier/v1/py.typed"),
        ("proto", "luthier/trainer/py.typed"),
        ("client", "luthier_client/py.typed"),
        ("server", "luthier_server/py.typed"),
        ("trainer", "luthier_trainer/py.typed"),
    ],
)
def test_a_wheel_holds_what_is_no_python(wheelhouse: Path, distribution: str, name: str) -> None:
    assert name in contents(wheelhouse, distribution)


def test_no_wheel_claims_the_package_that_the_others_share(wheelhouse: Path) -> None:
    for distribution in IMPORTS:
        assert "luthier/__init__.py" not in contents(wheelhouse, distribution)
        strays = {name.split("/")[0] for name in contents(wheelhouse, distribution) if ".dist-info" not in name}
        assert strays <= {IMPORTS[distribution], "buf"}
