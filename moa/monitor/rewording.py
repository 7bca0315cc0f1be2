"""A plain paraphrase by rule: link words and signs of arithmetic for others of the same meaning."""

from __future__ import annotations

import re

# said, and said otherwise; no word of the right column is one of the left, so that nothing is turned back
WORDS = {
    "so": "hence",
    "therefore": "as a result",
    "thus": "consequently",
    "because": "as",
    "since": "given that",
    "first": "to begin with",
    "next": "after that",
    "then": "afterwards",
    "finally": "in the end",
    "but": "yet",
    "however": "still",
    "also": "moreover",
    "in total": "altogether",
    "we need to": "we must",
    "we have to": "it is necessary to",
    "we get": "this gives",
    "we know that": "it is known that",
    "this means": "that is to say",
    "for example": "for instance",
    "let's": "let us",
    "equals": "makes",
}
SIGNS = {"+": "plus", "-": "minus", "*": "times", "×": "times", "/": "divided by", "=": "is"}  # between spaces
_WORD = re.compile(rf"\b({'|'.join(sorted(map(re.escape, WORDS), key=len, reverse=True))})\b", re.IGNORECASE)
_SIGN = re.compile(rf"(?<= )[{re.escape(''.join(SIGNS))}](?= )")


def reworded(text: str) -> str:
    """Return a text with its link words, and signs between spaces, in other words of the same meaning.

    It is no more than that: sentences, their order, names and numbers stay, and a text without such words stays as it
    is. A paraphrase worth the name is another model's, or a person's.
    """
    return _SIGN.sub(lambda sign: SIGNS[sign[0]], _WORD.sub(_other, text))


def _other(found: re.Match[str]) -> str:
    word = WORDS[found[0].lower()]
    return word[0].upper() + word[1:] if found[0][0].isupper() else word
