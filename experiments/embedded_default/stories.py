"""From the rules and word lists of grammar.py to one story, with the concept of every word."""
import random
import re

import grammar

LEAVES = list(grammar.CONCEPTS)
FORMS = {leaf: [word.strip("*").split("/") for word in words.split()] for leaf, words in grammar.CONCEPTS.items()}
DRAWN = {leaf: [word.split("/") for word in words.split() if word[0] != "*"]
         for leaf, words in grammar.CONCEPTS.items()}
SENSES: dict[str, list[str]] = {}
for _leaf, _words in FORMS.items():
    for _form in {form.lower() for forms in _words for form in forms}:
        SENSES.setdefault(_form, []).append(_leaf)
AMBIGUOUS = {word for word, leaves in SENSES.items() if len(leaves) > 1} | set(grammar.PLAIN_SENSES)
PIECE = re.compile(r"<(\w+)>|\[(\w+)(?:\.(\w+))?\]|\{(\w+)\}|([A-Za-z]+)(?:@(\w+))?|([^A-Za-z<\[{]+)")
FORM_NUMBER = {"": 0, "s": 1, "v": 1, "ing": 2}
PRONOUNS = {gender: dict(zip(("he", "him", "his"), zip(words, ("pronoun/subject", "pronoun/object", "pronoun/owner"))))
            for gender, words in (("girl", ("she", "her", "her")), ("boy", ("he", "him", "his")))}
BAD_FEELINGS = ("sad", "afraid", "angry")
SHOWN_BY = {"good": "smile", "sad": "cry", "afraid": "tremble", "angry": "stamp"}
ONCE = ("middle", "feel")  # rules that give a story no sentence twice while they have others
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
    """A word written out in a sentence, with its leaf. ValueError for two senses without a tag, or a needless tag."""
    senses = [leaf for leaf in SENSES.get(word.lower(), []) if tag in (None, leaf.split("/")[-1])]
    if (tag is not None) != (word.lower() in AMBIGUOUS):
        raise ValueError(f"grammar: {word!r} "
                         + ("has one sense and needs no tag" if tag else f"needs a sense, one of {senses} or none"))
    if tag not in (None, "none") and not senses:
        raise ValueError(f"grammar: {word!r} has no sense {tag}")
    return word, senses[0] if senses and tag != "none" else None


def new_story(rng: random.Random, topic: int) -> dict:
    """The people and things of one story, each as (word forms, leaf) under its name, and its bad feeling."""
    gender = rng.choice(["girl", "boy"])

    def one(nodes: str) -> tuple[list[str], str]:
        leaf = rng.choice([leaf for node in nodes.split() for leaf in below(node)])
        return rng.choice(DRAWN[leaf]), leaf

    return {
        "rng": rng, "topic": topic, "gender": gender, "told": set(), "met": False, "minus": rng.choice(BAD_FEELINGS),
        "hero": one(gender), "friend": one("boy" if gender == "girl" else "girl"),
        "pet": one("pet pet farm bird wild"), "food": one("fruit vegetable pastry dish"),
        "item": one("toy tool clothes jewel lamp container"), "place": one("outdoor water town"),
    }


def someone(name: str, story: dict) -> list[Piece]:
    """The words for {hero}, {S}, {him}, {pet} ... in this story."""
    rng, pronouns = story["rng"], PRONOUNS[story["gender"]]
    if name == "S":
        name = rng.choice(["hero", "hero", "he", "he", "he"])
    if name in pronouns:
        return [pronouns[name]]
    if name == "friend" and not story["met"]:
        story["met"] = True
        if rng.random() < 0.5:
            return [pronouns["his"], (" ", None), ("friend", None), (" ", None),
                    (story["friend"][0][0], story["friend"][1])]
    forms, leaf = story["pet" if name == "pets" else name]
    if leaf.startswith("animal/pet/"):  # its words are synonyms, so each mention may take another
        forms = rng.choice(DRAWN[leaf])
    return [(forms[min(int(name in ("pets", "food")), len(forms) - 1)], leaf)]


def feeling(rule: str, story: dict, mood: str) -> Piece:
    """A feeling, or what shows it, for <plus>, <minus>, <plus_show>, <minus_show> and <feeling>."""
    rng = story["rng"]
    if rule == "feeling":
        return draw(rng, rng.choice(["good", rng.choice(BAD_FEELINGS)]))
    other = story["minus"] if mood == "good" else "good"
    kind = mood if rule.startswith("plus") else other
    return draw(rng, SHOWN_BY[kind], "" if rule == "plus_show" else "v") if rule.endswith("_show") else draw(rng, kind)


def expand(template: str, story: dict, mood: str) -> list[Piece]:
    """Replace rules, slots and people until only words are left. mood: good, sad, afraid or angry."""
    rng, pieces = story["rng"], []
    for rule, node, form, name, word, tag, other in PIECE.findall(template):
        if rule in ("plus", "minus", "feeling", "plus_show", "minus_show"):
            pieces.append(feeling(rule, story, mood))
        elif rule:
            if rule in ("act_pet", "act_food", "act_item", "act_place"):
                rule = "act_" + story[rule[4:]][1].split("/")[-1]
            choice = rng.choice([one for one in grammar.RULES[rule] if one not in story["told"]] or grammar.RULES[rule])
            if rule in ONCE:
                story["told"].add(choice)
            pieces += expand(choice, story, mood)
        elif node:
            pieces.append(draw(rng, node, form))
        elif name:
            pieces += someone(name, story)
        elif word:
            pieces.append(literal(word, tag or None))
        else:
            pieces.append((other, None))
    return pieces


def sentences(story: dict, good: bool, same_mood_frac: float, other_topic_frac: float) -> list[list[Piece]]:
    """The sentences of one story with a good or a bad end.

    same_mood_frac: chance that it begins in the mood it ends in; other_topic_frac: chance of one sentence on another
    topic.
    """
    rng, topic = story["rng"], story["topic"]
    act = ("<act_pet>", "<act_food>", "<act_item>", "<act_place>")
    began_good = good if rng.random() < same_mood_frac else not good
    first, last = ("good" if ends_good else rng.choice(BAD_FEELINGS) for ends_good in (began_good, good))
    story["minus"] = next((mood for mood in (first, last) if mood != "good"), story["minus"])
    stranger = rng.choice([t for t in range(len(grammar.TOPICS)) if t != topic])
    plan = [("<open>", first), (f"<intro{topic}>", first)] + [(act[topic], first)] * (rng.random() < 0.7)
    plan += [(f"<event{topic}_{first}>", first), ("<feel>", first)]
    plan += [(f"<react_{first}>", first)] * (rng.random() < 0.3)
    plan += [("<middle>", first)] * rng.randint(1, 2)
    plan += [(rng.choice([f"<intro{stranger}>", act[stranger]]), first)] * (rng.random() < other_topic_frac)
    plan += [(f"<then><event{topic}_{last}>", last), ("<feel>", last)]
    plan += [(rng.choice([f"<react_{last}>", "<close>"]), last)] * (rng.random() < 0.6)
    return [expand(template, story, mood) for template, mood in plan]


def join(parts: list[list[Piece]]) -> tuple[str, list[int]]:
    """The text, with capitals and "an" put in, and the leaf number of each of its words."""
    text, numbers, quoted = "", [], False
    for part in parts:
        text, capital = text + (" " if text else ""), True
        for i, (piece, leaf) in enumerate(part):
            if not piece[0].isalpha():
                opens, ends = '"' in piece and not quoted, piece[0] in ".!?" and '"' not in piece
                capital = opens or ends or (capital and i == 0)
                quoted ^= piece.count('"') % 2 == 1
                text = (text.rstrip() if piece[0] in ".,!?" else text) + piece  # an empty <tail> leaves a space
                continue
            if piece == "a" and i + 2 < len(part) and re.match("[aeiou]|hour", part[i + 2][0]):
                piece = "an"
            text += piece[0].upper() + piece[1:] if capital else piece
            numbers.append(LEAVES.index(leaf) + 1 if leaf else 0)
            capital = False
    return text, numbers
