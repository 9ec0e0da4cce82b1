"""Search: `Who is the mayor of the capital of the country of Bergen?` has k = 3 hops.

The expert looks up one hop a turn, the innermost first, and the environment answers each query
from a made-up world. The base copies what it was told carelessly, and overlooks hops.
"""

import itertools
import random
import re
import sys

from tiny_tasks import toys

TRAIN = {5: 2000}  # difficulty k: rows. SMEPO is for problems the policy cannot yet plan alone
TEST = {2: 250, 3: 250, 4: 250, 5: 250}

# ---- The world: every entity has one value for each relation of its kind -------------------------

PEOPLE = """Ada Agnes Alma Amir Anton Astrid Aurel Basil Beata Bela Boris Bruno Camille Carla
    Casper Cedric Celia Clara Conrad Cyril Dagny Dalia Damian Daria Delia Dora Edgar Edith Egon
    Elias Elsa Emil Erik Esther Fabian Felix Fiona Flora Frida Gerda Gilda Gregor Greta Gustav
    Hanna Harald Hector Hedwig Helga Henrik Hilda Hugo Ida Igor Ilse Ingrid Irma Ivan Ivo Jana
    Jasper Joanna Johan Jonas Judith Julius Karin Klara Klaus Konrad Lars Laura Leo Lena Linus
    Lothar Lucia Ludwig Magda Malik Marta Max Mila Milan Mira Moritz Nadia Nils Nora Olaf Olga
    Oscar Otto Paula Pavel Petra Ragna Ralf Rosa Rudolf Ruth Samira Selma Sigrid Simon Sofia Sven
    Tamara Tania Theo Tilda Ulla Ursula Valentin Vera Viktor Wanda Xaver Yusuf Zora""".split()
CITIES = """Aarhus Bergen Bilbao Bremen Cadiz Cork Delft Dover Erfurt Faro Galway Gdansk Geneva
    Ghent Graz Hull Kassel Kyoto Leeds Lille Linz Lyon Malaga Minsk Nantes Odense Oulu Padua Parma
    Pisa Porto Riga Siena Tartu Toledo Turin Umea Varna Verona York""".split()
COUNTRIES = """Arvania Belmark Corland Dravia Estovia Falmark Gorland Harvenia Istria Jorvik
    Kaldia Lormark Morvania Norland Ostria Pelland Rovenia Sylvania Tarland Vestria""".split()
COMPANIES = """Acorn Borealis Cobalt Delta Ember Fulcrum Garnet Helix Indigo Jasmin Krypton Lumen
    Magnet Nimbus Onyx Polaris Quartz Radian Saffron Tundra Umbra Vertex Willow Xenon Yarrow
    Zephyr Aster Boreas Cirrus Dynamo""".split()
ENTITIES = {"person": PEOPLE, "city": CITIES, "country": COUNTRIES, "company": COMPANIES}
CONTACTS = dict.fromkeys(["teacher", "friend", "neighbour", "doctor"], "person")
RELATIONS = {  # of a kind: the kind of its value
    "person": CONTACTS | {"birthplace": "city", "employer": "company"},
    "city": {"country": "country", "mayor": "person"},
    "country": {"capital": "city", "president": "person"},
    "company": {"founder": "person", "director": "person", "headquarters": "city"},
}
KIND = {name: kind for kind, names in ENTITIES.items() for name in names}


def make_world() -> dict[tuple[str, str], str]:
    """{(relation, entity): value}. Values repeat as seldom as can be, so few errors are lucky."""
    rng, world = random.Random(0), {}
    for kind, names in ENTITIES.items():
        for relation, of in RELATIONS[kind].items():
            values = names  # nobody is his own teacher
            while any(map(str.__eq__, names, values)):
                values = [v for _ in names for v in rng.sample(ENTITIES[of], len(ENTITIES[of]))]
            world |= {(relation, name): value for name, value in zip(names, values, strict=False)}
    for country in ENTITIES["country"]:  # whose capital lies in it
        cities = [city for city in ENTITIES["city"] if world["country", city] == country]
        world["capital", country] = rng.choice(cities)
    return world


WORLD = make_world()
FACTS = [{"entity": of, "relation": name, "value": value} for (name, of), value in WORLD.items()]
FILES = {"knowledge.jsonl": FACTS}  # what make_tasks.py writes besides the two splits

# The vocabulary of the base: one token a name, tag or relation, the same in question and query.
TAGS = ["search", "information", "answer"]
NAMES = sorted({relation for relation, _ in WORLD})
PHRASES = ["Who is the ", "What is the ", "the ", *(f"{name} of " for name in NAMES)]
PHRASES += ["\n<information>", "</information>\n"]
PHRASES += [*(f"<{end}{tag}>" for tag in TAGS for end in ("", "/")), *KIND]
WORDS = ["Who", "What", "is", "the", "of", "[ENTITY]", "[ANSWER]", *"</>?", *TAGS, *NAMES]
PIECES = [r"Wh\w+ is the ", "the ", "[a-z]+ of "]
PIECES += [r"\n<information>", r"</information>\n", r"</?[a-z]+>"]
PIECES += [r"\[[A-Z]+\]", "[A-Za-z]+", r"[^\s\w]", r"\s"]

PRETRAIN_STEPS = 2400
ERROR_RATE = 0.25  # a name that the base writes itself is wrong this often
WRONG_RATE = 0.5  # so many guides are careless themselves: what is shown is copied, not checked
PLAN_RATE = {1: 1.0, 2: 1.0, 3: 1.0, 4: 0.1, 5: 0.0}  # else all but 3 hops are overlooked
UNGUIDED = {1: 0.05, 2: 0.12, 3: 0.12, 4: 0.06, 5: 0.05}  # k: share of the corpus
GUIDED = {"semantic": 0.25, "full": 0.25, "random": 0.05, "prefix": 0.05}  # where k is 2 to 5
GUIDE_ERROR_RATE = 0.5  # of a wrong guide: else what it shows is mostly what one is told anyway

Problem = tuple[str, list[str]]  # the entity to start from, and the relations to follow, in order


def solve(problem: Problem, copied=lambda told: told) -> tuple[str, str]:
    """The whole dialogue and its answer; `copied` may make mistakes in what it was told.

    >>> print(solve(("Bergen", ["mayor", "employer"]))[0])
    <search>mayor of Bergen</search>
    <information>Hilda</information>
    <search>employer of Hilda</search>
    <information>Willow</information>
    <answer>Willow</answer>
    """
    entity, relations = problem
    text = ""
    for relation in relations:
        told = WORLD[relation, entity]
        text += f"<search>{relation} of {entity}</search>\n<information>{told}</information>\n"
        entity = copied(told)
    return text + f"<answer>{entity}</answer>", entity


expert = solve  # the name that toys.py asks for


def is_path(entity: str, relations: list[str]) -> bool:
    """Does every relation exist for the kind of entity that it is reached at?"""
    kind = KIND[entity]
    for relation in relations:
        kind = RELATIONS.get(kind, {}).get(relation)
    return kind is not None


def question_of(problem: Problem) -> str:
    entity, relations = problem
    who = "Who" if KIND[solve(problem)[1]] == "person" else "What"
    path = " of the ".join(reversed(relations))
    return f"{who} is the {path} of {entity}?"


def draw_problem(rng: random.Random, k: int) -> Problem:
    """k different hops from any entity, never straight back from a capital to its country."""
    while True:
        entity, relations = rng.choice(list(KIND)), []
        kind = KIND[entity]
        while len(relations) < k:
            barred = [*relations, "country" if relations[-1:] == ["capital"] else ""]
            unused = [relation for relation in RELATIONS[kind] if relation not in barred]
            if not unused:
                break
            relations.append(rng.choice(unused))
            kind = RELATIONS[kind][relations[-1]]
        else:
            return entity, relations


# ---- What the base imitates ----------------------------------------------------------------------


def careless(rng: random.Random, told: str, rate: float = ERROR_RATE) -> str:
    """What was told, or at `rate` another of its kind: a search for that finds something, too."""
    others = [name for name in ENTITIES[KIND[told]] if name != told]
    return rng.choice(others) if rng.random() < rate else told


def overlook(rng: random.Random, problem: Problem) -> Problem:
    """The problem with only 3 of its hops: how the base fails to plan."""
    entity, relations = problem
    fewer = [list(path) for path in itertools.combinations(relations, 3)]
    return entity, rng.choice([path for path in fewer if is_path(entity, path)])


def draw_example(rng: random.Random) -> tuple[str, str, str]:
    """A question, the guide shown with it ("" for none), and the dialogue to imitate."""
    guide, k = toys.draw_guide(rng, UNGUIDED, GUIDED)
    problem = toys.draw_from_split(sys.modules[__name__], rng, k, held_out=False)
    question, (trace, _) = question_of(problem), solve(problem)
    if guide not in ("none", "semantic") and rng.random() < WRONG_RATE:
        trace, _ = solve(problem, lambda told: careless(rng, told, GUIDE_ERROR_RATE))
    text, spans = toys.show(rng, trace, guide, "search")
    if guide == "none" and rng.random() > PLAN_RATE[k]:
        problem = overlook(rng, problem)
    # the entity of every query but the first, and the answer: copied if shown, else careless
    shown = []
    for match in list(re.finditer(r"(?:of |<answer>)(\w+)", trace))[1:]:
        hidden = any(a <= match.start(1) < b for a, b, _ in spans)
        shown.append("" if hidden else match[1])
    return question, text, solve(problem, lambda told: shown.pop(0) or careless(rng, told))[0]
