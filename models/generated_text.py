"""Sentences of arithmetic and explanation for training, in templates of their own.

None of these templates is one that the paper evaluates on (`chassis_utils.text.prompts`).
Each function draws one short document from the random generator it is given.
"""

from random import Random

SUMS = (
    "{a} + {b} = {c}",
    "{a} plus {b} equals {c}.",
    "Adding {b} to {a} gives {c}.",
    "Q: How much is {a} + {b}? A: {c}",
    "The sum of {a} and {b} is {c}.",
    "Compute {a} + {b}. The answer is {c}.",
)
PRODUCTS = (
    "{a} * {b} = {c}",
    "{a} times {b} equals {c}.",
    "Multiplying {a} by {b} gives {c}.",
    "Q: How much is {a} * {b}? A: {c}",
    "The product of {a} and {b} is {c}.",
    "Compute {a} * {b}. The answer is {c}.",
)
DIFFERENCES = (
    "{a} - {b} = {c}",
    "{a} minus {b} equals {c}.",
    "Taking {b} from {a} leaves {c}.",
    "Q: How much is {a} - {b}? A: {c}",
    "Compute {a} - {b}. The answer is {c}.",
)
EXERCISES = (  # the answer at once, in several forms
    "How much is {q}? {c}",
    "How much is {q}? It is {c}.",
    "{q}? {c}",
    "Work out {q}. {c}",
    "Solve: {q} = {c}",
    "{q} = {c}",
    "Exercise: {q}? Answer: {c}",
)
TOPICS = {
    "entropy": ("counts how many ways a state can be arranged", "never falls when closed in", "grows when heat flows"),
    "force": ("is mass times acceleration", "changes how a body moves", "comes in pairs that point apart"),
    "energy": ("is conserved", "changes form but is never lost", "is the capacity to do work"),
    "momentum": ("is mass times velocity", "is shared when two bodies collide", "stays the same without a force"),
    "light": ("travels in straight lines through air", "is scattered by small particles", "bends when it enters water"),
    "the derivative": ("is the slope of a curve", "measures how fast a function changes", "of a constant is zero"),
    "an integral": ("is the area under a curve", "adds up many small parts", "undoes a derivative"),
    "a matrix": ("stores numbers in rows and columns", "maps vectors to vectors", "has a rank and a null space"),
    "memory": ("is freed when it is no longer used", "must not be read after it is freed", "is addressed by pointers"),
}
FRAMES = (
    "Why does it matter that {topic} {fact}? Because it {other}.",
    "To understand {topic}, remember that it {fact}. It also {other}.",
    "A short account of {topic}: it {fact}, and it {other}.",
    "Students learn that {topic} {fact}. Later they see that it {other}.",
    "First, {topic} {fact}. Second, it {other}.",
)


def arithmetic(rng: Random, lines: int = 24) -> str:
    """A page of correct sums, products and differences, with a worked one now and then."""
    return "\n".join(_worked(rng) if rng.random() < 0.15 else _one(rng) for _ in range(lines))


def _one(rng: Random) -> str:
    kind = rng.random()
    a, b = _number(rng), _number(rng)
    if kind < 0.5:
        return rng.choice(SUMS).format(a=a, b=b, c=a + b)
    if kind < 0.8:
        return rng.choice(PRODUCTS).format(a=a, b=b, c=a * b)
    return rng.choice(DIFFERENCES).format(a=a + b, b=b, c=a)


def exercises(rng: Random, lines: int = 32) -> str:
    """A page of correct answers, small numbers more often than large ones: what a small model can learn."""
    return "\n".join(rng.choice(EXERCISES).format(**_exercise(rng)) for _ in range(lines))


def _exercise(rng: Random) -> dict[str, object]:
    kind, digits = rng.random(), rng.choices((1, 2, 3, 4), (20, 45, 20, 15))[0]
    a, b = rng.randrange(10**digits), rng.randrange(10**digits)
    if kind < 0.6:
        return {"q": f"{a} + {b}", "c": a + b}
    if kind < 0.8:
        return {"q": f"{a + b} - {b}", "c": a}
    return {"q": f"{a} * {b % 10}", "c": a * (b % 10)}


def _worked(rng: Random) -> str:
    a, b = _number(rng), rng.randrange(10, 100)
    tens, ones = b // 10 * 10, b % 10
    first, second = a * tens, a * ones
    return (
        f"Task: {a} * {b}. Step 1: {a} * {tens} = {first}. Step 2: {a} * {ones} = {second}. "
        f"Step 3: {first} + {second} = {a * b}. Result: {a * b}"
    )


def _number(rng: Random) -> int:
    return rng.randrange(10 ** rng.choice((1, 2, 3, 4)))


def explanations(rng: Random, lines: int = 12) -> str:
    """A page of short explanations of school topics."""
    return "\n".join(_explanation(rng) for _ in range(lines))


def _explanation(rng: Random) -> str:
    topic = rng.choice(list(TOPICS))
    fact, other = rng.sample(TOPICS[topic], 2)
    sentence = rng.choice(FRAMES).format(topic=topic, fact=fact, other=other)
    return sentence[0].upper() + sentence[1:]
