"""How likely texts and continuations are, and how texts go on: in batches as one by one, and as counted by hand."""

import math
from typing import Any

import pytest
import torch

from builders import tiny_model
from ternlm.errors import Interrupted, SettingsError, TokenizerError
from ternlm.evaluation.likelihood import Scorer
from ternlm.generation import SamplingSettings, generate
from ternlm.models import MODELS, QuantizationMode
from ternlm.tokenizers import ByteTokenizer

BOS, EOS = 254, 255
EXACT = QuantizationMode(activations="none")
CAUSAL = [name for name, family in MODELS.items() if family.model.is_causal]
TEXTS = ["The fox.", "", "A", "H\u00e9, a \U0001f642 fox: na\u00efve! " * 3]
PAIRS = [
    ("The old", " fox"),
    ("", "Seven hens"),
    ("  ", "hen"),
    ("One two ", "three"),
    ("x" * 40, "yz"),
    ("a", "b" * 29),
]


class OnlyEnd(ByteTokenizer):
    """Bytes with an end marker alone, as GPT-2 has."""

    bos_id = None


def scorer(family: str = "bitnet", width: int = 11, **options: Any) -> Scorer:
    tokenizer = options.pop("tokenizer", ByteTokenizer())
    model = tiny_model(family, vocab_size=256, mode=EXACT, **options.pop("sizes", {}))
    return Scorer(model, tokenizer, width, **options)


@torch.no_grad()
def nats(model: Any, ids: list[int]) -> tuple[float, bool]:
    """ln p of the last id after the others, and whether it is the likeliest one."""
    logits = model.eval()(torch.tensor([ids[:-1]])).logits[0, -1].double()
    return logits.log_softmax(dim=-1)[ids[-1]].item(), int(logits.argmax()) == ids[-1]


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_texts_are_scored_in_windows_side_by_side_and_a_full_one_at_the_end(family: str, batch_size: int) -> None:
    asked = scorer(family, batch_size=batch_size)
    expected = []
    for text in TEXTS:
        ids, total = [BOS, *text.encode()], 0.0
        for place in range(1, len(ids)):
            stop = min(-(-place // 11) * 11, max(len(ids) - 1, 0))
            total += nats(asked.model, ids[max(0, stop - 11) : place + 1])[0]
        expected.append(total)
    assert asked.texts(TEXTS) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), OnlyEnd()], ids=["bos", "eos"])
def test_continuations_are_scored_after_as_much_context_as_fits(family: str, tokenizer: Any) -> None:
    asked = scorer(family, tokenizer=tokenizer)
    found = asked.continuations(PAIRS)
    begin = [] if tokenizer.bos_id is None else [BOS]
    for (context, continuation), each in zip(PAIRS[:5], found, strict=False):
        bare = context.rstrip()
        ids = [*(begin if bare else [tokenizer.bos_id or EOS]), *(context + continuation).encode()]
        count = len((context + continuation).encode()) - len(bare.encode())
        read = ids[-12:]
        steps = [nats(asked.model, read[: len(read) - count + place + 1]) for place in range(count)]
        assert each.nats == pytest.approx(sum(value for value, _ in steps), rel=1e-5)
        assert each.is_greedy == all(greedy for _, greedy in steps)
    assert found[5].nats < 0  # longer than a window, so that it is read in several


def test_a_continuation_longer_than_a_window_costs_what_its_parts_cost() -> None:
    asked = scorer()
    ids = [ord("a"), *b"b" * 29]
    expected = 0.0
    for place in range(1, 30):
        stop = min(-(-place // 11) * 11, 29)
        expected += nats(asked.model, ids[max(0, stop - 11) : place + 1])[0]
    assert asked.continuations([("a", "b" * 29)])[0].nats == pytest.approx(expected, rel=1e-5)


def test_the_likeliest_continuation_is_called_greedy_and_another_is_not() -> None:
    asked = scorer(width=30)
    (sample,) = generate(asked.model, asked.tokenizer, ["The fox"], SamplingSettings(max_new_tokens=3, temperature=0.0))
    ids = [BOS, *b"The fox", *sample.ids]
    likely, unlikely = asked._score([(ids, 3), ([*ids[:-1], (ids[-1] + 1) % 250], 3)])
    assert likely.is_greedy and not unlikely.is_greedy
    assert likely.nats > unlikely.nats


def test_spaces_at_the_seam_belong_to_the_continuation() -> None:
    first, second = scorer().continuations([("One ", "two"), ("One", " two")])
    assert first == second


def test_batches_and_neighbours_do_not_change_an_answer() -> None:
    together = scorer(batch_size=4).continuations(PAIRS)
    alone = [scorer(batch_size=1).continuations([pair])[0] for pair in PAIRS]
    assert [each.nats for each in together] == pytest.approx([each.nats for each in alone], rel=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_texts_are_continued_up_to_the_first_stop(family: str) -> None:
    asked = scorer(family, batch_size=2)
    prompts = ["The", "A hen and", "x"]
    settings = SamplingSettings(max_new_tokens=9, temperature=0.0)
    full = [sample.text for sample in generate(asked.model, asked.tokenizer, prompts, settings)]
    assert asked.generate([(prompt, {"max_gen_toks": 9, "until": []}) for prompt in prompts]) == full
    text = max(full, key=len)
    stop = text[len(text) // 2]
    stopped = asked.generate([(prompt, {"max_gen_toks": 9, "until": [stop, "never"]}) for prompt in prompts])
    assert stopped == [each.partition(stop)[0] for each in full]
    assert asked.generate([("The", {"max_gen_toks": 9, "until": stop})]) == stopped[:1]


def test_drawing_is_asked_for_and_repeats() -> None:
    wanted = {"max_gen_toks": 30, "do_sample": True, "temperature": 2.0, "until": []}
    first, second = (scorer(width=40).generate([("The", wanted)]) for _ in range(2))
    assert first == second != scorer(width=40).generate([("The", {"max_gen_toks": 30})])


def test_the_model_is_left_as_it_was_and_progress_is_told() -> None:
    told = []
    asked = scorer(batch_size=2, progress=lambda done, total: told.append((done, total)))
    asked.model.train()
    asked.continuations(PAIRS)
    assert asked.model.training
    assert told[-1] == (len(PAIRS), len(PAIRS))
    assert sorted(told) == told


def test_an_interruption_ends_between_two_passes() -> None:
    def stop() -> None:
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        scorer(check=stop).texts(["a"])


def test_encoders_and_foreign_tokenizers_are_refused() -> None:
    with pytest.raises(SettingsError, match="is an encoder"):
        Scorer(tiny_model("qdyt", vocab_size=256), ByteTokenizer(), 11)
    with pytest.raises(TokenizerError, match="256 ids"):
        Scorer(tiny_model("bitnet"), ByteTokenizer(), 11)


def test_an_empty_text_costs_nothing() -> None:
    assert scorer().texts([""]) == [0.0]
    (nothing,) = scorer().continuations([("a", "")])
    assert nothing == (0.0, True) and not math.isnan(nothing.nats)
