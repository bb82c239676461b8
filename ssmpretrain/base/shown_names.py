"""Names of files and samples, which others chose, made safe to print on a terminal."""


def shown(text: str) -> str:
    """Return a text with control characters spelled out: an escape as \\x1b, a byte that is not UTF-8 as \\xff."""
    return text if text.isprintable() else "".join(map(_shown, text))


def shown_lines(text: str) -> str:
    """Return a text as `shown` does, but keep its lines."""
    return "\n".join(map(shown, text.split("\n")))


def _shown(letter: str) -> str:
    if letter.isprintable():
        return letter
    if "\udc80" <= letter <= "\udcff":  # how Python holds such a byte
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")
