"""Model cards: every number is from the record, and what is not known is said to be unknown."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fake_run import fake_run
from ternlm.report.card import card, is_plain
from ternlm.report.record import read_record
from ternlm.run_directory import RunDirectory

EXPORT: dict[str, Any] = {
    "name": "small-fox",
    "format": "packed",
    "family": "bitnet",
    "step": 300,
    "is_causal": True,
    "activation_bits": 8,
    "tokens_seen": 614_400,
    "context": 128,
    "ternary_layers": 24,
    "parameters": {"total": 1_250_000, "ternary": 1_000_000},
    "bytes": 610_000,
    "bytes_bfloat16": 2_500_000,
    "verification": {"status": "passed", "by": "ternlm", "tokens": 64, "largest_logit_difference": 0.0,
                     "largest_logit": 8.5},
}  # fmt: skip
EVALUATION = {"step": 300, "val/loss": 1.25, "val/perplexity": 3.4903, "val/bpb": 1.8034, "val/accuracy": 0.615,
              "perplexity_unit": "byte", "n_targets": 4111, "split": "validation", "protocol": "block",
              "dtype": "float32", "sequence_length": 64, "bpb_ci95": [1.7, 1.9]}  # fmt: skip
RUN: dict[str, Any] = {
    "config": {"data": {"source": "novels", "sequence_length": 64}, "optimizer": {"learning_rate": 0.004},
               "quantization": {"quantizer": "absmean", "granularity": "tensor"}},
    "status": {"state": "finished", "max_steps": 300, "anomalies": {"count": 0}},
    "evaluations": [{"step": 150, "val/loss": 2.0}, EVALUATION],
    "ternary": {"steps": [100, 300], "all": {"frac_zero": [0.2, 0.311], "scale": [0.1, 0.0811]}},
    "alignment": {"rows": [{"part": "norms", "definition": "sub-norms", "run": "prenorm", "verdict": "differs"},
                           {"part": "codes", "verdict": "same"}]},
    "papers": [{"part": "weights", "title": "Ma et al. 2024", "address": "https://arxiv.org/abs/2402.17764"}],
}  # fmt: skip


def of(export: dict[str, Any] | None = None, **run: Any) -> str:
    return card({"runs": [RUN | run], "export": EXPORT | (export or {})})


def front_matter(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_a_card_says_what_the_model_is_how_good_and_how_it_was_made() -> None:
    text = of()
    for part in (
        "# small-fox",
        "1.25M parameters, 80% of them ternary",
        "trained on 614k tokens of 'novels'",
        "has 0.6 MB; in bfloat16 the same parameters take 2.5 MB",
        "| loss | 1.2500 | nats per target, 4,111 targets |",
        "| perplexity | 3.49 | per byte |",
        "| bits per byte | 1.8034 | 95 % over documents: 1.7000 to 1.9000 |",
        "| accuracy | 61.50% |",
        "| learning rate | 0.004 |",
        "| share of 0 | 31.1% |",
        "| mean scale | 0.0811 |",
        "Of 2 parts that were compared with the definition of BitNet b1.58: the same 1, different 1,",
        "| norms | sub-norms | prenorm |",
        "ternlm generate FOLDER --prompt",
        "at most 128 tokens",
        "0.49 tokens per parameter",
        "[Ma et al. 2024](https://arxiv.org/abs/2402.17764)",
        "The largest difference of a logit is 0, of logits up to 8.5",
    ):
        assert part in text, part
    assert front_matter(text) == {
        "library_name": "ternlm",
        "pipeline_tag": "text-generation",
        "tags": ["ternlm", "ternary", "bitnet", "1.58-bit"],
    }


def test_licence_and_language_are_said_only_where_somebody_has_said_them() -> None:
    assert "No licence has been stated" in of()
    text = of({"license": "apache-2.0", "language": "en"})
    assert front_matter(text)["license"] == "apache-2.0" and front_matter(text)["language"] == "en"
    assert "No licence" not in text
    for value in ("mit\ntags: x", "a: b", "", "-", "é"):
        assert not is_plain(value)
        assert "license" not in front_matter(of({"license": value}))


def test_e10_numbers_of_another_step_are_marked_as_such() -> None:
    text = of({"step": 160})
    assert "There is no evaluation at the exported step 160; these numbers are of step 150." in text
    assert "2.0000" in text and "1.2500" not in text
    assert "It is the model at step 160 of 300." in text


@pytest.mark.parametrize(
    ("state", "anomalies", "said"),
    [
        ("diverged", 0, "has not finished (its state: diverged)"),
        ("running", 0, "has not finished (its state: running)"),
        ("finished", 3, "3 anomalies were noticed"),
    ],
)
def test_what_went_wrong_is_among_the_limits(state: str, anomalies: int, said: str) -> None:
    text = of(status={"state": state, "max_steps": 300, "anomalies": {"count": anomalies}})
    assert said in text
    assert said not in of()


def test_what_is_not_known_is_said_to_be_unknown() -> None:
    for record in ({"export": EXPORT, "runs": []}, {"export": EXPORT}, {"export": EXPORT, "runs": [{}]}):
        text = card(record)
        assert "no evaluation of this model on held-out text was found" in text
        assert "Not known: its run was not found." in text
        assert "text that is not known here" in text
        assert "was not checked" in text and "nan" not in text.lower() and "None" not in text
    assert card({}).startswith("---\n")


def test_an_export_that_was_not_compared_says_so() -> None:
    text = of({"verification": {"status": "skipped", "reason": "--no-verify was given"}})
    assert "**Warning:** It was not: --no-verify was given." in text
    assert "largest difference" not in text


def test_a_folder_for_transformers_is_run_with_transformers() -> None:
    checked = {"status": "passed", "by": "transformers 5", "tokens": 64, "largest_logit_difference": 0.042,
               "largest_logit": 8.7, "relative_l2_unrounded": 3e-7, "codes_found_otherwise": 12}  # fmt: skip
    text = of({"format": "hf", "verification": checked})
    assert front_matter(text)["library_name"] == "transformers"
    for part in (
        'dtype="auto"',
        "TORCHDYNAMO_DISABLE=1",
        "training can go on",
        "3e-07 apart",
        "12 weights to another code",
    ):
        assert part in text.replace("\\", ""), part
    plain = of({"format": "hf", "ternary_layers": 0})
    assert "TORCHDYNAMO" not in plain and "in full precision" in plain
    assert front_matter(plain)["tags"] == ["ternlm"]


def test_an_encoder_fills_and_a_recurrent_model_reads_any_length() -> None:
    text = of({"is_causal": False, "family": "qdyt"})
    assert front_matter(text)["pipeline_tag"] == "fill-mask" and "ternlm fill FOLDER" in text
    assert "reads at most" not in of({"family": "hgrn"})


@pytest.mark.parametrize("source", ["/home/someone/secret/novel.txt", "C:\\Users\\me\\novel.txt", "./x/novel.txt"])
def test_a_card_does_not_say_where_somebody_keeps_files(source: str) -> None:
    text = of(config={"data": {"source": source}})
    assert "'novel.txt'" in text and "secret" not in text and "Users" not in text and "./x" not in text


def test_what_a_model_writes_cannot_break_the_card() -> None:
    sample = {"step": 300, "prompt": "The", "mode": "greedy", "text": " ```\n# not a heading\n<script>\x1b[31m"}
    text = of(samples=[sample, {"step": 900, "prompt": "", "text": "of a later step"}])
    assert "````text\nThe ```" in text and "\x1b" not in text and "later step" not in text


def test_the_record_of_a_real_folder_makes_a_card(tmp_path: Path) -> None:
    fake_run(tmp_path / "run")
    record = read_record([RunDirectory(tmp_path / "run")])
    text = card({**record, "export": EXPORT})
    assert ("nats per target" in text) == bool(record["runs"][0]["evaluations"])
    (tmp_path / "empty").mkdir()
    assert "Warning" in card({**read_record([RunDirectory(tmp_path / "empty")]), "export": EXPORT})
