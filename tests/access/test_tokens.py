"""Tokens: their file, the commands that change it, and the tokens of a running server, which follow it."""

import ast
import hmac
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from weft.api.access import token_file, tokens
from weft.api.access.principal import Principal, Role, Via
from weft.api.access.secret_file import UnusableAccess
from weft.api.access.token import Token
from weft.api.access.tokens import Following, Tokens
from weft.cli import app

Weft = Callable[..., Result]


def weft(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def stored(token: Token, **fields: Any) -> token_file.StoredToken:
    given = {
        "token_id": token.token_id,
        "sha256": token.sha256,
        "tenant": "acme",
        "roles": frozenset({Role.GENERATE}),
        "created": datetime.now(UTC).replace(microsecond=0),
        "expires": None,
    }
    return token_file.StoredToken(**(given | fields))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def test_a_token_is_printed_once_and_only_its_hash_is_kept(file: Path) -> None:
    made = weft("tokens", "add", "--tenant", "acme", "--role", "generate", "--role", "register", file)
    assert made.exit_code == 0, made.output
    token = Token.parse(made.stdout.strip())
    assert token is not None
    assert len(bytes.fromhex(token.secret)) == 32
    assert token.secret not in made.stderr
    assert token.secret not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    shown = weft("tokens", "ls", file).stdout
    assert all(text in shown for text in (token.token_id, "acme", "generate, register", "never"))
    assert token.secret not in shown
    assert token.sha256 not in shown
    [row] = json.loads(weft("tokens", "ls", file, "--json").stdout)
    assert (row["id"], row["roles"], row["expired"]) == (token.token_id, ["generate", "register"], False)
    assert Tokens(file).identify(token) == Principal(
        tenant="acme", roles=frozenset({Role.GENERATE, Role.REGISTER}), token_id=token.token_id, via=Via.TOKEN
    )


def test_tokens_are_removed_by_id(file: Path) -> None:
    first, second = (
        Token.parse(weft("tokens", "add", file, "--tenant", name, "--role", "admin").stdout.strip()) for name in "ab"
    )
    assert first is not None
    assert second is not None
    assert weft("tokens", "rm", file, first.token_id).stdout == f"removed: {first.token_id}, a\n"
    assert Tokens(file).identify(first) is None
    assert Tokens(file).identify(second) is not None
    again = weft("tokens", "rm", file, first.token_id)
    assert again.exit_code == 1
    assert "weft tokens ls" in again.stderr
    # A whole token in the place of the id is not repeated: the line may be logged.
    assert second.secret not in weft("tokens", "rm", file, second.spelled()).output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--tenant", "acme", "--role", "root"), "--role must be one of generate, register, admin"),
        (("--tenant", "ACME", "--role", "generate"), "--tenant must match"),
        (("--tenant", "", "--role", "generate"), "--tenant must match"),
        (("--tenant", "acme"), "--role"),
        (("--tenant", "acme", "--role", "generate", "--expires-days", "0"), "--expires-days"),
        (("--tenant", "acme", "--role", "generate", "--expires-days", "99999999"), "before the year 10000"),
    ],
)
def test_a_wrong_option_makes_no_file(file: Path, arguments: tuple[str, ...], says: str) -> None:
    result = weft("tokens", "add", file, *arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())
    assert not file.exists()


def test_writers_at_the_same_time_lose_no_token(file: Path) -> None:
    made = [Token.new() for _ in range(40)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda token: token_file.add(file, stored(token)), made))
    assert set(token_file.load(file)) == {token.token_id for token in made}
    assert [path.name for path in file.parent.iterdir() if path.name.endswith("json")] == ["tokens.json"]


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o602, 0o610, 0o601])
def test_a_file_that_others_can_read_or_write_is_refused(file: Path, mode: int) -> None:
    token_file.add(file, stored(Token.new()))
    file.chmod(mode)
    with pytest.raises(UnusableAccess, match=rf"token_file: .*tokens.json .*given mode 0{mode:o}; run chmod 600"):
        token_file.load(file)
    file.chmod(0o600)
    assert token_file.load(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="files of root may be readable by their group")
def test_a_file_of_a_user_may_not_be_readable_by_the_group(file: Path) -> None:
    token_file.add(file, stored(Token.new()))
    file.chmod(0o640)
    with pytest.raises(UnusableAccess, match="given mode 0640"):
        token_file.load(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_a_file_of_another_user_is_refused(file: Path) -> None:
    token_file.add(file, stored(Token.new()))
    os.chown(file, 12345, 12345)
    with pytest.raises(UnusableAccess, match="must belong to the user of the server, or to root, given user 12345"):
        token_file.load(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to own a file as Kubernetes does")
def test_a_file_of_root_may_be_readable_by_its_group(file: Path) -> None:
    token_file.add(file, stored(Token.new()))
    os.chown(file, 0, 10001)
    file.chmod(0o640)
    assert token_file.load(file)
    token_file.add(file, stored(Token.new()))
    assert (file.stat().st_mode & 0o777, file.stat().st_gid) == (0o640, 10001)
    file.chmod(0o644)
    with pytest.raises(UnusableAccess, match="given mode 0644"):
        token_file.load(file)


_GOOD = {
    "id": "0" * 12,
    "sha256": "a" * 64,
    "tenant": "acme",
    "roles": ["generate"],
    "created": "2026-11-30T12:00:00+00:00",
    "expires": None,
}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is not JSON"),
        ("[]", "is not an object"),
        ("{}", "must have the keys format and tokens"),
        ('{"format": 1, "format": 1, "tokens": []}', "holds a key twice"),
        ('{"format": 2, "tokens": []}', "format must be 1, given 2"),
        ('{"format": 1, "tokens": {}}', "tokens must be a list"),
        ('{"format": 1, "tokens": [1]}', r"tokens\[0\] must have the keys"),
        ({"secret": "x"}, "must have the keys"),
        ({"id": "short"}, r"tokens\[0\].id must match"),
        ({"id": 7}, r"tokens\[0\].id must match"),
        ({"sha256": "A" * 64}, "sha256 must match"),
        ({"tenant": "a/b"}, "tenant must match"),
        ({"roles": []}, "at least one of generate, register, admin"),
        ({"roles": ["root"]}, "at least one of"),
        ({"roles": [["generate"]]}, "nests deeper than 4"),
        ({"roles": "generate"}, "at least one of"),
        ({"created": "2026-11-30"}, "created must be a time with its zone"),
        ({"expires": "soon"}, "expires must be a time"),
        ({"expires": 5}, "expires must be a time"),
    ],
)
def test_a_file_that_is_not_exactly_of_the_form_is_refused(file: Path, content: Any, says: str) -> None:
    text = content if isinstance(content, str) else json.dumps({"format": 1, "tokens": [_GOOD | content]})
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(UnusableAccess, match=says):
        token_file.load(file)
    file.write_text(json.dumps({"format": 1, "tokens": [_GOOD]}))  # control
    assert list(token_file.load(file)) == ["0" * 12]


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for name, says in (("absent", "No such file"), ("fifo", "must be a regular file"), (".", "Is a directory")):
        with pytest.raises(UnusableAccess, match=says):
            token_file.load(tmp_path / name)
    with (tmp_path / "large").open("wb") as large:
        large.truncate(5 << 20)
    (tmp_path / "large").chmod(0o600)
    with pytest.raises(UnusableAccess, match="at most 4194304 bytes, given 5242880"):
        token_file.load(tmp_path / "large")


def test_a_token_ends(file: Path) -> None:
    token, end = Token.new(), datetime.now(UTC) + timedelta(days=1)
    token_file.add(file, stored(token, expires=end))
    assert Tokens(file, now_s=lambda: end.timestamp() - 1).identify(token) is not None
    assert Tokens(file, now_s=lambda: end.timestamp()).identify(token) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "weft_",
        "Weft_{id}_{secret}",
        "weft_{id}_{secret}0",
        "weft_{id}_{secret}\n",
        " weft_{id}_{secret}",
        "{secret}",
    ],
)
def test_other_forms_are_no_tokens(text: str) -> None:
    token = Token.new()
    assert Token.parse(token.spelled()) == token
    assert Token.parse(text.format(id=token.token_id, secret=token.secret)) is None


def test_a_wrong_secret_is_refused(file: Path) -> None:
    token, other = Token.new(), Token.new()
    token_file.add(file, stored(token))
    found = Tokens(file)
    assert found.identify(token) is not None
    assert found.identify(token._replace(secret=other.secret)) is None
    assert found.identify(other) is None


def test_every_comparison_takes_constant_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown id is compared too, with hmac.compare_digest, and no `==` compares a hash."""
    compared: list[tuple[Any, Any]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(tokens.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    token, unknown = Token.new(), Token.new()
    token_file.add(file, stored(token))
    found = Tokens(file)
    for presented in (token, token._replace(secret=unknown.secret), unknown):
        found.identify(presented)
    assert [given for given, _ in compared] == [token.sha256, unknown.sha256, unknown.sha256]
    source = ast.parse(Path(tokens.__file__).read_text())
    [identify] = [node for node in ast.walk(source) if isinstance(node, ast.FunctionDef) and node.name == "identify"]
    compares = [node for node in ast.walk(identify) if isinstance(node, ast.Compare)]
    assert not [node for node in compares if isinstance(node.ops[0], ast.Eq)]


def test_a_changed_file_is_followed_and_a_broken_one_is_not(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = Token.new(), Token.new()
    token_file.add(file, stored(first))
    found = Tokens(file)
    assert not found.refresh()
    token_file.add(file, stored(second))
    assert found.identify(second) is None
    assert found.refresh()
    assert found.identify(second) is not None
    file.write_text("{")
    assert not found.refresh()
    assert "the 2 tokens read before stay valid" in caplog.text
    caplog.clear()
    assert not found.refresh()  # logged once, not every second
    assert caplog.text == ""
    file.unlink()
    assert not found.refresh()
    assert found.identify(first) is not None
    token_file.add(file, stored(second))
    assert found.refresh()
    assert (found.identify(first), found.identify(second) is None) == (None, False)


def test_a_thread_follows_the_file(file: Path) -> None:
    token, refreshed = Token.new(), []
    token_file.add(file, stored(Token.new()))
    found = Tokens(file)
    following = Following(found, lambda: refreshed.append(time.monotonic()))
    try:
        token_file.add(file, stored(token))
        following.hurry()
        give_up_at = time.monotonic() + 10
        while not refreshed:
            assert time.monotonic() < give_up_at
            time.sleep(0.01)
        assert found.identify(token) is not None
    finally:
        following.end()
