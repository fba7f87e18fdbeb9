from __future__ import annotations

import pytest

from kellm_features.knowledge.answers import clean
from kellm_features.knowledge.engines import Completion


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("Heat is a crime film by Michael Mann.", "Heat is a crime film by Michael Mann."),
        ("Sure! Here is a text: Heat is a crime film by Mann.", "Here is a text: Heat is a crime film by Mann."),
        ("Here is the description: **Heat** is a crime film by Mann.", "Heat is a crime film by Mann."),
        (
            "Heat is a crime film by Mann. It stars Al Pacino as a cop. The film is set in Los Ang",
            "Heat is a crime film by Mann. It stars Al Pacino as a cop.",
        ),
        (
            "The film is a 1996 black comedy by the Coens. The film is a 1996 black comedy by the two Coens. It is set "
            "in snowy Minnesota.",
            "The film is a 1996 black comedy by the Coens. It is set in snowy Minnesota.",
        ),
    ],
)
def test_what_is_kept_of_an_answer(answer: str, kept: str) -> None:
    assert clean(Completion(answer)) == kept


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "  \n ",
        "Good film.",
        "</page> The film is a crime film by Mann.",
        "Your task is to generate a description for a film.",
        "the the the the the the the the the the the the.",
        "I am sorry, but as an AI I cannot describe that film.",
    ],
)
def test_unfit_answers_are_empty(answer: str) -> None:
    assert clean(Completion(answer)) == ""


def test_a_single_sentence_cut_off_ends_at_its_last_clause() -> None:
    cut = "Heat is a 1995 crime film by Michael Mann, starring Al Pacino, Robert De Niro, Val Kil"
    assert clean(Completion(cut, finish_reason="length")) == (
        "Heat is a 1995 crime film by Michael Mann, starring Al Pacino, Robert De Niro."
    )
