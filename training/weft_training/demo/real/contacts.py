"""From a line that mentions an address to its mailbox form: `Ana Ruiz <ana@example.org>` (RFC 5322, section 3.4).

The demo trains this task live; no committed adapter covers it.
"""

import random
import re
import unicodedata

from weft_training.demo.real.task import Fields, RealTask
from weft_training.demo.real.wording import People, Wordings, worded
from weft_training.demo.tasks import Split

_LINES = worded(
    "{name} here, write to me at {address}.",
    "You can reach {name} under {address}.",
    "Please add {address}, that is {name}.",
    "My address is {address}. Yours, {name}",
    "{name} asked for a copy to {address}.",
    "Send it to {address}, for the attention of {name}.",
    "Hello from {name}. My mail is {address}.",
    "Please write to {name}, {address}.",
    "This is {name}; {address} works best.",
    "{address} belongs to {name}.",
    "Regards, {name} ({address})",
    "From now on {name} uses {address}.",
    "Write to {address} if you look for {name}.",
    "{name} has a new address, {address}.",
    "The invoice goes to {name} at {address}.",
    "I am {name}, and {address} is where I read my mail.",
    "Copy {name} in, please: {address}",
    "For questions ask {name} ({address}).",
    "The contact is {name}, mail {address}.",
    "You find me, {name}, at {address} on weekdays.",
    test=("Could you note {address} for {name}?", "Greetings from {name}, who now reads {address}."),
)
_DOMAINS = Wordings(
    ("example.org", "mail.example.com", "office.example.net", "shop.example"),
    ("post.example.org", "team.example.com", "lab.example"),
)


def _draw(rng: random.Random, people: People, split: Split) -> tuple[str, str]:
    first, last = people.first(), people.last()
    local = rng.choice(("{f}.{l}", "{f}", "{l}", "{f}{n}", "{l}.{f}")).format(
        f=_ascii(first), l=_ascii(last), n=rng.randrange(10, 99)
    )
    address = f"{local}@{_DOMAINS.draw(rng, split)}"
    name = f"{first} {last}"
    return _LINES.draw(rng, split).format(name=name, address=address), f"{name} <{address}>"


def _ascii(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z]", "", plain) or "mail"


def _fields(answer: str) -> Fields:
    found = re.fullmatch(r"(?P<name>.+) <(?P<address>\S+@\S+)>", answer)
    return {} if found is None else found.groupdict()


CONTACTS = RealTask(
    name="contact",
    description="a line with an address → Name <address>",
    instruction="Answer with the person and the address in the text, as Name <address>, and nothing else.",
    num_shots=3,
    draw=_draw,
    fields=_fields,
    max_new_tokens=48,
)
