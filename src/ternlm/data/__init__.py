"""Documents to shards to batches. `Loader` and `Batch` need torch and are imported from their modules."""

from ternlm.data.catalog import CORPORA, CorpusEntry, open_corpus
from ternlm.data.documents import read_documents
from ternlm.data.settings import DataSettings
from ternlm.data.shards import Corpus, Progress, TokenStream, default_directory, load_corpus, prepare
from ternlm.data.statistics import statistics

__all__ = [
    "CORPORA",
    "Corpus",
    "CorpusEntry",
    "DataSettings",
    "Progress",
    "TokenStream",
    "default_directory",
    "load_corpus",
    "open_corpus",
    "prepare",
    "read_documents",
    "statistics",
]
