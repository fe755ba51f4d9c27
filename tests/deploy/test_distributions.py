"""Two distributions, one package: each is whole without the other's files, in any order, and stays so when one goes."""

import re
import shutil
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.cli import fake_service
from tests.deploy.distributions import CLIENT, ROOT, SERVER, Environment, Wheel, declared, here, in_both, link, needed
from weft import __version__
from weft_training import shipped

ASK = """
import sys
from importlib.metadata import version
from pathlib import Path
from weft.client import Client, RpcFailure
import weft.client
with Client(sys.argv[1]) as client:
    print(client.generate("warp").text)
    try:
        client.adapter("nobody")
    except RpcFailure as failure:
        print(failure.failure.reason)
print(version("weft-serve-client"), Path(weft.client.__file__).parent, "torch" in sys.modules)
"""
LIES = "from weft_training import shipped; print(shipped.ROOT, *shipped.recipes())"


@pytest.fixture(scope="session")
def of_the_client(wheels: dict[str, Wheel], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Make a directory from which only the client's declared requirements can be imported."""
    return [link(list(needed(declared(wheels[CLIENT]))), tmp_path_factory.mktemp("client") / "packages")]


def require_a_working_client(environment: Environment, places: list[Path]) -> None:
    with fake_service.running() as (_, address):
        said = environment.python(ASK, address, places=places).splitlines()
    where = environment.site / "weft" / "client"
    assert said == ["WARP", "ADAPTER_NOT_FOUND", f"{__version__} {where} False"]
    assert environment.damage(CLIENT) == []


@pytest.mark.slow
@pytest.mark.parametrize("order", [(SERVER, CLIENT), (CLIENT, SERVER)], ids=["server-first", "client-first"])
def test_both_orders_and_either_goes(
    order: tuple[str, str], wheels: dict[str, Wheel], of_the_client: list[Path], tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "environment")
    for name in order:
        environment.install(wheels[name])
    require_a_working_client(environment, of_the_client)
    assert environment.command("--version", places=here()) == f"weft {__version__}\n"
    if order[0] == SERVER:
        environment.uninstall(CLIENT)
        assert environment.damage(SERVER) == []
        assert not (environment.site / "weft" / "client").exists()
        assert environment.python("import weft; print(weft.__version__)", places=[]) == f"{__version__}\n"
        environment.install(wheels[CLIENT])
        assert environment.command("--version", places=here()) == f"weft {__version__}\n"
    environment.uninstall(SERVER)
    assert {path.name for path in (environment.site / "weft").iterdir()} - {"__pycache__"} == {"client", "v1"}
    assert not (environment.site / "weft_training").exists()
    require_a_working_client(environment, of_the_client)


def test_a_damaged_distribution_is_seen(wheels: dict[str, Wheel], tmp_path: Path) -> None:
    """Negative control."""
    environment = Environment(tmp_path / "environment")
    environment.install(wheels[CLIENT])
    (environment.site / "weft/client/wire.py").unlink()
    (environment.site / "weft/v1/endpoint.py").write_text("PORT = 1\n")
    assert environment.damage(CLIENT) == ["weft/client/wire.py", "weft/v1/endpoint.py"]


def test_no_file_belongs_to_both(wheels: dict[str, Wheel]) -> None:
    assert in_both(wheels[SERVER], wheels[CLIENT]) == set()


def test_a_file_of_both_is_seen(wheels: dict[str, Wheel], tmp_path: Path) -> None:
    """Negative control."""
    planted = Wheel(tmp_path / "planted.whl", "")
    shutil.copy(wheels[CLIENT].path, planted.path)
    with zipfile.ZipFile(planted.path, "a") as archive:
        archive.writestr("weft/__init__.py", "")
    assert in_both(wheels[SERVER], planted) == {"weft/__init__.py"}


def test_the_client_is_light_and_has_the_contract(wheels: dict[str, Wheel]) -> None:
    names = {name for name in wheels[CLIENT].names() if ".dist-info/" not in name}
    assert {Path(name).parent.as_posix() for name in names} == {"weft/client", "weft/v1"}
    protos = {path.name for path in (ROOT / "protos/weft/v1").glob("*.proto")}
    assert {Path(name).name for name in names if name.endswith(".proto")} == protos
    assert {"weft/client/py.typed", "weft/v1/py.typed"} <= names
    packages = {re.match(r"[\w.-]+", requirement)[0] for requirement in declared(wheels[CLIENT])}  # type: ignore[index]
    assert packages == {"grpcio", "protobuf", "googleapis-common-protos"}


def test_the_server_needs_the_client_of_its_version_which_is_stated_once(wheels: dict[str, Wheel]) -> None:
    assert f"{CLIENT}=={__version__}" in declared(wheels[SERVER])
    assert {wheel.path.name.split("-")[1] for wheel in wheels.values()} == {__version__}
    stated = [tomllib.loads((ROOT / path).read_text()) for path in ("pyproject.toml", "protos/pyproject.toml")]
    assert all("version" in one["project"]["dynamic"] for one in stated)
    assert not any(CLIENT in requirement for requirement in stated[0]["tool"]["hatch"]["metadata"]["hooks"]["custom"])


def test_the_tree_has_what_is_shipped() -> None:
    """As an editable install finds it."""
    assert ROOT.resolve() == shipped.ROOT
    assert (shipped.BASE / "config.json").is_file()
    assert len(list(shipped.ADAPTERS.iterdir())) == 12
    assert len(list(shipped.STYLES.iterdir())) == 2
    assert {"lora", "qlora", "mixture"} <= set(shipped.recipes())


@pytest.mark.slow
def test_an_installed_wheel_trains_by_the_name_of_a_recipe(wheels: dict[str, Wheel], tmp_path: Path) -> None:
    """In an empty directory: recipe and base come from the wheel."""
    environment = Environment(tmp_path / "environment")
    for wheel in wheels.values():
        environment.install(wheel)
    empty = tmp_path / "empty"
    empty.mkdir()
    root, *recipes = environment.python(LIES, places=here(), cwd=empty).split()
    assert Path(root) == environment.site / "weft_training" / "files"
    assert recipes == list(shipped.recipes())
    for path in (shipped.BASE, shipped.ADAPTERS, shipped.STYLES):
        carried = Path(root, path.relative_to(shipped.ROOT))
        names = [sorted(file.relative_to(of) for file in of.rglob("*") if file.is_file()) for of in (path, carried)]
        assert names[0] == names[1] != []
    (empty / "rows.jsonl").write_text('{"prompt": "abc = ", "completion": "cba"}\n{"text": "a fox."}\n')
    line = ("train", "lora", "--data", "rows.jsonl", "--output", "out", "--dry-run")
    assert "parameters of the adapter" in environment.command(*line, places=here(), cwd=empty)
