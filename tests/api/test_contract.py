"""The contract is well formed, commented to the last field, and its generated code is up to date."""

import dataclasses
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import grpc_tools
import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

from weft.config import AdapterLimits, RequestLimits
from weft.methods.catalog import KINDS
from weft.v1 import generation_pb2, model_pb2

REPOSITORY = Path(__file__).resolve().parents[2]
PROTOS = REPOSITORY / "protos"
GENERATE = PROTOS / "generate.py"
GENERATED = REPOSITORY / "server" / "weft" / "v1"
BUF = Path(sysconfig.get_path("scripts")) / "buf"
SHARED_REQUEST = ".weft.v1.GenerateRequest"

# Numbers of the lists in descriptor.proto that hold what must be commented; they make up the paths of source locations.
FILE_MESSAGES, FILE_ENUMS, FILE_SERVICES = 4, 5, 6
MESSAGE_FIELDS, MESSAGE_MESSAGES, MESSAGE_ENUMS, MESSAGE_ONEOFS = 2, 3, 4, 8
ENUM_VALUES = SERVICE_METHODS = 2

SourcePath = tuple[int, ...]


def run(*command: str | Path, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)


def compiled(protos: Path, directory: Path) -> FileDescriptorSet:
    """The files of weft.v1 with their comments."""
    target = directory / "contract.binpb"
    files = sorted(path.relative_to(protos).as_posix() for path in protos.rglob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    arguments = [f"-I{protos}", f"-I{well_known}", "--include_source_info", f"--descriptor_set_out={target}", *files]
    assert protoc.main(["protoc", *arguments]) == 0
    return FileDescriptorSet.FromString(target.read_bytes())


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> FileDescriptorSet:
    return compiled(PROTOS, tmp_path_factory.mktemp("contract"))


def elements_of_message(message: DescriptorProto, path: SourcePath, name: str) -> Iterator[tuple[str, SourcePath]]:
    yield name, path
    for i, field in enumerate(message.field):
        yield f"{name}.{field.name}", (*path, MESSAGE_FIELDS, i)
    for i, oneof in enumerate(message.oneof_decl):
        if not oneof.name.startswith("_"):  # those of `optional` scalars are not in the source
            yield f"{name}.{oneof.name}", (*path, MESSAGE_ONEOFS, i)
    for i, nested in enumerate(message.nested_type):
        yield from elements_of_message(nested, (*path, MESSAGE_MESSAGES, i), f"{name}.{nested.name}")
    for i, enum in enumerate(message.enum_type):
        yield from elements_of_enum(enum, (*path, MESSAGE_ENUMS, i), f"{name}.{enum.name}")


def elements_of_enum(enum: EnumDescriptorProto, path: SourcePath, name: str) -> Iterator[tuple[str, SourcePath]]:
    yield name, path
    for i, value in enumerate(enum.value):
        yield f"{name}.{value.name}", (*path, ENUM_VALUES, i)


def elements(file: FileDescriptorProto) -> Iterator[tuple[str, SourcePath]]:
    """Yield the name and source path of every element that must be commented."""
    for i, message in enumerate(file.message_type):
        yield from elements_of_message(message, (FILE_MESSAGES, i), message.name)
    for i, enum in enumerate(file.enum_type):
        yield from elements_of_enum(enum, (FILE_ENUMS, i), enum.name)
    for i, service in enumerate(file.service):
        yield service.name, (FILE_SERVICES, i)
        for j, method in enumerate(service.method):
            yield f"{service.name}.{method.name}", (FILE_SERVICES, i, SERVICE_METHODS, j)


def comments(file: FileDescriptorProto) -> dict[SourcePath, str]:
    return {tuple(location.path): location.leading_comments.strip() for location in file.source_code_info.location}


def uncommented(contract: FileDescriptorSet) -> list[str]:
    return [name for file in contract.file for name, path in elements(file) if not comments(file).get(path)]


def dangling_references(contract: FileDescriptorSet) -> set[str]:
    """Return each `Name` and `Name.field` in a comment that is neither of the contract nor of google.rpc."""
    known = {name for file in contract.file for name, _ in elements(file)}
    known |= {"ErrorInfo", "BadRequest", "ResourceInfo", "QuotaFailure", "RetryInfo"}
    text = "\n".join(comment for file in contract.file for comment in comments(file).values())
    return set(re.findall(r"`([A-Z][A-Za-z]+(?:\.[A-Za-z_]+)?)`", text)) - known


def enums(contract: FileDescriptorSet) -> list[EnumDescriptorProto]:
    nested = [enum for file in contract.file for message in file.message_type for enum in message.enum_type]
    return [enum for file in contract.file for enum in file.enum_type] + nested


def upper_snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()


def test_buf_lint_passes():
    result = run(BUF, "lint", cwd=PROTOS)
    assert result.returncode == 0, result.stdout + result.stderr


def test_buf_format_passes():
    result = run(BUF, "format", "--diff", "--exit-code", cwd=PROTOS)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("command", "before", "after"),
    [
        (("lint",), "// Input to split into tokens.\n", ""),
        (("lint",), "package weft.v1;", "package weft.v2;"),
        (("format", "--diff", "--exit-code"), "  bool pieces = 3;", "    bool pieces=3;"),
    ],
    ids=["comment", "package", "format"],
)
def test_buf_sees_what_it_is_there_for(tmp_path: Path, command: tuple[str, ...], before: str, after: str):
    shutil.copytree(PROTOS, tmp_path / "protos")
    file = tmp_path / "protos" / "weft" / "v1" / "generation_service.proto"
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))
    assert run(BUF, *command, cwd=tmp_path / "protos").returncode != 0


def test_generated_code_is_up_to_date():
    result = run(sys.executable, GENERATE, "--check")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("change", ["edited", "missing", "stale"])
def test_check_sees_outdated_code(tmp_path: Path, change: str):
    package = tmp_path / "weft" / "v1"
    shutil.copytree(GENERATED, package, ignore=shutil.ignore_patterns("__pycache__"))
    file = package / ("removed_pb2.py" if change == "stale" else "adapter_pb2.pyi")
    if change == "missing":
        file.unlink()
    else:
        file.write_text("# by hand\n")
    result = run(sys.executable, GENERATE, "--check", "--root", tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [f"weft/v1/{file.name} is out of date: run `make protos`"]


def test_generating_over_old_code_leaves_what_check_accepts(tmp_path: Path):
    stale = tmp_path / "weft" / "v1" / "removed_pb2.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    assert run(sys.executable, GENERATE, "--root", tmp_path).returncode == 0
    assert not stale.exists()
    assert run(sys.executable, GENERATE, "--check", "--root", tmp_path).returncode == 0


def test_everything_is_commented(contract: FileDescriptorSet):
    assert uncommented(contract) == []


@pytest.mark.parametrize(
    "name", ["Sampling.top_k", "FinishReason.FINISH_REASON_STOP", "GenerateRequest.input", "Usage"]
)
def test_a_missing_comment_is_seen(contract: FileDescriptorSet, name: str):
    damaged = FileDescriptorSet()
    damaged.CopyFrom(contract)
    [(file, path)] = [(file, path) for file in damaged.file for element, path in elements(file) if element == name]
    for location in file.source_code_info.location:
        if tuple(location.path) == path:
            location.ClearField("leading_comments")
    assert uncommented(damaged) == [name]


def test_comments_refer_to_what_exists(contract: FileDescriptorSet):
    assert dangling_references(contract) == set()


def test_a_dangling_reference_is_seen(contract: FileDescriptorSet):
    damaged = FileDescriptorSet()
    damaged.CopyFrom(contract)
    damaged.file[0].source_code_info.location.add(leading_comments="See `Usage` and `Usage.cost`.")
    assert dangling_references(damaged) == {"Usage.cost"}


def test_zero_of_every_enum_is_unspecified(contract: FileDescriptorSet):
    zeros = {enum.name: enum.value[0] for enum in enums(contract)}
    assert zeros
    assert {name: (zero.number, zero.name) for name, zero in zeros.items()} == {
        name: (0, f"{upper_snake(name)}_UNSPECIFIED") for name in zeros
    }


def test_only_generate_request_is_shared(contract: FileDescriptorSet):
    methods = [method for file in contract.file for service in file.service for method in service.method]
    types = [name for method in methods for name in (method.input_type, method.output_type)]
    assert {name for name in types if types.count(name) > 1} == {SHARED_REQUEST}
    assert types.count(SHARED_REQUEST) == 2
    for method in methods:
        assert method.output_type == f".weft.v1.{method.name}Response"
        assert method.input_type in (f".weft.v1.{method.name}Request", SHARED_REQUEST)


def test_streams_are_where_the_contract_has_them(contract: FileDescriptorSet):
    methods = [method for file in contract.file for service in file.service for method in service.method]
    assert {method.name for method in methods if method.client_streaming} == {"UploadAdapter"}
    assert {method.name for method in methods if method.server_streaming} == {"StreamGenerate", "WatchAdapters"}


def test_scalars_tell_unset_from_zero():
    """Every sampling setting, and every one whose default is not zero, can be left unset."""
    for field in generation_pb2.Sampling.DESCRIPTOR.fields:
        assert field.has_presence, field.full_name
    for message, name in [
        (generation_pb2.Stopping, "max_new_tokens"),
        (generation_pb2.Stopping, "min_new_tokens"),
        (generation_pb2.ResponseOptions, "logprobs"),
        (generation_pb2.WeightedAdapter, "weight"),
    ]:
        assert message.DESCRIPTOR.fields_by_name[name].has_presence, name


def test_every_kind_of_adapter_is_named_where_clients_look():
    """In the comment of `Adapter.method`, and no other."""
    text = (PROTOS / "weft" / "v1" / "adapter.proto").read_text()
    comment = text[text.index("// Kind of adapter:") : text.index("string method = 3")]
    assert set(re.findall(r'"(\w+)"', comment)) == KINDS


@pytest.mark.parametrize(
    ("config", "message"), [(AdapterLimits, model_pb2.AdapterLimits), (RequestLimits, model_pb2.RequestLimits)]
)
def test_every_configured_limit_is_public(config: type, message: type):
    """Limits have their configuration's names; a time in seconds is a Duration without the unit in its name."""
    fields = {field.name: field for field in message.DESCRIPTOR.fields}
    for knob in dataclasses.fields(config):
        field = fields[knob.name.removesuffix("_s")]
        is_duration = field.message_type is not None and field.message_type.full_name == "google.protobuf.Duration"
        assert is_duration == knob.name.endswith("_s"), knob.name
