"""Names of files and samples, made safe to print on a terminal."""


def shown(text: str) -> str:
    """Return a text with escaped control characters, such as \\x1b, and escaped bytes that are not UTF-8, as \\xff."""
    return text if text.isprintable() else "".join(map(_shown, text))


def shown_lines(text: str) -> str:
    """Return a text as `shown` does, but keep its lines."""
    return "\n".join(map(shown, text.split("\n")))


def _shown(letter: str) -> str:
    if letter.isprintable():
        return letter
    if "\udc80" <= letter <= "\udcff":  # a byte that is not UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")
