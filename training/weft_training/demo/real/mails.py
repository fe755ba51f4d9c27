"""From a support mail to JSON: sender, order, item, problem, wish.

The parts of a mail come in any order between sentences without content, and some are missing. Numbers, names and items
that are not meant occur too. Problem and wish are worded differently from their labels.
"""

import json
import random

from weft_training.demo.real.task import Fields, RealTask
from weft_training.demo.real.wording import People, Wordings, mistyped, sentence, worded
from weft_training.demo.tasks import Split

_KEYS = ("name", "order", "item", "problem", "wish")

_THINGS = worded(
    *("desk lamp", "rain jacket", "coffee grinder", "office chair", "water kettle", "bike helmet", "phone case"),
    *("garden hose", "bath towel", "yoga mat", "picture frame", "bread knife", "laptop stand", "floor rug"),
    *("hiking boots", "wall clock", "hand mixer", "bed frame", "radio alarm", "camping stove", "tea pot"),
    *("backpack", "curtain rail", "rice cooker", "skateboard", "umbrella", "mattress", "soap dispenser"),
    *("guitar strap", "ironing board", "pillow", "cutting board", "snow shovel", "travel bag", "night light"),
    *("plant pot", "table fan", "rowing machine", "sofa cover", "hair dryer", "tool box", "bar stool"),
    test=(
        *("electric shaver", "book shelf", "frying pan", "tennis racket", "shower curtain", "printer cable"),
        *("winter coat", "toaster", "drill set", "sleeping bag", "music keyboard", "dining table"),
    ),
)
_COLOURS = Wordings(
    ("green", "black", "blue", "large", "small", "wooden", "white", "yellow", "orange", "folding", "round", "cheap"),
    ("red", "grey", "steel", "second-hand"),
)

_PROBLEMS = {
    "damaged": worded(
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
        "the {item} shows dents all over",
        "the glass of the {item} is shattered",
        "one side of my {item} is completely crushed",
        "the {item} I got is cracked",
        "I found the {item} broken in its box",
        "the {item} was delivered with a big tear in it",
        "the paint has come off the {item} already",
        "the {item} is ruined, water got into the parcel",
        "my new {item} has a broken handle",
        "the {item} snapped the first time I used it",
        "the {item} does not hold together",
        "the {item} is scratched all over",
        "parts of the {item} are burst",
        "the {item} is twisted out of shape",
        test=(
            "somebody must have dropped the {item}, it is bent",
            "the {item} is chipped and will not stand straight",
            "the {item} fell apart in my hands",
        ),
    ),
    "late": worded(
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
        "two weeks have passed and the {item} is still not here",
        "the {item} was to come yesterday",
        "I have waited ten days for the {item} now",
        "nobody has brought the {item} yet",
        "the {item} seems to be stuck somewhere on its way",
        "the day on which you promised the {item} is over",
        "my {item} has still not arrived",
        "how much longer do I have to wait for the {item}",
        "the parcel with the {item} never reached me",
        "you said three days for the {item}, it has been twelve",
        "it is the third week and I have no {item}",
        "the {item} is delayed again",
        "the van with the {item} did not come",
        "I needed the {item} for last weekend and it did not come in time",
        test=(
            "the {item} is long overdue",
            "every day I look out for the {item}, in vain",
            "I have been expecting the {item} since the first of the month",
        ),
    ),
    "wrong item": worded(
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
        "I opened the parcel of the {item} and saw a {other}",
        "this {other} is not what I ordered, I ordered the {item}",
        "you have delivered a {other}, my order says {item}",
        "I expected the {item} and got a {other}",
        "somebody packed a {other} although I bought the {item}",
        "the thing in the box is a {other} and not the {item}",
        "I never ordered a {other}, I ordered the {item}",
        "it seems you confused the {item} with a {other}",
        "you shipped a {other} to me, yet I need the {item}",
        "the {item} on my order turned out to be a {other}",
        "another customer must have my {item}, for I hold a {other}",
        "what came is not the {item} but some other product",
        "the wrong article arrived, I had ordered the {item}",
        "the {item} that I ordered was swapped with a {other}",
        test=(
            "where the {item} should be I found a {other}",
            "I paid for the {item} and received a {other}",
            "a {other} came in place of the {item}",
        ),
    ),
    "incomplete": worded(
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
        "the {item} was sent without its plug",
        "two screws of the {item} are not there",
        "there is no lid for the {item} in the parcel",
        "I miss the charger of the {item}",
        "the set for the {item} should have six parts and has five",
        "the {item} arrived, but its bag did not",
        "the box of the {item} holds no instructions",
        "some parts of my {item} are missing",
        "only the lower half of the {item} was in the parcel",
        "the bolts that hold the {item} together were not packed",
        "the spare part of the {item} was not included",
        "not all pieces of the {item} have come",
        "the {item} has no feet, they were not in the box",
        "something is missing from the {item}",
        test=(
            "I cannot find the lid that belongs to the {item}",
            "some bits of the {item} were forgotten",
            "the {item} came with two of its four legs",
        ),
    ),
    "billing": worded(
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
        "the bill says two of the {item}, I ordered one",
        "your invoice asks twice the price of the {item}",
        "the amount you took for the {item} is not the one agreed",
        "my voucher was not counted when I paid for the {item}",
        "I still see an open sum for the {item}, which I paid long ago",
        "why do I pay shipping for the {item} when it was free",
        "I have got no invoice for the {item}",
        "the receipt of the {item} is made out to somebody else",
        "you charged a fee on the {item} that nobody told me of",
        "my account was debited again for the {item}",
        "the tax on the invoice of the {item} is wrong",
        "the {item} was cheaper when I ordered it than on the bill",
        "I was billed for the {item} in dollars instead of euros",
        "the {item} stands on my credit card statement twice",
        test=(
            "the price on the receipt for the {item} is too high",
            "I see two payments for one {item}",
            "my bank statement shows a wrong amount for the {item}",
        ),
    ),
}
_WISHES = {
    "refund": worded(
        "Please send my money back.",
        "I want to be paid back in full.",
        "Kindly return the sum to my card.",
        "I would like a refund.",
        "Please refund me.",
        "I ask you to pay the money back.",
        "Give me my money back, please.",
        "I would rather have the amount returned.",
        "I want my money back.",
        "Please return what I have paid.",
        "Reimburse me, please.",
        "I insist on a refund.",
        "Please pay the price back to my account.",
        "I no longer want it, so return the money.",
        "Please credit the full price to my card.",
        "Can you give me back the money?",
        "I would be grateful for a refund.",
        "Please cancel the purchase and pay me back.",
        test=("I expect to get back what I paid.", "Please transfer the money to me again.", "A refund would be best."),
    ),
    "replacement": worded(
        "Please send me a new one.",
        "Could you exchange it?",
        "I would like a replacement.",
        "Kindly ship another one.",
        "I need a new one soon.",
        "Please replace it.",
        "Can I have it exchanged?",
        "I would be happy with another one.",
        "Please ship a new one as soon as possible.",
        "Kindly exchange it.",
        "I want a new one in its place.",
        "Could I get another one?",
        "Send a replacement, please.",
        "Please arrange for an exchange.",
        "I would like you to replace it.",
        "Could you post the right one to me?",
        "I still need it, so please send another.",
        "A new one would make me happy.",
        test=("I hope you can swap it for a new one.", "Please deliver it once more.", "I ask for an exchange."),
    ),
    "information": worded(
        "What happens next?",
        "Could you tell me what is going on?",
        "Please let me know how this works.",
        "Can you explain this to me?",
        "Please tell me what to do.",
        "I would like to know more.",
        "Do you have any news?",
        "Please inform me.",
        "How can this be?",
        "What should I do now?",
        "Could you look into it and write back?",
        "Please explain.",
        "I would like an answer to this.",
        "Who can tell me what happened?",
        "Please tell me where things are.",
        "Could you give me some details?",
        "I have no idea what to do, please advise.",
        "Let me know what you find out.",
        test=("I would be glad to hear how things stand.", "Please keep me informed.", "Can you tell me more?"),
    ),
}
_GREETINGS = Wordings(
    ("Hello,", "Dear team,", "Good morning,", "Hi there,", "To whom it may concern,"),
    ("Good evening,", "Dear support,"),
)
_ORDERS = worded(
    "My order number is {order}.",
    "It is about order {order}.",
    "The order was {order}.",
    "You will find it under {order}.",
    "Order: {order}.",
    "I ordered it as {order}.",
    "That was order {order}.",
    "{order} is what the order is called.",
    "The number of my order: {order}.",
    "I refer to {order}.",
    "See order {order}.",
    "In your system it should be {order}.",
    "My confirmation mail speaks of {order}.",
    "Ref. {order}.",
    test=("Please look up {order}.", "Your confirmation says {order}."),
)
_IDLE = worded(
    "I have been a customer for years.",
    "Your colleague {person} was very kind on the phone.",
    "You can reach me on {phone}.",
    "I have just moved house.",
    "The {other} that I bought in spring is fine.",
    "The parcel was left with my neighbour {person}.",
    "I wrote about this last week.",
    "My postcode is {number}.",
    "I am at home in the mornings.",
    "{person} recommended your shop to me.",
    "The {other} came without any trouble.",
    "My husband {person} was there when the parcel came.",
    "My customer number is {number}.",
    "I can be called at {phone} after six.",
    "We bought a {other} from you as well.",
    "I spoke to {person} in your shop.",
    "My flat is number {number}.",
    "It is for my daughter {person}.",
    test=(
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
    name, item = people.full(), _item(rng, split)
    other = next(drawn for drawn in iter(lambda: _item(rng, split), None) if drawn.split()[-1] != item.split()[-1])
    order = _order(rng) if rng.random() < 0.85 else None
    problem = rng.choice(list(_PROBLEMS))
    wish = rng.choice(list(_WISHES)) if rng.random() < 0.85 else None
    parts = [sentence(_PROBLEMS[problem].draw(rng, split).format(item=item, other=other))]
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
