"""Support mail to JSON: who writes, which order, what thing, what is wrong with it, what is wished.

The parts of a mail stand in any order between sentences that say nothing, some of them missing; numbers, names and
things that are not meant stand in it too. What is wrong and what is wished are told in other words than their labels.
"""

import json
import random
from types import MappingProxyType

from weft_training.demo.real.task import Fields, RealTask
from weft_training.demo.real.wording import People, Wordings, mistyped
from weft_training.demo.tasks import Split

_KEYS = ("name", "order", "item", "problem", "wish")

_THINGS = Wordings(
    (
        *("desk lamp", "rain jacket", "coffee grinder", "office chair", "water kettle", "bike helmet", "phone case"),
        *("garden hose", "bath towel", "yoga mat", "picture frame", "bread knife", "laptop stand", "floor rug"),
        *("hiking boots", "wall clock", "hand mixer", "bed frame", "radio alarm", "camping stove", "tea pot"),
        *("backpack", "curtain rail", "rice cooker", "skateboard", "umbrella", "mattress", "soap dispenser"),
    ),
    (
        *("electric shaver", "book shelf", "frying pan", "tennis racket", "shower curtain", "printer cable"),
        *("winter coat", "toaster", "drill set", "sleeping bag", "music keyboard", "dining table"),
    ),
)
_COLOURS = Wordings(
    ("green", "black", "blue", "large", "small", "wooden", "white", "yellow"), ("red", "grey", "steel", "second-hand")
)

_PROBLEMS = MappingProxyType(
    {
        "damaged": Wordings(
            (
                "the {item} arrived with a crack down one side",
                "when I unpacked the {item} it was already broken",
                "the {item} has a deep scratch and a dent",
                "the {item} came out of the box in two pieces",
                "the corner of the {item} is smashed",
                "the {item} is torn",
                "the {item} reached me in a sorry state, all squashed",
                "there is a hole in the {item}",
                "the {item} must have been hit on the way, it leaks",
                "the surface of the {item} is full of stains",
            ),
            (
                "somebody must have dropped the {item}, it is bent",
                "the {item} is chipped and will not stand straight",
                "the {item} fell apart in my hands",
            ),
        ),
        "late": Wordings(
            (
                "the {item} should have been here two weeks ago",
                "I am still waiting for the {item}",
                "the {item} has not turned up yet",
                "your courier promised the {item} for last Friday and nobody came",
                "there is no sign of the {item} so far",
                "the delivery of the {item} takes far too long",
                "the {item} was due on Monday and is not here",
                "a month has gone by without the {item}",
                "the tracking of the {item} has not moved for days",
                "when will the {item} come at last",
            ),
            (
                "the {item} is long overdue",
                "every day I look out for the {item}, in vain",
                "I have been expecting the {item} since the first of the month",
            ),
        ),
        "wrong item": Wordings(
            (
                "instead of the {item} you sent me something else",
                "I asked for the {item} and found another article in the parcel",
                "the box did not hold the {item} but a {other}",
                "this is not the {item} that I picked, it is a {other}",
                "you mixed up the {item} with a {other}",
                "I wanted the {item}, not a {other}",
                "I got a {other} although I had chosen the {item}",
                "what you delivered is no {item} at all",
                "the label says {item}, but inside was a {other}",
                "your warehouse took a {other} for the {item}",
            ),
            (
                "where the {item} should be I found a {other}",
                "I paid for the {item} and received a {other}",
                "a {other} came in place of the {item}",
            ),
        ),
        "incomplete": Wordings(
            (
                "the screws for the {item} are missing",
                "the {item} came without its manual",
                "half of the parts of the {item} are not in the box",
                "one piece of the {item} was left out",
                "the {item} lacks its cable",
                "there was no battery with the {item}",
                "the package of the {item} holds only one of two pieces",
                "the {item} is not complete",
                "you forgot to enclose the handle of the {item}",
                "a part that belongs to the {item} was not sent",
            ),
            (
                "I cannot find the lid that belongs to the {item}",
                "some bits of the {item} were forgotten",
                "the {item} came with two of its four legs",
            ),
        ),
        "billing": Wordings(
            (
                "I was charged twice for the {item}",
                "the invoice for the {item} shows the wrong sum",
                "my card was debited for the {item} before it shipped",
                "the discount on the {item} was not taken off",
                "you billed the {item} to my old address",
                "the bill for the {item} is wrong",
                "I paid more for the {item} than your page said",
                "you took the price of the {item} from my account two times",
                "the invoice of the {item} lacks the tax number",
                "I got a reminder for the {item} although I have paid",
            ),
            (
                "the price on the receipt for the {item} is too high",
                "I see two payments for one {item}",
                "my bank statement shows a wrong amount for the {item}",
            ),
        ),
    }
)
_WISHES = MappingProxyType(
    {
        "refund": Wordings(
            (
                "Please send my money back.",
                "I want to be paid back in full.",
                "Kindly return the sum to my card.",
                "I would like a refund.",
                "Please refund me.",
                "I ask you to pay the money back.",
                "Give me my money back, please.",
                "I would rather have the amount returned.",
            ),
            ("I expect to get back what I paid.", "Please transfer the money to me again.", "A refund would be best."),
        ),
        "replacement": Wordings(
            (
                "Please send me a new one.",
                "Could you exchange it?",
                "I would like a replacement.",
                "Kindly ship another one.",
                "I need a new one soon.",
                "Please replace it.",
                "Can I have it exchanged?",
                "I would be happy with another one.",
            ),
            ("I hope you can swap it for a new one.", "Please deliver it once more.", "I ask for an exchange."),
        ),
        "information": Wordings(
            (
                "What happens next?",
                "Could you tell me what is going on?",
                "Please let me know how this works.",
                "Can you explain this to me?",
                "Please tell me what to do.",
                "I would like to know more.",
                "Do you have any news?",
                "Please inform me.",
            ),
            ("I would be glad to hear how things stand.", "Please keep me informed.", "Can you tell me more?"),
        ),
    }
)
_GREETINGS = Wordings(
    ("Hello,", "Dear team,", "Good morning,", "Hi there,", "To whom it may concern,"),
    ("Good evening,", "Dear support,"),
)
_ORDERS = Wordings(
    (
        "My order number is {order}.",
        "It is about order {order}.",
        "The order was {order}.",
        "You will find it under {order}.",
        "Order: {order}.",
        "I ordered it as {order}.",
    ),
    ("Please look up {order}.", "Your confirmation says {order}."),
)
_IDLE = Wordings(
    (
        "I have been a customer for years.",
        "Your colleague {person} was very kind on the phone.",
        "You can reach me on {phone}.",
        "I have just moved house.",
        "The {other} that I bought in spring is fine.",
        "The parcel was left with my neighbour {person}.",
        "I wrote about this last week.",
        "My postcode is {number}.",
    ),
    (
        "I did call {phone} but nobody answered.",
        "My sister {person} shops with you as well.",
        "By the way, the {other} works well.",
        "I live at number {number} now.",
        "It was meant as a present.",
    ),
)
_CLOSINGS = Wordings(
    ("Best regards,", "Kind regards,", "Thanks,", "Yours sincerely,", "Many thanks,"), ("Cheers,", "With best wishes,")
)


def _draw(rng: random.Random, people: People, split: Split) -> tuple[str, str]:
    name, item, other = people.full(), _item(rng, split), _item(rng, split)
    order = _order(rng) if rng.random() < 0.85 else None
    problem = rng.choice(list(_PROBLEMS))
    wish = rng.choice(list(_WISHES)) if rng.random() < 0.85 else None
    told = _PROBLEMS[problem].draw(rng, split).format(item=item, other=other)
    parts = [told[0].upper() + told[1:] + ("?" if told.startswith("when will") else ".")]
    if order is not None:
        parts.append(_ORDERS.draw(rng, split).format(order=order))
    person = people.full()
    for _ in range(rng.randrange(3)):
        number, phone = rng.randrange(10, 99_999), f"0{rng.randrange(100, 999)} {rng.randrange(100_000, 999_999)}"
        idle = _IDLE.draw(rng, split).format(person=person, phone=phone, number=number, other=other)
        if idle not in parts:
            parts.append(idle)
    rng.shuffle(parts)
    if wish is not None:
        parts.insert(rng.randrange(1, len(parts) + 1), _WISHES[wish].draw(rng, split))
    body = mistyped(" ".join(parts), rng, [item, other, name, person])
    signed = f"{_CLOSINGS.draw(rng, split)}\n{name}"
    if rng.random() < 0.2:
        body, signed = f"My name is {name}. {body}", _CLOSINGS.draw(rng, split).rstrip(",") + "."
    answer = dict(zip(_KEYS, (name, order, item, problem, wish), strict=True))
    return f"{_GREETINGS.draw(rng, split)}\n{body}\n{signed}", json.dumps(answer, ensure_ascii=False)


def _item(rng: random.Random, split: Split) -> str:
    thing = _THINGS.draw(rng, split)
    return f"{_COLOURS.draw(rng, split)} {thing}" if rng.random() < 0.5 else thing


def _order(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTUVWXYZ") for _ in range(2))
    number = rng.randrange(1_000, 99_999)
    return rng.choice((f"#{number}", f"{letters}-{number}", f"{rng.randrange(2019, 2027)}/{number}"))


def _fields(answer: str) -> Fields:
    try:
        found = json.loads(answer)
    except ValueError:
        return {}
    return {str(key): json.dumps(value) for key, value in found.items()} if isinstance(found, dict) else {}


MAILS = RealTask(
    name="mail",
    description="a support mail → JSON",
    instruction=(
        "Read the customer's mail and answer with one line of JSON and nothing else. Its keys are name (who writes), "
        "order (the order number as it is written, or null), item (the thing the mail is about), problem (damaged, "
        "late, wrong item, incomplete or billing) and wish (refund, replacement, information, or null)."
    ),
    num_shots=3,
    draw=_draw,
    fields=_fields,
    max_new_tokens=80,
)
