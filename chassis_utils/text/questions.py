"""Questions that cross topics with forms, dealt so that parts share neither.

A topic is a noun phrase, a form a question with `{}` in the topic's place, one a line in either file. Group g crosses
its own ten topics with its own five forms: 50 questions. So what is fitted to some groups is tested on another with
topics and with words of the question that it has not seen.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from chassis_utils.text.prompts import Prompt, read_prompts

TOPICS, FORMS = 10, 5  # of a group


def cross(
    topics_file: str | Path, forms_file: str | Path, groups: Sequence[int], n: int, part: str, mixed: bool = False
) -> list[Prompt]:
    """`n` questions, as many of each group, or all where there are fewer; a prompt's group is that of its topic.

    Where a group's 50 are not enough, `mixed` lets its topics meet the forms of the other groups asked for as well.
    Raises `ValueError` for no questions, and files that cannot be read or hold too little for these groups.
    """
    topics, forms = ([line.text for line in read_prompts(file)] for file in (topics_file, forms_file))
    each, most = min(-(-n // len(groups)), TOPICS * FORMS * (len(groups) if mixed else 1)), max(groups) + 1
    if each < 1 or len(topics) < TOPICS * most or len(forms) < FORMS * most:
        raise ValueError(
            f"{n} questions of {most} groups, from {len(topics)} topics and {len(forms)} forms: ask for one or more, "
            f"and give {TOPICS} topics and {FORMS} forms for each group"
        )
    asked = []
    for (place, group), i in product(enumerate(groups), range(each)):
        turn, k = divmod(i, TOPICS * FORMS)
        topic = topics[TOPICS * group + (k + k // TOPICS) % TOPICS]
        form = forms[FORMS * groups[(place + turn) % len(groups)] + k % FORMS]
        asked.append(Prompt(form.format(topic), str(group), topic, part))
    return asked
