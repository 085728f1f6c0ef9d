"""The project's own prompt lists are as long and as German as they say, and share no line."""

import re

import pytest

from chassis_utils.files import ROOT
from chassis_utils.text.prompts import Prompt, read_prompts
from chassis_utils.text.questions import cross

FOLDER = ROOT / "notebooks" / "prompts"
LISTS = {  # prompts, and the least and the most of them in German
    "quality": (20, 5, 5),
    "calibration": (200, 40, 60),
    "calibration_long": (50, 10, 15),
    "evaluation_long": (20, 4, 6),
}
GERMAN = re.compile(
    r"\b(der|die|das|dem|den|des|ein|eine|einem|einen|ist|und|nicht|im|zum|für|von|wenn|sie|ich|auf|er|lässt)\b"
)


def german(prompt: Prompt) -> bool:
    """Whether a prompt has a letter or a word that English has not."""
    return bool(re.search("[äöüß„]", prompt.text.lower()) or GERMAN.search(prompt.text.lower()))


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_as_long_and_as_german_as_it_says(name: str) -> None:
    count, least, most = LISTS[name]
    found = read_prompts(FOLDER / f"{name}.txt")
    assert len(found) == count
    assert least <= sum(map(german, found)) <= most
    longest = 100 if not name.endswith("_long") else 200
    assert max(len(prompt.text) for prompt in found) <= longest


def test_no_prompt_occurs_twice() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(LISTS)
    lines = [prompt.text.casefold() for name in LISTS for prompt in read_prompts(FOLDER / f"{name}.txt")]
    assert len(set(lines)) == len(lines) == 290
    starts = [" ".join(line.split()[:5]) for line in lines if len(line.split()) > 5]
    assert len(set(starts)) == len(starts)  # nor the beginning of one


@pytest.mark.parametrize("name", ["calibration_long", "evaluation_long"])
def test_long_prompts_have_two_sentences(name: str) -> None:
    for prompt in read_prompts(FOLDER / f"{name}.txt"):
        assert len(re.findall(r"[.!?“\"] \w|[.!?,]\" ", prompt.text)) >= 1, prompt.text


def test_groups_of_questions_share_neither_a_topic_nor_a_form() -> None:
    files = ROOT / "notebooks" / "questions" / "topics.txt", ROOT / "notebooks" / "questions" / "forms.txt"
    asked = cross(*files, range(10), 500, "train")
    assert len({prompt.text for prompt in asked}) == len(asked) == 500
    forms, topics = dict[str, set[str]](), dict[str, set[str]]()
    for prompt in asked:
        assert prompt.cluster is not None
        forms.setdefault(prompt.text.replace(prompt.cluster, "{}"), set()).add(prompt.group)
        topics.setdefault(prompt.cluster, set()).add(prompt.group)
    assert len(forms) == 50
    assert len(topics) == 100
    assert {len(groups) for groups in (*forms.values(), *topics.values())} == {1}
    assert {
        group: sum(prompt.group == group for prompt in cross(*files, range(6, 8), 15, "test")) for group in "67"
    } == {"6": 8, "7": 8}


def test_mixed_groups_meet_each_others_forms_and_no_others() -> None:
    files = ROOT / "notebooks" / "questions" / "topics.txt", ROOT / "notebooks" / "questions" / "forms.txt"
    groups = (1, 2, 5)
    asked = cross(*files, groups, 10_000, "train", mixed=True)
    assert len({prompt.text for prompt in asked}) == len(asked) == 30 * 15  # all topics of theirs with all forms
    alone, first = (cross(*files, groups, 150, "train", mixed=mixed) for mixed in (False, True))
    assert alone == first
    forms, own = ({prompt.text.replace(prompt.cluster or "", "{}") for prompt in some} for some in (asked, alone))
    assert forms == own


@pytest.mark.parametrize(("groups", "n"), [(range(11), 10), (range(2), 0)])
def test_more_groups_than_the_files_hold_and_no_questions_are_refused(groups: range, n: int) -> None:
    folder = ROOT / "notebooks" / "questions"
    with pytest.raises(ValueError, match="give 10 topics and 5 forms for each group"):
        cross(folder / "topics.txt", folder / "forms.txt", groups, n, "train")
