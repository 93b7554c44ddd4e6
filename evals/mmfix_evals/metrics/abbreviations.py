"""Abbreviations after which a "." does not end a sentence (lower case, without their last period).

The set is that of NLTK's English sentence splitter, arranged by kind; `etc`, `e.g` and `i.e` are not in it. The
splitter's own table has one more entry, ". .", which contains a space and so never matches a word.
"""

PERSONS = "adm col dr gen jr lt maj messrs mr mrs ms prof rep reps sen sr ph.d m.b.a"
COMPANIES = "bros cie co corp cos inc ltd n.v s.p.a"
MONTHS_AND_DAYS = "jan feb aug sep sept oct nov dec tues wed fri yr"
STATES = (
    "ala ariz calif colo conn fla ga ill kan ky mich minn nev okla ore pa tenn va vt wash wis "
    "d.c n.c n.d n.h n.j n.m n.y s.c w.va"
)
COUNTRIES = "u.k u.n u.s u.s.a u.s.s.r"
PLACES_AND_MEASURES = "ave ct ft mg st sw a.d a.m p.m"
OTHER = "chg ok v vs a.m.e c.i.t c.o.m.b i.m.s m.d.c p.a.m s.a.y"
LETTERS = "c d e f g h k l m n p r s t v w"
# First initial and the second ones seen with it: "a.a", "a.c", …
INITIALS = {
    "a": "acghst",
    "b": "fv",
    "c": "v",
    "d": "hw",
    "e": "fhlm",
    "f": "gj",
    "g": "dfk",
    "h": "cfm",
    "j": "bcjkpr",
    "l": "afp",
    "m": "j",
    "r": "ahijkt",
    "s": "ags",
    "t": "j",
    "w": "crw",
}

ABBREVIATIONS = frozenset(
    " ".join((PERSONS, COMPANIES, MONTHS_AND_DAYS, STATES, COUNTRIES, PLACES_AND_MEASURES, OTHER, LETTERS)).split()
) | {f"{first}.{second}" for first, seconds in INITIALS.items() for second in seconds}
