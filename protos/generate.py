"""Writes the Python code of `weft.v1` into server/weft/v1, or with --check proves that it is up to date.

The output depends on the generators: run this with the versions of grpcio-tools and mypy-protobuf that the constraints
file pins. grpcio-tools 1.81.1 is the newest whose messages run on protobuf 6.33 and 7 alike.
"""

import argparse
import filecmp
import os
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
PACKAGE = Path("weft/v1")
SOURCE_ROOT = PROTOS.parent / "server"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def run_protoc(files: Sequence[Path], *outputs: str) -> None:
    """Run protoc on the files. Raises SystemExit if it fails."""
    includes = (PROTOS, Path(grpc_tools.__file__).parent / "_proto")
    arguments = [*(f"-I{path}" for path in includes), *outputs, *(file.as_posix() for file in files)]
    if protoc.main(["protoc", *arguments]) != 0:
        raise SystemExit("protoc failed")


def generate(root: Path) -> None:
    """Write messages for every file, and stubs and servicers for files with a service, to `root`/weft/v1."""
    # protoc finds protoc-gen-mypy and protoc-gen-mypy_grpc by name; they lie beside this interpreter.
    os.environ["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    files = sorted(path.relative_to(PROTOS) for path in (PROTOS / PACKAGE).glob("*.proto"))
    services = [file for file in files if file.stem.endswith("_service")]
    (root / PACKAGE).mkdir(parents=True, exist_ok=True)
    for stale in generated(root):
        (root / PACKAGE / stale).unlink()
    run_protoc(files, f"--python_out={root}", f"--mypy_out=quiet:{root}")
    run_protoc(services, f"--grpc_python_out={root}", f"--mypy_grpc_out=quiet:{root}")


def generated(root: Path) -> set[str]:
    """Return the names of the generated files under `root`."""
    return {path.name for pattern in GENERATED for path in (root / PACKAGE).glob(pattern)}


def differences(committed: Path, fresh: Path) -> list[str]:
    """Return the names of generated files that are missing, stale or different under `committed`."""
    names = sorted(generated(committed) | generated(fresh))
    _, different, unreadable = filecmp.cmpfiles(committed / PACKAGE, fresh / PACKAGE, names, shallow=False)
    return sorted({*different, *unreadable})


def main() -> int:
    """Write the generated code, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the code is out of date")
    parser.add_argument("--root", type=Path, default=SOURCE_ROOT, help="directory that holds weft/v1")
    arguments = parser.parse_args()
    if not arguments.check:
        generate(arguments.root)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        outdated = differences(arguments.root, Path(directory))
    for name in outdated:
        print(f"{PACKAGE / name} is out of date: run `make protos`", file=sys.stderr)
    return 1 if outdated else 0


if __name__ == "__main__":
    sys.exit(main())
