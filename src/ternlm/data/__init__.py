"""Documents to shards or a stream to batches. Loaders and `Batch` need torch: import them from their modules."""

from ternlm.data.catalog import CORPORA, CorpusEntry, open_corpus
from ternlm.data.documents import read_documents
from ternlm.data.settings import DataSettings
from ternlm.data.shards import Corpus, Progress, TokenStream, default_directory, load_corpus, prepare
from ternlm.data.statistics import statistics
from ternlm.data.stream import StreamedCorpus, open_stream

__all__ = [
    "CORPORA",
    "Corpus",
    "CorpusEntry",
    "DataSettings",
    "Progress",
    "StreamedCorpus",
    "TokenStream",
    "default_directory",
    "load_corpus",
    "open_corpus",
    "open_stream",
    "prepare",
    "read_documents",
    "statistics",
]
