"""The client's credentials: what is sent where, and what the commands take from the environment."""

import socket
import threading
from pathlib import Path

import grpc
import pytest

from tests.cli.conftest import Weft, fake, weft  # noqa: F401  (fixtures)
from tests.cli.fake_service import FakeService, running
from weft.client import Client, Credentials, RpcFailure
from weft.client.credentials import is_this_machine
from weft.errors import Unauthenticated

TOKEN = "weft_" + "0" * 12 + "_" + "5ec2e7" * 10 + "5ec2"


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WEFT_TOKEN", "WEFT_TLS_CA", "WEFT_TLS_CERT", "WEFT_TLS_KEY", "WEFT_PLAINTEXT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("server", "wanted"),
    [
        ("127.0.0.1:50051", True),
        ("127.9.9.9:1", True),
        ("localhost:50051", True),
        ("localhost", True),
        ("[::1]:50051", True),
        ("::1", True),
        ("unix:/run/weft.sock", True),
        ("unix:///run/weft.sock", True),
        ("dns:///localhost:50051", True),
        ("ipv4:127.0.0.1:50051", True),
        ("dns://8.8.8.8/localhost:50051", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("weft.example.org:50051", False),
        ("localhost.example.org:50051", False),
        ("10.0.0.1:50051", False),
        ("0.0.0.0:50051", False),
        ("[::]:50051", False),
        ("[2001:db8::1]:50051", False),
        ("", False),
    ],
)
def test_what_is_this_machine(server: str, wanted: bool) -> None:
    assert is_this_machine(server) is wanted


def test_a_token_never_leaves_this_machine_in_plain_text(tmp_path: Path) -> None:
    token, ca = Credentials(token=TOKEN), tmp_path / "ca.crt"
    ca.write_bytes(b"")
    assert token.for_channel("127.0.0.1:1") is None
    assert isinstance(token.for_channel("weft.example.org:1"), grpc.ChannelCredentials)
    assert Credentials(token=TOKEN, plaintext=True).for_channel("weft.example.org:1") is None
    assert Credentials().for_channel("weft.example.org:1") is None
    assert isinstance(Credentials(ca_file=ca).for_channel("127.0.0.1:1"), grpc.ChannelCredentials)


@pytest.mark.parametrize("forced", [False, True])
def test_by_the_bytes_that_are_sent(forced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket in the place of another machine sees a TLS handshake; the token only if it was forced."""
    monkeypatch.setattr("weft.client.credentials.is_this_machine", lambda server: False)
    received = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def read() -> None:
            with listening.accept()[0] as connection:
                connection.settimeout(10)
                if forced:
                    connection.sendall(bytes.fromhex("000000040000000000"))  # an empty SETTINGS frame of HTTP/2
                while len(received) < 1 << 16 and (part := connection.recv(4096)):
                    received.extend(part)
                    if not forced or (b"weft.v1" in received and TOKEN.encode() in received):
                        return

        reader = threading.Thread(target=read)
        reader.start()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        credentials = Credentials(token=TOKEN, plaintext=forced)
        with Client(address, timeout_s=1.0, credentials=credentials) as client, pytest.raises(RpcFailure):
            client.tokenize("text")
        reader.join(10)
    if forced:
        assert TOKEN.encode() in received, "control: the token would be seen"
    else:
        assert received.startswith(b"\x16\x03"), "a TLS handshake"
        assert TOKEN.encode() not in received


def test_no_proxy_gets_the_calls_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy, running() as (service, address):
        proxy.settimeout(0.2)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for variable in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        with Client(address, timeout_s=10, credentials=Credentials(token=TOKEN)) as client:
            assert client.tokenize("text").num_tokens == 4
        assert service.requests
        with pytest.raises(TimeoutError):
            proxy.accept()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WEFT_TLS_CERT": "x"}, "WEFT_TLS_KEY"),
        ({"WEFT_PLAINTEXT": "perhaps"}, "WEFT_PLAINTEXT must be true or false, given 'perhaps'"),
        ({"WEFT_PLAINTEXT": "1", "WEFT_TLS_CA": "x"}, "plaintext must not be given with files of TLS"),
        ({"WEFT_TOKEN": "line\nbreak"}, "token must be printable ASCII"),
        ({"WEFT_TLS_CA": "/absent/ca.crt"}, "/absent/ca.crt: No such file"),
    ],
)
def test_wrong_variables_end_a_command_in_one_line(
    weft: Weft,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    says: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = weft("adapters", "ls", "--server", "127.0.0.1:1")
    assert result.exit_code in (1, 2)
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "line\nbreak" not in result.stderr


def test_a_command_sends_the_token_of_the_environment(
    fake: FakeService,  # noqa: F811
    weft: Weft,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, str]] = []
    begin = fake._begin
    monkeypatch.setattr(
        fake,
        "_begin",
        lambda request, context: seen.append(dict(context.invocation_metadata())) or begin(request, context),
    )
    monkeypatch.setenv("WEFT_TOKEN", f"{TOKEN}\r")
    assert weft("adapters", "ls").exit_code == 2  # a carriage return is not printable
    monkeypatch.setenv("WEFT_TOKEN", f" {TOKEN} ")
    assert weft("adapters", "ls").exit_code == 0
    assert seen[-1]["authorization"] == f"Bearer {TOKEN}"
    fake.failures.append(Unauthenticated("TOKEN_INVALID", "no"))
    result = weft("adapters", "ls")
    assert result.exit_code == 1
    assert "weft tokens ls" in result.stderr
    assert TOKEN not in result.stderr


def test_a_token_is_not_in_the_representation() -> None:
    assert TOKEN not in repr(Credentials(token=TOKEN))
