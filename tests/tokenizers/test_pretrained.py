import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from ternlm.errors import TokenizerError
from ternlm.tokenizers import Tokenizer, load_tokenizer

ALL = [
    "llama-2/tokenizer.model",
    "tinyllama",
    "gpt2",
    "bert-base-uncased/vocab.txt",
    "bert-base-uncased/tokenizer.json",
]
_loaded: dict[str, Tokenizer] = {}


def load(shared_data: Path, name: str) -> Tokenizer:
    """Each published tokenizer once per test run; loading 32,000 pieces takes half a second."""
    if name not in _loaded:
        _loaded[name] = load_tokenizer(shared_data / "tokenizers" / name)
    return _loaded[name]


def real_text(shared_data: Path) -> str:
    return (shared_data / "wikitext-2" / "wiki.valid.raw").read_text(encoding="utf-8")[:200_000]


def test_the_sentencepiece_file_gives_the_ids_of_its_published_json(
    shared_data: Path, multilingual: list[str], special_spellings: list[str]
) -> None:
    ours, published = load(shared_data, "llama-2/tokenizer.model"), load(shared_data, "tinyllama")
    assert ours.vocab_size == published.vocab_size == 32000
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (1, 2, 0)
    texts = [real_text(shared_data), *multilingual, *special_spellings, "", " ", "a", "\n", "▁", " ▁ a"]
    assert ours.encode_batch(texts) == published.encode_batch(texts)


def test_known_llama_ids(shared_data: Path) -> None:
    assert load(shared_data, "llama-2/tokenizer.model").encode("Hello world") == [15043, 3186]


def test_known_gpt2_ids_and_one_marker_for_both_ends(shared_data: Path) -> None:
    gpt2 = load(shared_data, "gpt2")
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.vocab_size, gpt2.bos_id, gpt2.eos_id) == (50257, None, 50256)


def test_vocab_txt_equals_the_published_bert_json_and_lower_cases(shared_data: Path) -> None:
    ours = load(shared_data, "bert-base-uncased/vocab.txt")
    published = load(shared_data, "bert-base-uncased/tokenizer.json")
    text = real_text(shared_data)
    assert ours.encode(text) == published.encode(text)
    assert ours.encode("Hello, WORLD") == [7592, 1010, 2088]
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id, ours.mask_id) == (101, 102, 0, 100, 103)
    assert ours.decode(ours.encode("Hello unaffable WORLD")) == "hello unaffable world"


@pytest.mark.parametrize("name", ALL)
def test_lossless_says_whether_the_bytes_of_tokens_are_those_of_the_text(
    name: str, shared_data: Path, multilingual: list[str], special_spellings: list[str]
) -> None:
    tokenizer = load(shared_data, name)
    assert tokenizer.lossless == (name == "gpt2")
    if "bert" in name:
        return
    for text in [*multilingual, *special_spellings, real_text(shared_data), "", " a"]:
        ids = tokenizer.encode(text)
        assert tokenizer.text_bytes(ids) == len(text.encode())
        assert tokenizer.text_bytes(ids) == int(tokenizer.token_bytes()[ids].sum()) - (
            tokenizer.prefix_bytes if text else 0
        )
        assert tokenizer.decode(ids) == text


def test_a_literal_lower_block_reads_as_a_space_as_in_sentencepiece(shared_data: Path) -> None:
    llama = load(shared_data, "llama-2/tokenizer.model")
    assert llama.decode(llama.encode("a▁b")) == "a b"


@pytest.mark.parametrize("name", ALL)
def test_spellings_of_special_tokens_are_only_text(name: str, shared_data: Path, special_spellings: list[str]) -> None:
    tokenizer = load(shared_data, name)
    for text in special_spellings:
        assert not tokenizer.special_ids() & set(tokenizer.encode(text)), text


@pytest.mark.parametrize("name", ALL)
def test_saving_and_loading_keeps_fingerprint_ids_and_specials(
    name: str, shared_data: Path, tmp_path: Path, multilingual: list[str]
) -> None:
    tokenizer = load(shared_data, name)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.special_ids() == tokenizer.special_ids()
    for role in ("bos_id", "eos_id", "pad_id", "unk_id", "mask_id", "lossless", "prefix_bytes", "name"):
        assert getattr(again, role) == getattr(tokenizer, role), role
    assert again.encode_batch(multilingual) == tokenizer.encode_batch(multilingual)
    assert (tmp_path / "tokenizer.model").exists() == name.endswith(".model")


@pytest.mark.parametrize("name", ["llama-2/tokenizer.model", "gpt2"])
def test_stream_prints_what_decode_gives(name: str, shared_data: Path, multilingual: list[str]) -> None:
    tokenizer = load(shared_data, name)
    for text in multilingual:
        stream = tokenizer.stream()
        printed = [stream.feed(index) for index in tokenizer.encode(text)]
        assert "".join([*printed, stream.finish()]) == text
        assert all("\ufffd" not in part for part in printed) or "\ufffd" in text


def test_a_continuation_keeps_its_leading_space(shared_data: Path) -> None:
    llama = load(shared_data, "llama-2/tokenizer.model")
    stream = llama.stream(prompt=[llama.bos_id, *llama.encode("Hello")])
    assert stream.feed(llama.encode("world")[0]) == " world"
    assert llama.stream().feed(llama.encode("world")[0]) == "world"


def test_lone_surrogates_are_read_as_replacement_characters(shared_data: Path) -> None:
    gpt2 = load(shared_data, "gpt2")
    assert gpt2.decode(gpt2.encode("a\ud800b")) == "a\ufffdb"


def test_special_tokens_never_appear_in_a_unigram_model() -> None:
    from ternlm.tokenizers.library import LibraryTokenizer

    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((character, -5.0) for character in "▁</s>ab")]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.add_special_tokens(["<unk>", "</s>"])
    tokenizer = LibraryTokenizer(inner, "tiny unigram")
    assert tokenizer.eos_id == 1
    assert tokenizer.decode(tokenizer.encode("a</s>b")) == "a</s>b"
    assert LibraryTokenizer(inner, "again").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("content", ["", "not json", "[]", "{}", '{"model": {"type": "BPE"}}', "[" * 100_000])
def test_malformed_json_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_damaged_published_json_never_raises_anything_else(shared_data: Path, tmp_path: Path) -> None:
    document = json.loads((shared_data / "tokenizers" / "tinyllama" / "tokenizer.json").read_text())
    document["model"]["vocab"] = {token: i for token, i in document["model"]["vocab"].items() if i < 400}
    for key, value in [
        ("merges", document["model"]["merges"]),
        ("merges", [["a"]]),
        ("vocab", {}),
        ("vocab", {"a": -1}),
    ]:
        broken = {**document, "model": {**document["model"], "merges": [], key: value}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(broken))
        with pytest.raises(TokenizerError):
            load_tokenizer(tmp_path).encode("a")


def test_a_rust_panic_is_a_tokenizer_error() -> None:
    from ternlm.tokenizers.interface import library_errors

    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(TokenizerError, match="index out of bounds"), library_errors("encoding"):
        raise panic("index out of bounds")
    with pytest.raises(KeyboardInterrupt), library_errors("encoding"):
        raise KeyboardInterrupt


def test_ids_beyond_any_vocabulary_are_refused_before_the_library_lists_the_gaps(tmp_path: Path) -> None:
    load_tokenizer("byte").save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["model"]["vocab"]["x"] = 4_000_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match="above the"):
        load_tokenizer(tmp_path)


def test_missing_files_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(TokenizerError, match="no tokenizer at"):
        load_tokenizer("./absent/tokenizer.json")
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_gpt2_files_without_every_byte_and_vocab_without_unk_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(TokenizerError, match="byte-level"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(TokenizerError, match="UNK"):
        load_tokenizer(tmp_path / "vocab.txt")


def test_a_hub_name_that_cannot_be_fetched_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(TokenizerError, match="no route to host"):
        load_tokenizer("owner/name")


def test_a_hub_name_loads_from_its_downloaded_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    load_tokenizer("byte").save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    tokenizer = load_tokenizer("owner/name")
    assert (tokenizer.name, tokenizer.bos_id, tokenizer.eos_id) == ("name", 254, 255)
    assert tokenizer.lossless
