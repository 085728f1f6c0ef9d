"""Stages A and B against a plain transcription, their flaw on small cases, and what they match on real vocabularies."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer

from chassis_utils.as_reported.bridge import StringBridge, coverage, decoded, stage_a, stage_b
from chassis_utils.bridge.bridge import Bridge
from chassis_utils.bridge.segmenter import Segmenter
from chassis_utils.bridge.token_bytes import ByteTable
from chassis_utils.files import MODELS, ROOT

TOKENIZERS = ROOT.parent / "shared" / "tokenizers"
BASE = ["", "t", "h", "e", "th", "he", "the", "the", "a" * 6, "x"]
EXPERT = ["the", " the", "a" * 12, "th", "q", ""]


def matrix(base: list[str], expert: list[str], pairs: bool) -> np.ndarray:
    """Shares [v_e, v] by going through every base token and every pair."""
    found = np.zeros((len(expert), len(base)))
    for e, text in enumerate(expert):
        for v, first in enumerate(base):
            found[e, v] += first == text != ""
            for second in base if pairs and first and len(text) <= 10 else []:
                found[e, v] += second != "" and first + second == text
    return found / np.maximum(found.sum(1, keepdims=True), 1)


@pytest.mark.parametrize("stage", [stage_a, stage_b])
def test_a_stage_moves_what_its_strings_say(stage: Callable[..., StringBridge]) -> None:
    p = torch.rand(4, len(EXPERT), dtype=torch.float64).softmax(1)
    expected = np.log(p.numpy() @ matrix(BASE, EXPERT, stage is stage_b) + 1e-8)
    torch.testing.assert_close(stage(BASE, EXPERT).target(p), torch.from_numpy(expected))


def test_a_base_reads_the_in_one_way_but_stage_b_counts_four() -> None:
    shares = matrix(BASE, EXPERT, pairs=True)[0]
    assert dict(zip(BASE, shares, strict=True)) | {"the": 0.25} == {
        **dict.fromkeys(BASE, 0.0),
        "t": 0.25,
        "th": 0.25,
        "the": 0.25,
    }
    assert stage_b(BASE, EXPERT).share.sum() == 2.0  # "the" and "th", nothing else


def test_pairs_are_made_of_the_first_4096_ids() -> None:
    base = [f"<{k}>" for k in range(4095)] + ["a", "b"]
    assert stage_b([*base[:-1], "ab", "b"], ["ab"]).base.tolist() == [4096]
    assert stage_b([*base[1:], "x"], ["ab"]).base.tolist() == [4094]


def test_only_the_256_likeliest_tokens_are_moved() -> None:
    strings = [f"<{k}>" for k in range(300)]
    p = torch.linspace(1, 2, 300, dtype=torch.float64)[None]
    target = stage_a(strings, strings).target(p / p.sum())
    assert (target[0, :44] == np.log(1e-8)).all()
    torch.testing.assert_close(target[0, 44:].exp() - 1e-8, (p / p.sum())[0, 44:])


def test_strings_that_never_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no expert token has the decoded string of a base token: use Bridge\.of"):
        stage_a(["a"], ["b"])


def test_decoding_drops_a_leading_space_and_half_a_character() -> None:
    strings = decoded(Tokenizer.from_file(str(MODELS / "port-llama" / "tokenizer.json")))
    table = ByteTable.of(MODELS / "port-llama")
    assert strings[table.ids_of[b" the"]] == "the" and strings[table.byte_ids[0xC3]] == "\ufffd"
    assert strings[:3] == ["<unk>", "<s>", "</s>"] and len(strings) == 4096


def count(table: pd.DataFrame, way: str, kind: str) -> tuple[int, int, int]:
    """Tokens, matched and wrong of one row."""
    row = table[(table["way"] == way) & (table["kind"] == kind)].iloc[0]
    return int(row["tokens"]), int(row["matched"]), int(row["wrong"])


def test_no_space_initial_token_of_the_shipped_pair_matches_by_string() -> None:
    files = [MODELS / name / "tokenizer.json" for name in ("port-llama", "expert-phi")]
    bridge = Bridge.of(Segmenter.of(files[0]), ByteTable.of(files[1]))
    table = coverage(bridge, *(Tokenizer.from_file(str(file)) for file in files))
    spaced = [piece for piece in bridge.expert.pieces if piece and piece[:1] == b" " and piece.strip(b" ")]
    assert count(table, "equal decoded strings", "space-initial") == (len(spaced), 0, 0)
    equal = sum(piece in bridge.base.table.ids_of for piece in bridge.expert.pieces if piece)
    assert count(table, "equal bytes", "all") == (5119, equal, 0)
    assert count(table, "first token of the bytes", "all") == (5119, 5119, 0)


@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="shared/tokenizers is absent: real test data beside the repository")
def test_coverage_of_tinyllama_by_phi2_is_as_stated() -> None:
    files = [TOKENIZERS / name / "tokenizer.json" for name in ("tinyllama", "phi2")]
    bridge = Bridge.of(Segmenter.of(files[0], 32000), ByteTable.of(files[1], 51200))
    table = coverage(bridge, *(Tokenizer.from_file(str(file)) for file in files))
    assert count(table, "equal decoded strings", "space-initial") == (33134, 0, 0)
    tokens, matched, wrong = count(table, "equal decoded strings", "all")
    added, added_matched, added_wrong = count(table, "equal decoded strings", "added")
    assert (tokens, added) == (50294, 38)
    # The stated figures leave out the added runs of spaces, all of which match a longer run.
    assert (matched - added_matched, wrong - added_wrong) == (9993, 2375)
    assert (added_matched, added_wrong) == (14, 14)
    assert count(table, "equal bytes", "all") == (50294, 18222, 0)
    assert count(table, "first token of the bytes", "all") == (50294, 50294, 0)
