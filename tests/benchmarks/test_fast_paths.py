"""Each ablation removes exactly the path that it names, and no answer; a path that changes answers is refused."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import ablations, fast_paths, models, results
from benchmarks.ablations import UNCAPTURED, Ablation, plain, without
from benchmarks.fast_paths import Bench, Differs, Line, measure
from benchmarks.fixed_steps import NUM_PROMPT, FixedSteps, PromptAgain, loras, loras_at_q, mixtures

from tests.benchmarks.test_interleaved import TINY
from weft.config import EngineConfig
from weft.kernels.cpu import gemm, library
from weft.kernels.selection import Kernels
from weft.methods.driver import ReferenceDriver
from weft.model.packed import multiplies_bfloat16

LAYERS = TINY.num_layers
pytestmark = pytest.mark.skipif(not library.available(), reason="no compiler for the kernels")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("models")
    models.save(TINY, folder / "tiny")
    with Bench("tiny", folder=folder) as bench:
        yield bench


def test_every_path_has_its_lines() -> None:
    assert len({(line.path, line.what) for line in fast_paths.LINES}) == len(fast_paths.LINES) == 26
    names = {(line.name, line.path) for line in fast_paths.LINES}
    assert len(names) == len(dict(names)) == 12


@pytest.mark.parametrize("line", fast_paths.STEPS, ids=lambda line: f"{line.path}: {line.what}")
def test_answers_stay_without_a_path(bench: Bench, line: Line) -> None:
    if line.name == "onednn" and not multiplies_bfloat16():
        pytest.skip("oneDNN multiplies no bfloat16 here")
    gain = measure(line, bench, 1)
    assert gain.gain.median == gain.without_ms.median / gain.with_ms.median > 0


@pytest.mark.slow
def test_streams(bench: Bench) -> None:
    """Two servers and as many tokens from each."""
    (line,) = fast_paths.SERVED
    assert measure(line, bench, 1).error == 0


def _adding_nothing(kernels: Kernels) -> Kernels:
    return replace(kernels, driver=lambda *step: ReferenceDriver(()))


@pytest.mark.parametrize("quantity", [fast_paths.DECODE, fast_paths.PREFILL], ids=["decode", "prefill"])
def test_a_path_that_changes_answers_is_refused(bench: Bench, quantity: fast_paths.Quantity) -> None:
    def side(ablation: Ablation, bench: Bench) -> fast_paths.Compute:
        return partial(quantity.compute, bench.steps(ablation, loras))

    line = Line(
        "",
        "wrong",
        "deltas",
        1,
        partial(side, ablations.WHOLE),
        partial(side, plain(Ablation(changes=(_adding_nothing,)))),
    )
    with pytest.raises(
        Differs, match=r"wrong, deltas: the answers with and without it differ by 0\.\d+, at most 0\.03"
    ):
        measure(line, bench, 1)


def test_known_numbers(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    """One second beside two: sides take turns, and none is always first."""
    clock, asked = 0.0, []

    def side(name: str, seconds: float) -> Callable[[Bench], fast_paths.Compute]:
        def compute() -> torch.Tensor:
            nonlocal clock
            clock += seconds
            asked.append(name)
            return torch.ones(3)

        return lambda bench: compute

    monkeypatch.setattr(fast_paths.time, "perf_counter", lambda: clock)
    gain = measure(Line("", "a path", "seconds", 2, side("with", 1.0), side("without", 2.0)), bench, 2)
    assert asked[2:] == ["with", "without", "without", "with", "without", "with", "with", "without"]
    assert (gain.with_ms.turns, gain.without_ms.turns) == ((1000.0, 1000.0), (2000.0, 2000.0))
    assert (gain.gain.median, gain.verdict, gain.error) == (2.0, "gains", 0.0)
    same, worse = (measure(Line("", "", "", 1, side("", 1.0), side("", s)), bench, 1).verdict for s in (1.01, 0.9))
    assert (same, worse) == ("nothing", "costs")
    entry = fast_paths.entry(gain, 2, {"cpu": "a chip"}, "a command")
    assert fast_paths.cells([entry])[1] == ["a path", "seconds", "1000.0", "2000.0", "2.00 × (2.00–2.00)", "gains"]


def test_what_is_left_behind(monkeypatch: pytest.MonkeyPatch, bench: Bench, tmp_path: Path) -> None:
    """A file that keeps lines of other calls, and the table of all; an unknown path has none."""

    def side(bench: Bench) -> fast_paths.Compute:
        return lambda: torch.ones(3)

    lines = [Line(name, f"the path {name}", "ones", 1, side, side) for name in ("first", "second")]
    monkeypatch.setattr(fast_paths, "LINES", lines)
    monkeypatch.setattr(fast_paths, "Bench", lambda model: nullcontext(bench))
    files = "--json", str(tmp_path / "paths.json"), "--table", str(tmp_path / "paths.md"), "--turns", "1"
    for name in ("second", "first"):
        monkeypatch.setattr(sys, "argv", ["fast_paths", "--only", name, *files])
        fast_paths.main()
    entries = results.read(tmp_path / "paths.json")
    assert [one["path"] for one in entries] == ["the path second", "the path first"]
    assert all(one["conditions"]["commit"] and "--only" in one["command"] for one in entries)
    assert (tmp_path / "paths.md").read_text().count("| the path ") == 2
    monkeypatch.setattr(sys, "argv", ["fast_paths", "--only", "third"])
    with pytest.raises(SystemExit):
        fast_paths.main()


def _kernels_of(compute: Callable[[FixedSteps], torch.Tensor], steps: FixedSteps) -> Counter[str]:
    found: Counter[str] = Counter()
    with library.logging_to(lambda kernel, *_: found.update([kernel])):
        compute(steps)
    return found


_ONEDNN = plain(ablations.ONEDNN_PRODUCT)


@pytest.mark.parametrize(
    ("ablation", "changed"),
    [
        (UNCAPTURED, {}),
        (plain(without("groups", "gates")), {"weft_linear": 7, "weft_gate": 0}),
        (plain(without("packing")), {"weft_linear": 0}),
        (_ONEDNN, {"weft_linear": 0}),
        (plain(without("norms")), {"weft_rms_norm": 0}),
        (plain(without("gates")), {"weft_gate": 0}),
        (ablations.REFERENCE_DRIVER, {"weft_post": 0}),
        (ablations.REFERENCE_ATTENTION, {"weft_attend": 0, "weft_store": 0}),
    ],
)
def test_what_is_taken_away_is_not_asked(bench: Bench, ablation: Ablation, changed: dict[str, int]) -> None:
    """Kernels of a layer, in a decode step; beside them the last norm, and the head's product."""
    if ablation == _ONEDNN and not multiplies_bfloat16():
        pytest.skip("oneDNN multiplies no bfloat16 here")
    if not gemm.available():
        changed = {**changed, "weft_linear": 0}
    per_layer = {
        "weft_post": 7,
        "weft_linear": 4,
        "weft_rms_norm": 2,
        "weft_gate": 1,
        "weft_store": 1,
        "weft_attend": 1,
        **changed,
    }
    once = {"weft_rms_norm", "weft_linear"}
    expected = {name: LAYERS * count + (name in once) for name, count in per_layer.items() if count}
    assert _kernels_of(FixedSteps.decode, bench.steps(ablation, loras)) == expected


def test_kernels_that_have_nothing_to_add_are_asked_everywhere(bench: Bench) -> None:
    asked, everywhere = (
        _kernels_of(FixedSteps.decode, bench.steps(plain(ablation), loras_at_q))
        for ablation in (ablations.WHOLE, ablations.ASKED_EVERYWHERE)
    )
    assert (asked["weft_post"], everywhere["weft_post"]) == (LAYERS, 7 * LAYERS)
    assert (asked["weft_pre"], everywhere["weft_pre"]) == (0, LAYERS)


def test_gates_that_torch_makes_are_those_of_the_kernel(bench: Bench) -> None:
    steps = [bench.steps(ablation, mixtures) for ablation in (UNCAPTURED, ablations.TORCH_ROUTERS)]
    assert [_kernels_of(FixedSteps.decode, one)["weft_route"] for one in steps] == [LAYERS, 0]
    assert [_kernels_of(FixedSteps.decode, one)["weft_post"] for one in steps] == [7 * LAYERS] * 2
    wanted, got = (one.decode().float().clone() for one in steps)
    assert (got - wanted).norm() < 1e-2 * wanted.norm()
    assert (bench.steps(UNCAPTURED, loras).decode() - wanted).norm() > 1e-2 * wanted.norm(), "negative control"


def test_captured_steps_ask_no_model(bench: Bench) -> None:
    assert not _kernels_of(FixedSteps.decode, bench.steps(ablations.WHOLE, loras)), "they are told again in one call"
    assert _kernels_of(FixedSteps.prefill, bench.steps(ablations.WHOLE, loras))


def test_of_a_known_prompt_the_last_block_is_computed(bench: Bench) -> None:
    rows = []
    for caching in (True, False):
        again = PromptAgain(*bench.held(ablations.WHOLE), EngineConfig(max_num_seqs=1, enable_prefix_caching=caching))
        again.ask()
        rows.append(again.num_rows)
    assert rows == [16, NUM_PROMPT]
