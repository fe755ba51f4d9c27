"""Settings: every field of WeftConfig has one, in every source, by precedence; wrong values give clear errors."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import pytest
import yaml

from tests.cli.conftest import Weft
from weft.config import GIB, MIB, ModelConfig, Quantization, WeftConfig
from weft.errors import InvalidAdapter
from weft.settings import InvalidSettings, Knob, knobs, load

DEFAULTS = WeftConfig(model=ModelConfig(path=Path("/model")))


class Leaf(NamedTuple):
    """A field that holds a value, where it is, and a value that is not its default."""

    path: tuple[str, ...]
    other: Any


def leaves(kind: Any, above: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Every field of a dataclass and of the dataclasses in it."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        path = (*above, field.name)
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, path)
            continue
        if get_origin(hint) in (Union, UnionType):
            [hint] = [part for part in get_args(hint) if part is not type(None)]
        yield Leaf(path, other(hint, held(DEFAULTS, path)))


def other(kind: Any, default: Any) -> Any:
    if get_origin(kind) is tuple:
        item, *_ = get_args(kind)
        return ("one=1", "two=2") if item is str else (item("/one"), item("/two"))
    if get_origin(kind) is Literal or issubclass(kind, StrEnum):
        return next(value for value in get_args(kind) or kind if value != default)
    if kind is bool:
        return not default
    if kind is str:
        return "other.example"
    if kind is Path:
        return Path("/elsewhere")
    return (default or 0) + kind(96)


def held(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


LEAVES = list(leaves(WeftConfig))
IDS = [".".join(leaf.path) for leaf in LEAVES]


def knob_of(leaf: Leaf) -> Knob:
    """Return the only setting for a field."""
    section, field = leaf.path if len(leaf.path) == 2 else ("", *leaf.path)
    [found] = [knob for knob in knobs() if (knob.section, knob.field) == (section, field)]
    return found


def arguments_for(knob: Knob, value: Any) -> list[str]:
    match value:
        case bool():
            return [knob.flag if value else knob.flag.replace("--", "--no-", 1)]
        case tuple():
            return [part for path in value for part in (knob.flag, str(path))]
        case _:
            return [str(value)] if knob.info.is_required() else [knob.flag, str(value)]


def _listed(items: tuple[Any, ...]) -> str:
    """As the environment spells a list: paths as PATH does, texts by commas."""
    return (os.pathsep if isinstance(items[0], Path) else ",").join(map(str, items))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("WEFT_")]:
        monkeypatch.delenv(variable)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[WeftConfig, list[tuple[str, Path]]]]:
    """Return the list of configs that `weft serve` would serve: its last step only notes them and returns 3."""
    calls: list[tuple[WeftConfig, list[tuple[str, Path]]]] = []

    def run(config: WeftConfig, adapters: list[tuple[str, Path]]) -> int:
        calls.append((config, adapters))
        return 3

    module = ModuleType("weft.api.serve")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "weft.api.serve", module)
    return calls


def test_each_name_is_used_once_and_leaves_room_for_the_client() -> None:
    for spelling in ("name", "flag", "variable"):
        spelled = [getattr(knob, spelling) for knob in knobs()]
        assert len(set(spelled)) == len(spelled) == len(LEAVES)
    assert not {"WEFT_SERVER", "WEFT_CONFIG"} & {knob.variable for knob in knobs()}
    assert not {"--server", "--config", "--adapter", "--help"} & {knob.flag for knob in knobs()}


def test_names_that_users_know() -> None:
    flags = {knob.flag for knob in knobs()}
    assert flags >= {
        "MODEL",
        "--quantization",
        "--dtype",
        "--max-num-seqs",
        "--max-num-batched-tokens",
        "--max-model-len",
        "--block-size",
        "--host",
        "--port",
        "--metrics-port",
        "--store",
        "--allowed-source",
        "--adapter-device-bytes",
    }


@pytest.mark.parametrize("leaf", LEAVES, ids=IDS)
def test_every_field_is_reachable_by_flag(weft: Weft, served: list[Any], leaf: Leaf) -> None:
    knob = knob_of(leaf)
    model = [] if knob.info.is_required() else ["/model"]
    result = weft("serve", *model, *arguments_for(knob, leaf.other))
    assert result.exit_code == 3, result.stderr
    assert held(served[0][0], leaf.path) == leaf.other


@pytest.mark.parametrize("leaf", LEAVES, ids=IDS)
def test_every_field_is_reachable_by_environment(monkeypatch: pytest.MonkeyPatch, leaf: Leaf) -> None:
    monkeypatch.setenv("WEFT_MODEL", "/model")
    value = _listed(leaf.other) if isinstance(leaf.other, tuple) else str(leaf.other)
    monkeypatch.setenv(knob_of(leaf).variable, value)
    assert held(load({}), leaf.path) == leaf.other


@pytest.mark.parametrize("suffix", [".toml", ".yaml"])
def test_every_field_is_reachable_by_file(tmp_path: Path, suffix: str) -> None:
    plain: dict[str, Any] = {}
    for leaf in LEAVES:
        match leaf.other:
            case tuple():
                plain[knob_of(leaf).name] = [str(path) for path in leaf.other]
            case Path() | StrEnum():
                plain[knob_of(leaf).name] = str(leaf.other)
            case _:
                plain[knob_of(leaf).name] = leaf.other
    file = tmp_path / f"weft{suffix}"
    if suffix == ".yaml":
        file.write_text(yaml.safe_dump(plain))
    else:
        file.write_text("\n".join(f"{name} = {as_toml(value)}" for name, value in plain.items()))
    config = load({}, file=file)
    assert {leaf.path: held(config, leaf.path) for leaf in LEAVES} == {leaf.path: leaf.other for leaf in LEAVES}


def as_toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def test_without_any_source_there_are_the_defaults() -> None:
    assert load({"model": "/model"}) == WeftConfig(model=ModelConfig(path=Path("/model")))


def test_flag_goes_before_environment_before_file_before_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weft: Weft, served: list[Any]
) -> None:
    file = tmp_path / "weft.toml"
    file.write_text('max_num_seqs = 11\nblock_size = 11\nmax_queued_requests = 11\nmodel = "/file"\n')
    monkeypatch.setenv("WEFT_CONFIG", str(file))
    monkeypatch.setenv("WEFT_MAX_NUM_SEQS", "22")
    monkeypatch.setenv("WEFT_BLOCK_SIZE", "22")
    assert weft("serve", "--max-num-seqs", "33").exit_code == 3
    config = served[0][0]
    engine = config.engine
    assert (engine.max_num_seqs, engine.block_size, engine.max_queued_requests) == (33, 22, 11)
    assert engine.max_num_batched_tokens == 2048
    assert config.model.path == Path("/file")


def test_an_empty_variable_is_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_MAX_NUM_SEQS", "")
    assert load({"model": "/model"}).engine.max_num_seqs == 64


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", GIB), ("1.5 MiB", 3 * MIB // 2), ("2GB", 2 * 10**9), ("4096", 4096), ("0", 0)]
)
def test_sizes_are_for_people(text: str, size: int) -> None:
    assert load({"model": "/model", "adapter_device_bytes": text}).residency.device_bytes == size


def test_a_home_directory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/weaver")
    monkeypatch.setenv("WEFT_ALLOWED_SOURCES", os.pathsep.join(["~/runs", "/shared"]))
    monkeypatch.setenv("WEFT_ADAPTER_IGNORED_CONFIG_KEYS", "one,two:b")
    config = load({"model": "~/model"})
    assert config.adapters.ignored_config_keys == ("one", "two:b")
    assert config.model.path == Path("/home/weaver/model")
    assert config.allowed_sources == (Path("/home/weaver/runs"), Path("/shared"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--max-num-seqs", "many"), "--max-num-seqs must be a whole number, given 'many'"),
        (("--max-num-seqs", "0"), "--max-num-seqs must be at least 1, given '0'"),
        (("--port", "-1"), "--port must be at least 0, given '-1'"),
        (("--drain-timeout-s", "nan"), "--drain-timeout-s must be a finite number, given 'nan'"),
        (("--quant", "nf3"), "--quantization must be 'nf4', 'int8' or 'none', given 'nf3'"),
        (("--device", "tpu"), "--device must be 'auto', 'cpu' or 'cuda', given 'tpu'"),
        (
            ("--adapter-device-bytes", "much"),
            "--adapter-device-bytes must be a size of at least 0, such as 512MiB, 1.5GiB or 4096, given 'much'",
        ),
        (("--adapter-host-bytes", "-1"), "--adapter-host-bytes must be a size of at least 0"),
        (("--adapter", "reverse"), "--adapter must be ID=PATH, given 'reverse'"),
        (("--adapter", "=x"), "--adapter must be ID=PATH, given '=x'"),
        (("--config", "weft.ini"), "the file weft.ini cannot be read: there is no such file"),
    ],
)
def test_a_wrong_flag_is_told_in_one_line(weft: Weft, served: list[Any], arguments: tuple[str, str], text: str) -> None:
    result = weft("serve", "/model", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(text)
    assert len(result.stderr.splitlines()) == 1
    assert not served


def test_a_wrong_variable_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_PORT", "tcp://10.0.0.1:50051")
    with pytest.raises(InvalidSettings, match=r"^WEFT_PORT must be a whole number, given 'tcp://10.0.0.1:50051'$"):
        load({"model": "/model"})


def test_a_rule_of_the_config_is_told_by_the_name_of_the_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WEFT_MAX_NUM_BATCHED_TOKENS", "8")
    with pytest.raises(InvalidSettings, match=r"^WEFT_MAX_NUM_BATCHED_TOKENS must be at least max_num_seqs \(64\)"):
        load({"model": "/model"})
    (tmp_path / "weft.yaml").write_text("block_size: 0")
    with pytest.raises(InvalidSettings, match=r"^block_size in .*weft.yaml must be at least 1, given 0$"):
        load({"model": "/model", "max_num_batched_tokens": 64}, file=tmp_path / "weft.yaml")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("weft.toml", "max_num_seq = 3", r"sets max_num_seq, which is no knob; did you mean max_num_seqs\?$"),
        ("weft.toml", "[engine]\nblock_size = 3", "sets engine, which is no knob"),
        ("weft.toml", "max_num_seqs = yes", "cannot be read as TOML: Invalid value"),
        ("weft.toml", "max_num_seqs = true", "must be a whole number, given 'true'"),
        ("weft.yaml", "- max_num_seqs", "must hold names and values"),
        ("weft.yaml", "max_num_seqs: [", "cannot be read as YAML"),
        ("weft.yaml", "allowed_sources: 3", "allowed_sources in .* must be a list, given 3"),
        ("weft.yaml", "adapter_ignored_config_keys: 3", "adapter_ignored_config_keys in .* must be a list, given 3"),
        ("weft.json", "{}", "must end in .toml, .yaml, .yml, given '.json'"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidSettings, match=message) as raised:
        load({"model": "/model"}, file=tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_model_must_be_given(weft: Weft, served: list[Any]) -> None:
    result = weft("serve")
    assert result.exit_code == 2
    assert result.stderr == "MODEL must be given: as an argument, as WEFT_MODEL or as model in a file\n"


def test_adapters_to_serve_are_handed_over_and_are_allowed_sources(
    weft: Weft, served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two=three"
    one.mkdir()
    two.mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = ["--quant", "int8", "--allowed-source", "/shared", "--adapter", f"a={one}", "--adapter", "b=two=three"]
    result = weft("serve", "/model", *arguments)
    assert result.exit_code == 3
    config, adapters = served[0]
    assert config.model.quantization is Quantization.INT8
    assert adapters == [("a", one), ("b", two)]
    assert config.allowed_sources == (Path("/shared"), one, two)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (InvalidAdapter("ID_INVALID", "adapter_id: bad"), "ID_INVALID: adapter_id: bad\n"),
        (FileNotFoundError("model: /model holds no config.json"), "model: /model holds no config.json\n"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    weft: Weft, served: list[Any], monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def run(config: WeftConfig, adapters: object) -> int:
        raise error

    monkeypatch.setattr(sys.modules["weft.api.serve"], "run", run)
    result = weft("serve", "/model")
    assert (result.exit_code, result.stderr) == (1, text)


def test_the_help_of_serve_groups_every_knob_by_its_section(weft: Weft) -> None:
    told = weft("serve", "--help").stdout
    for knob in knobs():
        assert knob.flag in told
    engine, server = told.index("Engine (size of the batch"), told.index("Server (addresses")
    assert engine < told.index("--max-num-seqs N") < server < told.index("--metrics-port N")
    assert "[1 GiB]" in told
    assert "prompt, virtual and generated tokens" in " ".join(told.lower().split())
