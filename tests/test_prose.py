"""Docstrings and pages keep the rules of CONTRIBUTING that a program can check: verbs first, plain words."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREES = ("server", "training", "protos", "benchmarks", "deploy", "docs", "adapters_store")
PAGES = {".md", ".proto", ".cpp", ".h"}
CARDS = ("adapters_store/demo/", "adapters_store/real/", "adapters_store/styles/")  # written by the trainer
DOCSTRINGS = ("server/weft", "training/weft_training")

NO_VERB = re.compile(
    r"(the|an?|what|whether|one|of|how|where|all|those|every|which|everything|nothing|its|as|in|this|that|these|each|no|"
    r"some|any|with|who|why|when|if|only|not|by|from|to|also|at|more|another|two|on|both|whatever|for|same|so)\b",
    re.IGNORECASE,
)
"""What a function's docstring does not begin with, since it begins with a verb."""

PHRASES = {
    r"\b(tells?|told|telling)\b": "say what happens: report, send, log, print, pass",
    r"\banew\b": "again",
    r"\b(comes?|came) of\b": "comes from, results from",
    r"\b(is|are|was|were) to (be|do|go|have|stay|come)\b": "must be, will be, or the verb itself",
    r"\b(nobody|somebody|everybody|anybody)\b": "name the thing: no request, no caller, every thread",
    r"\bwho (waits?|routes?|reads?|writes?|asks?|wants?)\b": "that: things are not people",
    r"\bthat are others\b": "that differ",
    r"\b(None|True|False|empty|nothing|0|-1) where\b": "if",
    r"(?:^|[.:;] )Where (?:a|an|no|none|the|it|there|such|that|this|they|both|any|nothing)\b[^.?]*, ": "If, or When",
}


def written(path: Path) -> str:
    """Return what people read in a file: a page whole, of Python the comments and strings that are docstrings."""
    text = path.read_text()
    if path.suffix != ".py":
        return text
    comments = [
        token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    return "\n".join([*(statement for statement in docstrings(text)), *comments])


def docstrings(text: str) -> Iterator[str]:
    """Yield every string that stands as a statement."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


def phrases_in(text: str) -> list[str]:
    """Return the phrases of `PHRASES` that a text uses, each with what to say instead."""
    whole = re.sub(r"`[^`]*`|\s+", " ", text)
    return [
        f"{found.group()!r}: {instead}" for pattern, instead in PHRASES.items() for found in re.finditer(pattern, whole)
    ]


def openings_without_verb(text: str) -> list[str]:
    """Return first lines of docstrings of functions that do not begin with a verb; properties are named by nouns."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        line = (ast.get_docstring(node) or "").partition("\n")[0]
        if NO_VERB.match(line):
            found.append(f"line {node.lineno}: {line}")
    return found


def python_files() -> list[Path]:
    return [path for tree in DOCSTRINGS for path in sorted((ROOT / tree).rglob("*.py")) if "/v1/" not in str(path)]


def pages() -> list[Path]:
    found = [path for tree in TREES for path in sorted((ROOT / tree).rglob("*")) if path.suffix in PAGES]
    benchmarks = sorted((ROOT / "benchmarks").rglob("*.py"))
    top = [path for path in sorted(ROOT.glob("*.md")) if path.name != "CONTRIBUTING.md"]  # it quotes what to avoid
    every = [*top, *found, *benchmarks]
    return [path for path in every if not path.relative_to(ROOT).as_posix().startswith(CARDS)]


def test_docstrings_begin_with_verbs() -> None:
    found = {path.relative_to(ROOT).as_posix(): openings_without_verb(path.read_text()) for path in python_files()}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_no_forbidden_phrase_is_written() -> None:
    found = {path.relative_to(ROOT).as_posix(): phrases_in(written(path)) for path in [*python_files(), *pages()]}
    assert {path: phrases for path, phrases in found.items() if phrases} == {}


def test_what_is_forbidden_is_seen() -> None:
    """Negative control."""
    assert len(phrases_in("None where it is told anew.\nWhere a slot is free, it is to be used by who waits")) == 6
    assert phrases_in("`told`: torch.where(a, b, c), the directory where files lie, a place to be") == []
    code = '''
def a():
    """The larger one."""

@property
def b():
    """The larger one."""

async def c():
    """Return the larger one."""
'''
    assert openings_without_verb(code) == ["line 2: The larger one."]
    assert len(python_files()) > 200
    assert len(pages()) > 60
