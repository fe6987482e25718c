"""Reads grammar.py: from rules and word lists to one story, with the concept of every word."""
import random
import re

import grammar

LEAVES = list(grammar.CONCEPTS)
FORMS = {leaf: [word.strip("*").split("/") for word in words.split()] for leaf, words in grammar.CONCEPTS.items()}
DRAWN = {leaf: [word.split("/") for word in words.split() if word[0] != "*"] for leaf, words in grammar.CONCEPTS.items()}
SENSES: dict[str, list[str]] = {}
for _leaf, _words in FORMS.items():
    for _form in {form.lower() for forms in _words for form in forms}:
        SENSES.setdefault(_form, []).append(_leaf)
AMBIGUOUS = {word for word, leaves in SENSES.items() if len(leaves) > 1} | set(grammar.PLAIN_SENSES)
PIECE = re.compile(r"<(\w+)>|\[(\w+)(?:\.(\w+))?\]|\{(\w+)\}|([A-Za-z]+)(?:@(\w+))?|([^A-Za-z<\[{]+)")
FORM_NUMBER = {"": 0, "s": 1, "v": 1, "ing": 2}
PRONOUNS = {"girl": {"he": "she", "him": "her", "his": "her"}, "boy": {"he": "he", "him": "him", "his": "his"}}
ONCE = ("middle", "feel")  # rules that don't give one story the same sentence twice
Piece = tuple[str, str | None]  # text, leaf


def below(node: str) -> list[str]:
    """The leaves under a node of the tree, named by the last part of its path."""
    return [leaf for leaf in LEAVES if node in leaf.split("/")]


def draw(rng: random.Random, node: str, form: str = "") -> Piece:
    """A random word of a random leaf under `node`, in the wanted form where the word has it."""
    leaf = rng.choice(below(node))
    forms = rng.choice(DRAWN[leaf])
    return forms[min(FORM_NUMBER[form], len(forms) - 1)], leaf


def literal(word: str, tag: str | None) -> Piece:
    """A word written out in a sentence, with its leaf; ValueError if it has two senses and no tag."""
    if tag == "none":
        return word, None
    senses = SENSES.get(word.lower(), [])
    if tag:
        senses = [leaf for leaf in senses if leaf.split("/")[-1] == tag]
    elif word.lower() in AMBIGUOUS:
        raise ValueError(f"grammar: {word!r} needs a sense, one of {senses} or none")
    if tag and not senses:
        raise ValueError(f"grammar: {word!r} has no sense {tag}")
    return word, senses[0] if senses else None


def new_story(rng: random.Random, topic: int) -> dict:
    """The people and things of one story."""
    gender = rng.choice(["girl", "boy"])
    pet = rng.choice(["dog", "cat", "rabbit"] * 2 + ["farm", "bird", "wild"])
    return {
        "rng": rng, "told": set(), "topic": topic, "gender": gender, "met": False, "pet": pet,
        "pet_word": None if pet in below_pet() else rng.choice(FORMS["animal/" + pet]),
        "hero": draw(rng, gender), "friend": draw(rng, "boy" if gender == "girl" else "girl"),
        "item": draw(rng, rng.choice(["toy", "tool", "clothes", "jewel", "lamp", "container"])),
        "food": draw(rng, rng.choice(["fruit", "vegetable", "pastry", "dish"]), "s"),
        "place": draw(rng, rng.choice(["outdoor", "water", "town"])),
    }


def below_pet() -> list[str]:
    """The animals whose words mean the same: any of them may stand for the story's animal at each mention."""
    return [leaf.split("/")[-1] for leaf in below("pet")]


def person_or_thing(name: str, story: dict) -> list[Piece]:
    """What {hero}, {S}, {him}, {pet} ... stand for in this story."""
    rng, pronoun = story["rng"], "pronoun/female" if story["gender"] == "girl" else "pronoun/male"
    if name == "S":
        name = rng.choice(["hero", "hero", "he", "he", "he"])
    if name in ("he", "him", "his"):
        return [(PRONOUNS[story["gender"]][name], pronoun)]
    if name in ("pet", "pets"):
        forms = story["pet_word"] or rng.choice(FORMS["animal/pet/" + story["pet"]])
        leaf = ("animal/" if story["pet_word"] else "animal/pet/") + story["pet"]
        return [(forms[name == "pets"], leaf)]
    if name == "friend" and not story["met"]:
        story["met"] = True
        if rng.random() < 0.5:
            return [(PRONOUNS[story["gender"]]["his"], pronoun), (" ", None), ("friend", None), (" ", None), story["friend"]]
    return [story[name]]


def expand(template: str, story: dict, mood: int) -> list[Piece]:
    """Replace rules, slots and people in a sentence until only words are left."""
    rng, pieces = story["rng"], []
    for rule, node, form, name, word, tag, other in PIECE.findall(template):
        if rule in ("plus", "minus", "feeling"):
            good = rng.randrange(2) if rule == "feeling" else mood == (rule == "plus")
            pieces.append(draw(rng, "good" if good else rng.choice(["sad", "sad", "afraid", "angry"])))
        elif rule in ("plus_show", "minus_show"):
            pieces.append(draw(rng, "smile" if mood == (rule == "plus_show") else "cry", "" if rule == "plus_show" else "v"))
        elif rule:
            fresh = [choice for choice in grammar.RULES[rule] if choice not in story["told"]] or grammar.RULES[rule]
            choice = rng.choice(fresh)
            if rule in ONCE:
                story["told"].add(choice)
            pieces += expand(choice, story, mood)
        elif node:
            pieces.append(draw(rng, node, form))
        elif name:
            pieces += person_or_thing(name, story)
        elif word:
            pieces.append(literal(word, tag))
        else:
            pieces.append((other, None))
    return pieces


def sentences(story: dict, mood: int, same_mood_frac: float, other_topic_frac: float) -> list[list[Piece]]:
    """The sentences of one story that ends in `mood`.

    same_mood_frac: chance that it began in that mood; other_topic_frac: chance of one sentence of another topic.
    """
    rng, topic = story["rng"], story["topic"]
    first = mood if rng.random() < same_mood_frac else 1 - mood
    stranger = rng.choice([t for t in range(len(grammar.TOPICS)) if t != topic])
    middle = rng.randint(1, 2)
    plan = [("<open>", first), (f"<intro{topic}>", first)]
    plan += [("<middle>", first)] * rng.randint(0, 1)
    plan += [(f"<event{topic}_{first}>", first), ("<feel>", first)] + [("<middle>", first)] * middle
    plan += [(f"<intro{stranger}>", mood)] * (rng.random() < other_topic_frac)
    plan += [(f"<then><event{topic}_{mood}>", mood), ("<feel>", mood)] + [("<close>", mood)] * rng.randint(0, 1)
    return [expand(template, story, polarity) for template, polarity in plan]


def join(parts: list[list[Piece]]) -> tuple[str, list[int]]:
    """The text, and the leaf number of each of its words, with capitals and "an" put right."""
    text, numbers, quoted = "", [], False
    for part in parts:
        text, capital = text + (" " if text else ""), True
        for i, (piece, leaf) in enumerate(part):
            if not piece[0].isalpha():
                opens, ends = '"' in piece and not quoted, piece[0] in ".!?" and '"' not in piece
                capital = opens or ends or (capital and i == 0)
                quoted ^= piece.count('"') % 2 == 1
                text += piece
                continue
            if piece == "a" and i + 2 < len(part) and re.match("[aeiou]|hour", part[i + 2][0]):
                piece = "an"
            text += piece[0].upper() + piece[1:] if capital else piece
            numbers.append(LEAVES.index(leaf) + 1 if leaf else 0)
            capital = False
    return text, numbers
