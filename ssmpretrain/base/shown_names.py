"""Names that others gave to files and samples, as a terminal may show them."""


def shown(text: str) -> str:
    """Spell what a terminal would obey or cannot show: an escape as \\x1b, a byte that is not UTF-8 as \\xff."""
    return text if text.isprintable() else "".join(map(_shown, text))


def shown_lines(text: str) -> str:
    """`shown`, but lines stay lines."""
    return "\n".join(map(shown, text.split("\n")))


def _shown(letter: str) -> str:
    if letter.isprintable():
        return letter
    if "\udc80" <= letter <= "\udcff":  # how Python holds such a byte
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")
