"""Which writing systems a corpus is written in."""

from pathlib import Path

import pytest

from ternlm.data import DataSettings, prepare
from ternlm.data.scripts import script_mix, script_of
from ternlm.tokenizers import load_tokenizer

TEXT = "abc αβγ 猫坐 дом かな 🐈🙂 123 ,.!\n"  # 3 Latin, 3 Greek, 2 Han, 3 Cyrillic, 2 Hiragana, 2 symbols: 15


@pytest.mark.parametrize(
    ("character", "script"),
    [
        ("a", "Latin"), ("é", "Latin"), ("ａ", "Latin"), ("ά", "Greek"), ("µ", "Greek"), ("猫", "Han"),
        ("д", "Cyrillic"), ("か", "Hiragana"), ("カ", "Katakana"), ("한", "Hangul"), ("ש", "Hebrew"), ("ع", "Arabic"),
        ("ก", "Thai"),
        ("🐈", "symbols"), ("€", None), ("7", None), (" ", None), (".", None), ("\n", None), ("\ufffd", None),
    ],
)  # fmt: skip
def test_a_character_belongs_to_its_script_or_to_none(character: str, script: str | None) -> None:
    assert script_of(character) == script


@pytest.mark.parametrize("sampled", [10**6, 20_000])
def test_shares_are_those_of_the_letters_whole_or_sampled(tmp_path: Path, sampled: int) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 2000, encoding="utf-8")
    data = DataSettings(source=str(tmp_path / "a.txt"), validation_fraction=0, test_fraction=0)
    tokenizer = load_tokenizer("byte")
    stream = prepare(data, tokenizer, tmp_path / "corpus").split("train")
    mix = script_mix(stream, tokenizer, sampled)
    wanted = {"Latin": 3, "Greek": 3, "Cyrillic": 3, "Han": 2, "Hiragana": 2, "symbols": 2}
    assert mix.keys() == wanted.keys()
    assert list(mix.values()) == sorted(mix.values(), reverse=True)
    for script, count in wanted.items():
        assert mix[script] == pytest.approx(count / 15, abs=1e-12 if sampled == 10**6 else 0.01)
