"""From a date or an amount in words to its ISO form: "the third of March, twenty twenty-four" → 2024-03-03, EUR 206.05.

Dates follow ISO 8601. Amounts have the ISO 4217 code first, and as many decimals as the currency.
"""

import datetime
import random
import re
from typing import NamedTuple

from weft_training.demo.real.numerals import ordinal, short_ordinal, words, year
from weft_training.demo.real.task import Fields, RealTask
from weft_training.demo.real.wording import People, Wordings, split_of, worded
from weft_training.demo.tasks import MONTHS, Split

_DATES = worded(
    "the {ordinal} of {month}, {year}",
    "{month} the {ordinal}, {year}",
    "the {short} of {month} {digits}",
    "{day} {month} {digits}",
    "{month} {short}, {year}",
    test=("the {ordinal} of {month} {digits}", "{month} {ordinal} {year}", "the {short} of {month}, {year}"),
)
_SENTENCES = worded(
    "Please settle this by {x}.",
    "The meeting was moved to {x}.",
    "On the form it says {x}.",
    "We agreed on {x}.",
    "{x}, if I remember rightly.",
    "It must be {x}.",
    "The letter speaks of {x}.",
    "Put down {x}, please.",
    "I would say {x}.",
    test=("He mentioned {x} on the phone.", "Note: {x}.", "Could you enter {x}?", "The contract names {x}."),
)


class _Currency(NamedTuple):
    """A currency's names. unit: singular and plural. cents: singular and plural, or none."""

    code: str
    unit: tuple[str, str]
    cents: tuple[str, str] | None


_CURRENCIES = (
    _Currency("EUR", ("euro", "euros"), ("cent", "cents")),
    _Currency("USD", ("dollar", "dollars"), ("cent", "cents")),
    _Currency("GBP", ("pound", "pounds"), ("penny", "pence")),
    _Currency("CHF", ("Swiss franc", "Swiss francs"), ("centime", "centimes")),
    _Currency("PLN", ("zloty", "zlotys"), ("grosz", "groszy")),
    _Currency("JPY", ("yen", "yen"), None),
)
_AMOUNTS = {
    "plain": Wordings(
        ("{whole} {unit} and {part} {cents}", "{whole} {unit} {part}"), ("{whole} {unit}, {part} {cents}",)
    ),
    "round": Wordings(("{whole} {unit}", "exactly {whole} {unit}"), ("{whole} {unit} sharp", "all of {whole} {unit}")),
}


def _draw(rng: random.Random, people: People, split: Split) -> tuple[str, str]:
    del people
    while True:
        said, iso = _date(rng, split) if rng.random() < 0.5 else _amount(rng, split)
        if split_of(iso) is split:
            break
    sentence = _SENTENCES.draw(rng, split)
    text = sentence.format(x=said)
    return text[0].upper() + text[1:], iso


def _date(rng: random.Random, split: Split) -> tuple[str, str]:
    drawn = datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(36_525))
    said = _DATES.draw(rng, split).format(
        ordinal=ordinal(drawn.day),
        short=short_ordinal(drawn.day),
        day=drawn.day,
        month=MONTHS[drawn.month - 1].capitalize(),
        year=year(drawn.year),
        digits=drawn.year,
    )
    return said, drawn.isoformat()


def _amount(rng: random.Random, split: Split) -> tuple[str, str]:
    currency = rng.choice(_CURRENCIES)
    whole = rng.randrange(2, 10 ** rng.randrange(2, 6))
    part = rng.randrange(1, 100) if currency.cents and rng.random() < 0.6 else 0
    forms = _AMOUNTS["plain" if part else "round"].draw(rng, split)
    said = forms.format(
        whole=words(whole),
        unit=currency.unit[whole != 1],
        part=words(part),
        cents=currency.cents[part != 1] if currency.cents else "",
    )
    return said, f"{currency.code} {whole}.{part:02d}" if currency.cents else f"{currency.code} {whole}"


def _fields(answer: str) -> Fields:
    date = re.fullmatch(r"(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)", answer)
    amount = re.fullmatch(r"(?P<currency>[A-Z]{3}) (?P<amount>\d+(\.\d\d)?)", answer)
    found = date or amount
    return {} if found is None else {name: value for name, value in found.groupdict().items() if value}


FIGURES = RealTask(
    name="figure",
    description="a date or an amount in words → its ISO form",
    instruction=(
        "Answer with the date or the amount in the text and nothing else: a date as YYYY-MM-DD, an amount as its "
        "currency's three-letter code and the number, with two decimals except for yen."
    ),
    num_shots=6,
    draw=_draw,
    fields=_fields,
    max_new_tokens=16,
)
