"""From a message to a route with a polite reply: "[billing] Dear Ana, thank you for writing about the invoice. …".

The reply names the writer and the matter, and promises an answer within a time that depends on the writer's urgency. A
matter of another route may be mentioned in passing.
"""

import random
import re

from weft_training.demo.real.task import Fields, RealTask
from weft_training.demo.real.wording import People, Wordings, mistyped, sentence, worded
from weft_training.demo.tasks import Split

_REPLY = "[{route}] Dear {name}, thank you for writing about the {matter}. {team} will answer within {time}."
_TEAMS = {"billing": "Our accountants", "technical": "Our engineers", "sales": "Our advisers"}
_FORM = re.compile(
    r"\[(?P<route>\w+)\] Dear (?P<name>.+?), thank you for writing about the (?P<matter>.+?)\. (?P<promise>.*)"
)
_URGENT, _CALM = "one hour", "one working day"

_MATTERS = {
    "billing": worded(
        *("invoice", "direct debit", "payment reminder", "credit note", "bank transfer", "late fee"),
        *("VAT number", "account balance", "monthly bill", "instalment", "refund", "payment"),
        *("deposit", "final invoice", "tax receipt", "payment plan", "bank fee", "price adjustment"),
        test=("receipt", "cancelled payment", "yearly bill", "card charge"),
    ),
    "technical": worded(
        *("login page", "mobile app", "password reset", "data export", "error message", "search box", "backup"),
        *("web page", "software", "microphone", "sync", "download", "printer", "contact form", "camera"),
        *("dashboard", "notification", "installer", "chat window", "language setting"),
        test=("video player", "update", "calendar view", "upload form"),
    ),
    "sales": worded(
        *("team licence", "student price", "trial period", "premium plan", "volume discount", "price list"),
        *("demo", "starter kit", "annual plan", "special offer", "brochure", "bundle", "business package"),
        *("reseller contract", "new model", "upgrade", "catalogue", "consultation"),
        test=("family plan", "new edition", "training course", "gift voucher"),
    ),
}
_CLAIMS = {
    "billing": worded(
        "the {matter} shows an amount that I do not owe",
        "I do not understand the {matter} of last month",
        "the {matter} went to my old account",
        "there is a mistake in the {matter}",
        "I have paid, but the {matter} says otherwise",
        "the {matter} is too high",
        "the sum on the {matter} is wrong",
        "I was charged twice, see the {matter}",
        "my bank refused the {matter}",
        "the {matter} has the wrong address on it",
        "I cannot make sense of the {matter}",
        "please check the {matter}, I think I paid already",
        "the {matter} came twice this month",
        "the tax on the {matter} is missing",
        "why is the {matter} higher than agreed",
        "I never got the money of the {matter}",
        "my card was debited for the {matter} again",
        "the {matter} does not match my contract",
        "I would like to pay the {matter} in two parts",
        "the {matter} is still open although I sent the money",
        "you took fifty euros too much with the {matter}",
        "our accounts department has a question on the {matter}",
        "the {matter} is made out to the wrong company",
        "the date on the {matter} is wrong",
        test=(
            "the amount of the {matter} cannot be right",
            "somebody booked the {matter} twice",
            "I paid too much with the {matter}",
        ),
    ),
    "technical": worded(
        "the {matter} freezes as soon as I click on it",
        "the {matter} has been broken since this morning",
        "I get nothing but a white screen from the {matter}",
        "the {matter} does not work on my tablet",
        "the {matter} keeps crashing",
        "the {matter} is very slow",
        "I cannot open the {matter}",
        "the {matter} fails with code 500",
        "the {matter} stopped working",
        "after a click the {matter} goes dark",
        "since the weekend the {matter} throws an error",
        "the {matter} will not load",
        "the {matter} closes by itself",
        "my screen stays empty when I use the {matter}",
        "the {matter} is down",
        "I get an error from the {matter}",
        "the {matter} takes ages to open",
        "the {matter} loses everything that I type",
        "there is a bug in the {matter}",
        "the {matter} shows a blank page",
        "the {matter} does not start on my phone",
        "something is broken with the {matter}",
        "the {matter} kicks me out every few minutes",
        "why does the {matter} not work in my browser",
        test=(
            "nothing happens when I start the {matter}",
            "the {matter} hangs for minutes",
            "the {matter} does not respond any more",
        ),
    ),
    "sales": worded(
        "I would like to know more about the {matter}",
        "we are ten people and think of the {matter}",
        "is the {matter} still on offer",
        "could you send me an offer for the {matter}",
        "what does the {matter} cost",
        "I want to buy the {matter}",
        "we are interested in the {matter}",
        "who can tell us about the {matter}",
        "can I order the {matter} here",
        "what do I get with the {matter}",
        "we would like to sign up for the {matter}",
        "which {matter} would suit a small firm",
        "please tell me more about the {matter}",
        "is there a {matter} for schools",
        "my boss asks what the {matter} includes",
        "how much is the {matter} for five people",
        "I am thinking of buying the {matter}",
        "how do I order the {matter}",
        "can we try the {matter} before we buy",
        "I saw the {matter} on your page and would like to have it",
        "we want to switch to the {matter}",
        "what is the difference between the {matter} and what I have now",
        "do you offer the {matter} in my country",
        "please make us an offer for the {matter}",
        test=(
            "could somebody advise us on the {matter}",
            "we might order the {matter} if it suits us",
            "please send me prices for the {matter}",
        ),
    ),
}
_PASSING = worded(
    "The {matter} is fine, that is not it.",
    "Thanks for sorting out the {matter} last time.",
    "I have no question about the {matter}.",
    "It is not about the {matter}.",
    "The {matter} has been settled.",
    "The {matter} works for me, by the way.",
    "Forget about the {matter}.",
    "I already wrote about the {matter}, that is done.",
    "I am happy with the {matter}.",
    "My mail has nothing to do with the {matter}.",
    "The {matter} can stay as it is.",
    "You helped me with the {matter} in May, thank you.",
    test=("Never mind the {matter}.", "The {matter} is all right.", "This is not about the {matter}."),
)
_HURRY = worded(
    *("It is urgent.", "I need this today.", "Please hurry, a customer is waiting."),
    "Everything stands still here.",
    *("As soon as you can, please.", "I need an answer now.", "This is an emergency.", "Quickly, please."),
    *("Time is short.", "I am waiting for it now.", "Please be quick.", "It has to be today.", "Asap, please."),
    *("We lose money every minute.", "Very urgent!", "Please call me within minutes.", "I have no time to lose."),
    test=("This cannot wait.", "Please answer at once.", "I need help right now."),
)
_REST = worded(
    *("There is no rush.", "Whenever you find the time.", "Take your time.", "It is not pressing."),
    *("Next week is fine.", "No hurry.", "It is not urgent.", "Some time this month will do."),
    *("Do not rush.", "It has time.", "Tomorrow or later is fine.", "No need to hurry.", "When you get to it."),
    *("It can lie for a while.", "I am in no hurry.", "Not urgent at all.", "Answer when it suits you."),
    test=("Any day will do.", "I can wait.", "There is plenty of time."),
)
_NAMED = worded(
    *("{name} here.", "This is {name}.", "My name is {name}.", "I am {name}, a customer of yours."),
    *("I'm {name}.", "Hello from {name}.", "{name} is my name.", "Hi, {name} speaking."),
    test=("You are talking to {name}.", "{name} writing."),
)
_SIGNED = Wordings(
    ("Thanks, {name}", "Regards, {name}", "Best, {name}", "{name}", "Thank you! {name}", "Sincerely, {name}"),
    ("Yours, {name}", "Cheers, {name}"),
)


def _draw(rng: random.Random, people: People, split: Split) -> tuple[str, str]:
    route, name = rng.choice(list(_TEAMS)), people.first()
    matter = _MATTERS[route].draw(rng, split)
    is_urgent = rng.random() < 0.5
    parts = [sentence(_CLAIMS[route].draw(rng, split).format(matter=matter))]
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
