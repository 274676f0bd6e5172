"""Read a caption, or a user's own prompt, into its meaning.

    caption    = [opener] [backdrop] [opener] item { ("," | "and" | ", and") item } [ [","] backing ]
    backing    = "on a" BACKGROUND "background"
    opener     = "an image of" | "a picture of" | "there is" | "there are"
    backdrop   = backing "," | "a" BACKGROUND "background with"
    item       = subject [ "with" subject relation "it" | relation subject { "and" relation subject } ]
    subject    = things [place]
    things     = ("a" | "an" | "the" | NUMBER) [SIZE] [COLOUR] NOUN
    place      = ("in" | "at" | "on") "the" POSITION
    relation   = ["to the"] ("above" | "below" | "left of" | "right of")

A NUMBER takes no place, since a cell holds one object.
"a red circle above a blue square and left of a green ring" gives both relations to the circle: after "and", a relation
goes on with the subject of the last one.
"""

import re

from .meaning import RELATIONS, Described, Meaning, Relation
from .scene import BACKGROUNDS, COLORS, MAX_OBJECTS, POSITIONS
from .words import NOUNS, NUMBERS, PLURALS, SIZE_WORDS, VOCABULARY

_OPENERS = (("an", "image", "of"), ("a", "picture", "of"), ("there", "is"), ("there", "are"))
# Spellings and synonyms a person may type; captions never use them, so they are no words of the vocabulary.
_SPELLINGS = {"grey": "gray", "centre": "center", "little": "small"}
_END = ""


def parse_caption(text: str) -> Meaning:
    """The meaning of a caption or of a prompt in the same language; capitals and a final period do not matter.

    Raises:
        ValueError: names the word that cannot be read, or says that the text is empty or asks for too many objects.
    """
    words = re.findall(r"[^\s,]+|,", text.lower())
    if words and words[-1].endswith("."):
        words[-1] = words[-1][:-1]
    words = [_SPELLINGS.get(word, word) for word in words if word]
    if not words:
        raise ValueError('`text` is empty. Say what to show, e.g. "a small red circle above a large blue square".')
    for word in words:
        if word != "," and word not in VOCABULARY:
            raise ValueError(f"Cannot read the word {word!r} in {text!r}. The words are: {', '.join(VOCABULARY)}.")
    return _Reader(text, words).caption()


class _Reader:
    """One pass over the words with a few words of look-ahead; every method reads one rule of the grammar above."""

    def __init__(self, text: str, words: list[str]):
        self.text, self.words, self.at = text, words, 0
        self.objects: list[Described] = []
        self.relations: list[Relation] = []
        self.background: str | None = None

    def caption(self) -> Meaning:
        self.opener()
        if self.peek("on", "a") or (self.word(1) in BACKGROUNDS and self.word(2) == "background"):
            self.backdrop()
            self.opener()
        self.item()
        while self.word() != _END:
            comma = self.accept(",")
            if self.peek("on", "a"):
                self.suffix()
            elif self.accept("and") or comma:
                self.item()
            else:
                self.fail()
        if len(self.objects) > MAX_OBJECTS:
            raise ValueError(
                f"{self.text!r} asks for {len(self.objects)} objects; a scene holds at most {MAX_OBJECTS}."
            )
        return Meaning(tuple(self.objects), tuple(self.relations), self.background)

    def opener(self) -> None:
        for opener in _OPENERS:
            if self.accept(*opener):
                return

    def backdrop(self) -> None:
        if self.accept("on"):
            self.background_name()
            self.expect(",")
        else:
            self.background_name()
            self.expect("with")

    def suffix(self) -> None:
        if self.background is not None:
            self.fail()
        self.expect("on")
        self.background_name()
        if self.word() != _END:
            self.fail()

    def background_name(self) -> None:
        if not self.accept("an"):
            self.expect("a")
        self.background = self.one_of(BACKGROUNDS)
        self.expect("background")

    def item(self) -> None:
        subject = self.things()
        if self.accept("with"):
            other = self.things()
            name = self.relation()
            self.expect("it")
            self.relate(other, name, subject)
        elif self.relation_ahead():
            self.relate(subject, self.relation(), self.things())
            while self.word() == "and" and self.relation_ahead(1):
                self.expect("and")
                self.relate(subject, self.relation(), self.things())

    def relate(self, subject: range, name: str, other: range) -> None:
        # "two circles above a square": each of them is.
        self.relations.extend(Relation(s, name, o) for s in subject for o in other)

    def things(self) -> range:
        """Reads one noun phrase with its place; returns the indices of the objects it stands for."""
        number = 1
        if self.word() in NUMBERS[1:]:
            number = NUMBERS.index(self.word())
            self.at += 1
        elif not (self.accept("a") or self.accept("an") or self.accept("the")):
            self.fail()
        size = SIZE_WORDS[self.one_of(SIZE_WORDS)] if self.word() in SIZE_WORDS else None
        color = self.one_of(COLORS) if self.word() in COLORS else None
        noun = self.one_of(NOUNS) if number == 1 else PLURALS[self.one_of(PLURALS)]
        position = self.place()
        if number > 1 and position is not None:
            self.at -= 1
            self.fail()  # a cell holds one object
        first = len(self.objects)
        self.objects.extend([Described(NOUNS[noun], color, size, position)] * number)
        return range(first, first + number)

    def place(self) -> str | None:
        if self.word() not in ("in", "at", "on") or self.word(1) != "the":
            return None
        self.at += 2
        if self.accept("middle"):
            return "center"
        for length in (2, 1):
            name = " ".join(self.word(i) for i in range(length))
            if name in POSITIONS:
                self.at += length
                return name
        return self.fail()

    def relation_ahead(self, skip: int = 0) -> bool:
        return self.word(skip) in ("above", "below", "left", "right", "to")

    def relation(self) -> str:
        if self.accept("to"):
            self.expect("the")
            if self.word() not in ("left", "right"):
                self.fail()
        name = self.word()
        if name in ("left", "right") and self.word(1) == "of":
            name += " of"
        if name not in RELATIONS:
            self.fail()
        self.at += len(name.split())
        return name

    def word(self, ahead: int = 0) -> str:
        return self.words[self.at + ahead] if self.at + ahead < len(self.words) else _END

    def peek(self, *words: str) -> bool:
        return all(self.word(i) == word for i, word in enumerate(words))

    def accept(self, *words: str) -> bool:
        if self.peek(*words):
            self.at += len(words)
            return True
        return False

    def expect(self, word: str) -> None:
        if not self.accept(word):
            self.fail()

    def one_of(self, allowed) -> str:
        if self.word() not in allowed:
            self.fail()
        self.at += 1
        return self.words[self.at - 1]

    def fail(self):
        where = (
            f"the word {self.word()!r} (word {self.at + 1})" if self.word() != _END else "on: the text ends too early"
        )
        raise ValueError(
            f"Cannot read {where} in {self.text!r}. "
            'Write like "a small red circle above a large blue square on a white background".'
        )
