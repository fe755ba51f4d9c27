"""A message to a route with a polite reply: "[billing] Dear Ana, thank you for writing about the invoice. …".

The reply names the writer and the matter, and promises an answer by how much the writer is in a hurry. What belongs to
another route is mentioned in passing.
"""

import random
import re
from types import MappingProxyType

from weft_training.demo.real.task import Fields, RealTask
from weft_training.demo.real.wording import People, Wordings, mistyped
from weft_training.demo.tasks import Split

_REPLY = "[{route}] Dear {name}, thank you for writing about the {matter}. {team} will answer within {time}."
_TEAMS = MappingProxyType(
    {"billing": "Our accountants", "technical": "Our engineers", "sales": "Our advisers"},
)
_FORM = re.compile(
    r"\[(?P<route>\w+)\] Dear (?P<name>.+?), thank you for writing about the (?P<matter>.+?)\. (?P<promise>.*)"
)
_URGENT, _CALM = "one hour", "one working day"

_MATTERS = MappingProxyType(
    {
        "billing": Wordings(
            ("invoice", "direct debit", "payment reminder", "credit note", "bank transfer", "late fee", "VAT number"),
            ("receipt", "cancelled payment", "yearly statement", "card charge"),
        ),
        "technical": Wordings(
            ("login page", "mobile app", "password reset", "data export", "error message", "search box", "backup"),
            ("video player", "update", "calendar view", "upload form"),
        ),
        "sales": Wordings(
            ("team licence", "student price", "trial period", "premium plan", "volume discount", "price list", "demo"),
            ("family plan", "new edition", "training course", "gift voucher"),
        ),
    }
)
_TOLD = MappingProxyType(
    {
        "billing": Wordings(
            (
                "the {matter} shows an amount that I do not owe",
                "I do not understand the {matter} of last month",
                "the {matter} went to my old account",
                "there is a mistake in the {matter}",
                "I have paid, but the {matter} says otherwise",
            ),
            ("the figures on the {matter} do not add up", "somebody booked the {matter} twice"),
        ),
        "technical": Wordings(
            (
                "the {matter} freezes as soon as I click on it",
                "the {matter} has been broken since this morning",
                "I get nothing but a white screen from the {matter}",
                "the {matter} does not work on my tablet",
                "the {matter} keeps crashing",
            ),
            ("nothing happens when I open the {matter}", "the {matter} hangs for minutes and then gives up"),
        ),
        "sales": Wordings(
            (
                "I would like to know more about the {matter}",
                "we are ten people and think of the {matter}",
                "is the {matter} still on offer",
                "could you send me an offer for the {matter}",
                "what does the {matter} cost",
            ),
            ("who can advise us on the {matter}", "we might sign up for the {matter} if it suits us"),
        ),
    }
)
_PASSING = Wordings(
    (
        "The {matter} is fine, that is not it.",
        "Thanks for sorting out the {matter} last time.",
        "I have no question about the {matter}.",
    ),
    ("Never mind the {matter}.", "The {matter}, by contrast, was no trouble."),
)
_HURRY = Wordings(
    ("It is urgent.", "I need this today.", "Please hurry, a customer is waiting.", "Everything stands still here."),
    ("This cannot wait.", "We are losing money by the minute."),
)
_REST = Wordings(
    ("There is no rush.", "Whenever you find the time.", "Take your time.", "It is not pressing."),
    ("Any time this month will do.", "I can wait."),
)
_NAMED = Wordings(
    ("{name} here.", "This is {name}.", "My name is {name}.", "I am {name}, a customer of yours."),
    ("You are talking to {name}.", "{name} writing."),
)
_SIGNED = Wordings(("Thanks, {name}", "Regards, {name}", "Best, {name}", "{name}"), ("Yours, {name}", "Cheers, {name}"))


def _draw(rng: random.Random, people: People, split: Split) -> tuple[str, str]:
    route, name = rng.choice(list(_TEAMS)), people.first()
    matter = _MATTERS[route].draw(rng, split)
    is_urgent = rng.random() < 0.5
    told = _TOLD[route].draw(rng, split).format(matter=matter)
    parts = [told[0].upper() + told[1:] + ("?" if told.startswith(("is ", "could ", "what ", "who ")) else ".")]
    if rng.random() < 0.5:
        other = rng.choice([one for one in _TEAMS if one != route])
        parts.append(_PASSING.draw(rng, split).format(matter=_MATTERS[other].draw(rng, split)))
    if is_urgent or rng.random() < 0.6:
        parts.append((_HURRY if is_urgent else _REST).draw(rng, split))
    rng.shuffle(parts)
    body = mistyped(" ".join(parts), rng, [matter, name])
    text = (f"{_NAMED.draw(rng, split)} {body}" if rng.random() < 0.5 else f"{body} {_SIGNED.draw(rng, split)}").format(
        name=name
    )
    time = _URGENT if is_urgent else _CALM
    return text, _REPLY.format(route=route, name=name, matter=matter, team=_TEAMS[route], time=time)


def _fields(answer: str) -> Fields:
    found = _FORM.fullmatch(answer)
    return {} if found is None else found.groupdict()


TICKETS = RealTask(
    name="ticket",
    description="a message → its route and a polite reply",
    instruction=(
        "Route the customer's message and reply to it in one line of this form and nothing else: [route] Dear name, "
        "thank you for writing about the matter. Team will answer within time. The route is billing, technical or "
        "sales; the team is Our accountants, Our engineers or Our advisers in that order; the time is one hour where "
        "the writer is in a hurry, otherwise one working day."
    ),
    num_shots=3,
    draw=_draw,
    fields=_fields,
    max_new_tokens=56,
)
