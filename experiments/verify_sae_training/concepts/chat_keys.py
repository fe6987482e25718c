"""Keys of chat servers, kept out of everything that a server says, however it writes them."""
import html
import re
import urllib.parse
from typing import Any


class Secret:
    """A key, and how it is taken out of what a server says."""

    def __init__(self, key: str):
        self._key = key
        # A short key may be part of an ordinary word: there it counts only where it stands by itself.
        whole = re.escape(key)
        self._found = re.compile(whole if len(key) >= 8 else rf"(?<![^\W_]){whole}(?![^\W_])") if key else None

    def __repr__(self) -> str:
        return "Secret()"

    def removed(self, value: Any) -> Any:
        """A text, or a value of JSON with all its texts, without the key, be it written with escapes or not, and
        without halves of characters, which no file can hold."""
        if isinstance(value, dict):
            return {self.removed(name): self.removed(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self.removed(inner) for inner in value]
        return self._without(_whole(value)) if isinstance(value, str) else value

    def _without(self, text: str) -> str:
        if self._found is None:
            return text
        for _ in range(3):  # escapes within escapes
            text = self._found.sub("[key]", text)
            for unescaped in (urllib.parse.unquote(text), html.unescape(text), _unescaped(text)):
                if self._found.search(unescaped):
                    text = self._found.sub("[key]", unescaped)
        return text

    def quoted(self, text: str) -> str:
        """What is said of a server's words in a message: one line of them, nothing if a short key may be in it."""
        clean = " ".join(self.removed(text).split())[:200]
        return "(an answer that repeats the key)" if self._key and self._key in clean else clean


def _whole(text: str) -> str:
    """A text with halves of surrogate pairs joined where both are there, else replaced."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _unescaped(text: str) -> str:
    return _whole(re.sub(r"\\+u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), text))
