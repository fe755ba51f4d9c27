"""The committed style adapters, composed with a task's, work as documented, on a few inputs."""

import pytest
from tests.bases import load

from weft.config import Quantization
from weft.model.loader import Base
from weft_training.demo import styles
from weft_training.demo.styles import Composition
from weft_training.shipped import BASE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base() -> Base:
    return load(BASE, Quantization.NF4, attention="sdpa")


@pytest.mark.parametrize(("style", "least"), [("capitals-lora", 0.6), ("exclaim-lora", 0.85)])
def test_a_style_acts_beside_a_task_that_it_was_not_trained_with(
    monkeypatch: pytest.MonkeyPatch, base: Base, style: str, least: float
) -> None:
    monkeypatch.setattr(styles, "NUM_EXAMPLES", 40)
    both = Composition(task="reverse", weights={"reverse-lora": 1.0, style: 1.0})
    assert styles.measure(base, both).right >= least
    for weights in ({"reverse-lora": 1.0, style: 0.0}, {style: 1.0}):  # the controls: neither does it alone
        assert styles.measure(base, Composition(task="reverse", weights=weights)).right < 0.1


def test_what_is_wanted_is_the_task_in_every_style() -> None:
    one = Composition(task="reverse", weights={"exclaim-lora": 1.0, "reverse-lora": 1.0, "capitals-lora": 1.0})
    assert one.wanted("loom") == "MOOL!"
    assert Composition(task="caesar", weights={"caesar-lora": 1.0}).wanted("loom") == "mppn"
