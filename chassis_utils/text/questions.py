"""Questions that cross topics with forms, dealt so that parts share neither.

A topic is a noun phrase, a form a question with `{}` in the topic's place, one a line in either file. Group g crosses
its own ten topics with its own five forms: 50 questions. So what is fitted to some groups is tested on another with
topics and with words of the question that it has not seen.
"""

from collections.abc import Sequence
from pathlib import Path

from chassis_utils.text.prompts import Prompt, read_prompts

TOPICS, FORMS = 10, 5  # of a group


def cross(topics_file: str | Path, forms_file: str | Path, groups: Sequence[int], n: int, part: str) -> list[Prompt]:
    """`n` questions, as many of each group, or all where there are fewer; a prompt's group is that number.

    Raises `ValueError` for no questions, and files that cannot be read or hold too little for these groups.
    """
    topics, forms = ([line.text for line in read_prompts(file)] for file in (topics_file, forms_file))
    each, most = min(-(-n // len(groups)), TOPICS * FORMS), max(groups) + 1
    if each < 1 or len(topics) < TOPICS * most or len(forms) < FORMS * most:
        raise ValueError(
            f"{n} questions of {most} groups, from {len(topics)} topics and {len(forms)} forms: ask for one or more, "
            f"and give {TOPICS} topics and {FORMS} forms for each group"
        )
    asked = []
    for group in groups:
        pairs = [(TOPICS * group + (i + i // TOPICS) % TOPICS, FORMS * group + i % FORMS) for i in range(each)]
        asked += [Prompt(forms[f].format(topics[t]), str(group), topics[t], part) for t, f in pairs]
    return asked
