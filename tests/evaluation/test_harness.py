"""Tasks of lm-evaluation-harness on our models; what needs the package is left out where it is not installed."""

import json
import math
import sys
from pathlib import Path

import pytest

from builders import tiny_data_settings, tiny_model
from ternlm.data import read_documents
from ternlm.data.catalog import open_corpus
from ternlm.data.preparation import prepare_data
from ternlm.data.wikitext import detokenize, page_words, pages
from ternlm.errors import DataError, EnvironmentFault, SettingsError
from ternlm.evaluation.evaluate import evaluate
from ternlm.evaluation.harness import evaluate_tasks
from ternlm.evaluation.likelihood import Scorer
from ternlm.evaluation.words import page_perplexity
from ternlm.models import QuantizationMode
from ternlm.tokenizers import ByteTokenizer, TokenizerSettings

RAW = "".join(
    f' \n = Article {n} = \n \n The {n} @,@ 000 hens of " Foxton " ( a town ) ran , and it \'s well @-@ known . \n'
    f" \n = = Part = = \n \n {'They ran again ; ' * n} caf\u00e9 . \n"
    for n in range(1, 13)
)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package, which must not look for anything on a network."""
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    datasets = pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def wikitext_task(folder: Path, raw: Path) -> Path:
    """The harness's own task `wikitext` on local pages."""
    import lm_eval

    rows = [json.dumps({"page": page}) for page in pages(read_documents(str(raw)))]
    (folder / "pages.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    original = Path(lm_eval.__file__).parent / "tasks" / "wikitext" / "wikitext.yaml"
    (folder / "local.yaml").write_text(
        f"include: {original}\ntask: wikitext_local\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'pages.jsonl'}}}}}\n"
        "training_split: null\nvalidation_split: null\n"
    )
    return folder / "local.yaml"


def choice_task(folder: Path, kind: str = "multiple_choice") -> Path:
    """A small task of questions with four answers."""
    rows = [
        {"question": f"How many hens ran {n}?", "answers": ["one", "two", "a few", "many"], "gold": n % 4}
        for n in range(7)
    ]
    (folder / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    ask = {
        "multiple_choice": "doc_to_target: gold\ndoc_to_choice: answers\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
        "generate_until": 'doc_to_target: "{{answers[gold]}}"\ngeneration_kwargs: {until: ["."], max_gen_toks: 5}\n'
        "metric_list: [{metric: exact_match}]\n",
    }[kind]
    (folder / f"{kind}.yaml").write_text(
        f"task: hens_{kind}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'choices.jsonl'}}}}}\n"
        f'output_type: {kind}\ntest_split: test\ndoc_to_text: "Question: {{{{question}}}}\\nAnswer:"\n{ask}'
    )
    return folder / f"{kind}.yaml"


@pytest.mark.parametrize("tokenizer", [TokenizerSettings(), TokenizerSettings(name="train", vocab_size=300)])
@pytest.mark.parametrize("width", [16, 37])
def test_word_perplexity_is_that_of_the_harness_on_the_same_model(
    offline: None, tmp_path: Path, tokenizer: TokenizerSettings, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "wiki.test.raw").write_text(RAW, encoding="utf-8")
    settings = tiny_data_settings(
        tmp_path, source=str(tmp_path / "wiki.test.raw"), wikitext="detokenized", validation_path=None,
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    prepared = prepare_data(settings, tokenizer)
    model = tiny_model("bitnet", vocab_size=300, initializer_range=0.2)
    stream = prepared.corpus.split("train")
    result = evaluate(model, stream, prepared.tokenizer, width, stride=width)
    articles = open_corpus(settings.model_copy(update={"wikitext": "articles"}), "train")
    ours = page_perplexity(result, stream, articles)
    scorer = Scorer(model, prepared.tokenizer, width, 5)
    theirs = evaluate_tasks(scorer, [str(wikitext_task(tmp_path, tmp_path / "wiki.test.raw"))])["tasks"]
    row = theirs["wikitext_local"]
    assert row["n_samples"] == len(result.documents.bytes) == 12  # type: ignore[union-attr]
    assert ours["ppl_word"] == pytest.approx(row["word_perplexity"], rel=1e-6)
    assert ours["page_bpb"] == pytest.approx(row["bits_per_byte"], rel=1e-6)
    assert math.isfinite(row["byte_perplexity"]) and row["version"] == 2.0


def test_pages_and_words_are_those_of_the_harness_on_real_text(offline: None, shared_data: Path) -> None:
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    for name in ("wiki.test.tokens", "wiki.valid.raw"):
        for page in pages(read_documents(str(shared_data / "wikitext-2" / name))):
            assert detokenize(page) == wikitext_detokenizer({"page": page})
            assert page_words(page) == process_results({"page": page}, (0.0,))["word_perplexity"][1]


@pytest.mark.parametrize("family", ["bitnet", "hgrn", "hnet"])
def test_choices_and_generations_are_answered_by_every_causal_family(
    offline: None, tmp_path: Path, family: str
) -> None:
    model = tiny_model(family, vocab_size=256, mode=QuantizationMode(activations="none"))
    scorer = Scorer(model, ByteTokenizer(), 37, 3)
    tasks = [str(choice_task(tmp_path, kind)) for kind in ("multiple_choice", "generate_until")]
    found = evaluate_tasks(scorer, tasks, limit=5)
    choices, generated = (found["tasks"][f"hens_{kind}"] for kind in ("multiple_choice", "generate_until"))
    pairs = [
        [(f"Question: How many hens ran {n}?\nAnswer:", f" {answer}") for answer in ("one", "two", "a few", "many")]
        for n in range(5)
    ]
    likely = [[each.nats for each in scorer.continuations(row)] for row in pairs]
    right = [row.index(max(row)) == n % 4 for n, row in enumerate(likely)]
    assert choices["acc"] == pytest.approx(sum(right) / 5)
    assert {"acc_stderr", "acc_norm"} <= choices.keys()
    assert (choices["n_samples"], choices["limit"], choices["few_shot"]) == (5, 5, 0)
    assert 0 <= generated["exact_match"] <= 1
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [
        (["helaswag"], r"no task 'helaswag'. Did you mean 'hellaswag'\?"),
        (["hellaswag", "hellaswag"], "given twice"),
        (["missing.yaml"], "cannot be read"),
        (["none.yaml"], "defines no task"),
    ],
)
def test_unknown_tasks_are_one_sentence(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.yaml").write_text("dataset_path: json\n")
    with pytest.raises(SettingsError, match=reason):
        evaluate_tasks(Scorer(tiny_model("bitnet", vocab_size=256), ByteTokenizer(), 37), tasks)


def test_data_that_cannot_be_fetched_are_one_sentence(offline: None) -> None:
    with pytest.raises(DataError, match=r"the data of arc_easy cannot be read: .*connect once"):
        evaluate_tasks(Scorer(tiny_model("bitnet", vocab_size=256), ByteTokenizer(), 37), ["arc_easy"])


def test_p05_without_the_package_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'ternlm\[eval\]'"):
        evaluate_tasks(Scorer(tiny_model("bitnet", vocab_size=256), ByteTokenizer(), 37), ["hellaswag"])
