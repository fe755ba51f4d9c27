"""English numerals: `words(206)` is "two hundred and six", `ordinal(21)` is "twenty-first"."""

_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
    "twenty": "twentieth",
    "thirty": "thirtieth",
}


def words(number: int) -> str:
    """Return a number from 0 to 999,999 in words, as in British English."""
    if number < 20:
        return _SMALL[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_SMALL[number % 10]}" if number % 10 else "")
    if number < 1_000:
        rest = number % 100
        return f"{_SMALL[number // 100]} hundred" + (f" and {words(rest)}" if rest else "")
    rest = number % 1_000
    joint = " and " if 0 < rest < 100 else " " if rest else ""
    return f"{words(number // 1_000)} thousand{joint}{words(rest) if rest else ''}"


def ordinal(number: int) -> str:
    """Return a day of the month as a word: "twenty-first"."""
    head, _, last = words(number).rpartition("-")
    return (f"{head}-" if head else "") + _ORDINALS.get(last, f"{last}th")


def short_ordinal(number: int) -> str:
    """Return a day of the month in digits: "21st"."""
    ending = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def year(number: int) -> str:
    """Return a year as it is spoken: "nineteen ninety-eight", "two thousand and nine", "twenty twenty-four"."""
    century, rest = divmod(number, 100)
    if number // 1_000 * 1_000 <= number < number // 1_000 * 1_000 + 10:
        return words(number)
    if rest == 0:
        return f"{words(century)} hundred"
    return f"{words(century)} {'oh-' if rest < 10 else ''}{words(rest)}"
