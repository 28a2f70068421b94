"""
A grammar of short film reviews, written for the quickstart: openings that are bad or good, and how they go on.

`{name}` stands for one of the phrases listed under that name, chosen at random; phrases are separated by `|`. A
review is an opening clause, which later serves as the prompt, and a continuation of one to four sentences. Four in
five reviews go on as they began; the others turn (", but ...", "In the end, however, ...").
"""

import random
import re


TURN_SHARE = 0.2

GRAMMAR = {
    # --- what reviews speak of ---
    "work": "film|movie|picture|story|drama|comedy|thriller|sequel|debut",
    "thing": "plot|script|ending|pacing|camera work|music|dialogue|humour|direction|editing|lighting|cast|finale"
    "|soundtrack|romance|first hour|second half|last scene|car chase|opening scene|villain|narrator|costume design",
    "things": "jokes|characters|songs|landscapes|effects|fight scenes|supporting actors|twists|flashbacks|monologues"
    "|dance numbers|battle scenes|sets|quiet moments|lead actors|subtitles",
    "star": "Mara Lindqvist|Teo Alvarez|June Okafor|Ivo Brandt|Lena Castell|Amos Reed|Nadia Moreau|Kit Harlan"
    "|Sana Rao|Oskar Vale|the young lead|the old master|the debutante|the director's brother",
    "role": "a tired nurse|a retired sailor|a lonely clerk|a jazz pianist|a village teacher|a runaway heiress"
    "|a night watchman|a failed magician|a stubborn detective|a lighthouse keeper|a widowed baker|a taxi driver",
    "place": "a fishing village|a border town|the desert|an old hotel|a mountain farm|the old harbour|a space station"
    "|a travelling circus|a provincial court|a snowed-in castle|the suburbs|a boarding school",
    "span": "one night|a single summer|three winters|forty years|a long weekend|two rainy days",
    "viewer": "my sister|my father|the man next to me|a friend|the whole row|our neighbour|half the audience",
    # --- words of praise and blame ---
    "good": "warm|bright|brilliant|charming|clever|funny|moving|gorgeous|tender|thrilling|witty|fresh|elegant|honest"
    "|superb|delightful|inspired|gripping|lovely|wonderful|beautiful|graceful|touching|joyful|perfect|enchanting",
    "bad": "dull|slow|clumsy|tedious|awful|lifeless|boring|ugly|shallow|predictable|silly|noisy|stale|wooden|bland"
    "|terrible|messy|pointless|painful|flat|dreary|hollow|lazy|annoying|pretentious|forgettable",
    "very good": "very {good}|truly {good}|wonderfully {good}|{good} and {good}|so {good} that I smiled|quite {good}"
    "|{good}, {good} and {good}|as {good} as they come",
    "very bad": "very {bad}|rather {bad}|painfully {bad}|hopelessly {bad}|{bad} and {bad}|far too {bad}"
    "|so {bad} that I groaned|{bad}, {bad} and {bad}",
    "virtue": "charm|wit|heart|grace|warmth|energy|imagination|courage|beauty|suspense|joy|wisdom",
    "vice": "clichés|noise|boredom|confusion|vanity|plot holes|bad taste|empty talk|cheap tricks|false tears",
    "well": "beautifully|brilliantly|with grace|with real wit|perfectly|with great care|with warmth",
    "badly": "clumsily|without any skill|badly|without a single idea|carelessly|with no sense of rhythm",
    "gem": "gem|triumph|treat|delight|joy|masterpiece|pleasure|small miracle|treasure",
    "dud": "mess|disaster|chore|bore|failure|waste of time|disappointment|insult|mistake",
    # --- openings ---
    "bad opening": "The {thing} is {bad}|The {thing} is {very bad}|The {things} are {bad} and {bad}"
    "|This {work} is a {dud}|What a {dud}|What a {bad} {work}|I nearly walked out of this {bad} {work}"
    "|It begins as a {bad} {work} about {role}|The first thing you notice is the {bad} {thing}"
    "|{star} looks lost in this {bad} {work}|At first it seems a {bad} {work}|I expected little from this {work}"
    "|The trailer was {bad} and the {thing} is {bad}|For an hour the {things} are {bad}"
    "|My first thought was that it is a {dud}|This {bad} {work} starts {badly}|Another {bad} {work} set in {place}",
    "good opening": "The {thing} is {good}|The {thing} is {very good}|The {things} are {good} and {good}"
    "|This {work} is a {gem}|What a {gem}|What a {good} {work}|I was smiling all through this {good} {work}"
    "|It begins as a {good} {work} about {role}|The first thing you notice is the {good} {thing}"
    "|{star} shines in this {good} {work}|At first it seems a {good} {work}|I expected much from this {work}"
    "|The trailer was {good} and the {thing} is {good}|For an hour the {things} are {good}"
    "|My first thought was that it is a {gem}|This {good} {work} starts {well}|Another {good} {work} set in {place}",
    # --- sentences that follow ---
    "neutral": "It follows {role} who returns to {place}|It takes place in {place} over {span}"
    "|{star} plays {role} who dreams of {place}|I saw it with {viewer}|It was shot in {place} in {span}"
    "|The {work} tells of {role} in {place}|{star} wrote it in {span}|Most of it is set in {place}",
    "praise": "The {thing} is {good}|The {thing} is {very good} and the {things} are {good}|The {things} are {good}"
    "|{star} is {good} as {role}|{star} gives a {good} performance|The {thing} is never {bad}"
    "|There is {virtue} in every scene|It is full of {virtue} and {virtue}|The {thing} works {well}"
    "|{viewer} laughed and so did I|I loved the {thing} and the {things}|Even the {things} are {good}"
    "|Not one of the {things} is {bad}|It is told {well}|{viewer} adored the {good} {thing}"
    "|The {good} {thing} gives it {virtue}|The {thing} alone is worth the ticket",
    "blame": "The {thing} is {bad}|The {thing} is {very bad} and the {things} are {bad}|The {things} are {bad}"
    "|{star} is {bad} as {role}|{star} gives a {bad} performance|The {thing} is not {good}"
    "|There is no {virtue} in it|It is full of {vice} and {vice}|The {thing} is handled {badly}"
    "|{viewer} fell asleep and so did I|I hated the {thing} and the {things}|Even the {things} are {bad}"
    "|Not one of the {things} is {good}|It is told {badly}|{viewer} loathed the {bad} {thing}"
    "|The {bad} {thing} gives way to {vice}|The {thing} alone is a reason to leave",
    # --- how they end ---
    "recommend": "Go and see it {soon}|I would watch it again {soon}|It is a {gem}|I left the {house} {happy}"
    "|A {good} {work} with {virtue}|I recommend it to {everyone}|It deserves every {prize}"
    "|A {gem} from start to finish|{viewer} applauded at the end|You will love {star} in it"
    "|I smiled all the way {home}|It is worth every {minute}",
    "warn": "Stay away from this {dud}|I would not watch it again {soon}|It is a {dud}|I left the {house} {angry}"
    "|A {bad} {work} without {virtue}|I would not recommend it to {everyone}|It deserves no {prize}"
    "|A {dud} from start to finish|{viewer} groaned at the end|You will hate {star} in it"
    "|I yawned all the way {home}|It is not worth a {minute}",
    "soon": "tomorrow|this week|at once|on a big screen|tonight|next year",
    "house": "cinema|theatre|hall|screening",
    "happy": "happy|smiling|delighted|in high spirits",
    "angry": "angry|groaning|disappointed|in low spirits",
    "everyone": "everyone|anybody|my friends|young and old|children|my colleagues",
    "prize": "prize|award|medal|applause",
    "minute": "minute|penny|second|cent",
    "home": "home|to the station|through the rain|to my front door",
}
GRAMMAR = {name: phrases.split("|") for name, phrases in GRAMMAR.items()}
WORDS_OF = {  # what says good things, and what bad ones
    1: {"opening": "good opening", "sentence": "praise", "end": "recommend"},
    0: {"opening": "bad opening", "sentence": "blame", "end": "warn"},
}


def expand(name: str, rng: random.Random) -> str:
    """Returns one of the phrases called `name`, with everything in braces filled in."""
    text = re.sub(r"{([^}]+)}", lambda match: expand(match[1], rng), rng.choice(GRAMMAR[name]))
    return re.sub(r"\b([Aa]) (?=[aeiou]|honest)", r"\1n ", text)


def capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def lowered(text: str) -> str:
    """Returns the sentence as it reads after a comma: names and `I` keep their capital."""
    keeps_capital = re.match(r"I |[A-Z]\w+ [A-Z]", text)
    return text if keeps_capital else text[0].lower() + text[1:]


def write_opening(label: int, rng: random.Random) -> str:
    return capitalized(expand(WORDS_OF[label]["opening"], rng))


def write_continuation(label: int, rng: random.Random) -> str:
    """Writes on after an opening with this label, from the punctuation that closes the opening clause."""
    turns = rng.random() < TURN_SHARE
    later = WORDS_OF[1 - label if turns else label]
    sentences = [expand("neutral", rng)] if rng.random() < 0.3 else []
    if turns and rng.random() < 0.4:  # one more sentence of the first opinion before the turn
        sentences.append(expand(WORDS_OF[label]["sentence"], rng))
    body = [expand(later["sentence"], rng) for _ in range(rng.choice([1, 1, 2]))]
    if turns and sentences:
        body[0] = rng.choice(["In the end, however, ", "And yet ", "But then "]) + lowered(body[0])
    sentences += body
    if rng.random() < 0.7:
        sentences.append(expand(later["end"], rng))
    if turns and sentences[0] is body[0]:
        start = rng.choice([", but ", ", and yet ", ", though "]) + lowered(sentences[0])
    elif rng.random() < 0.3 and not turns:
        start = rng.choice([", and ", "; "]) + lowered(sentences[0])
    else:
        start = ". " + capitalized(sentences[0])
    return ". ".join([start, *map(capitalized, sentences[1:])]) + "."


def distinct_openings(label: int, count: int, rng: random.Random) -> list[str]:
    openings = {}
    while len(openings) < count:
        openings[write_opening(label, rng)] = None
    return list(openings)
